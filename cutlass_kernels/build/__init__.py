"""nvcc: where it is, compiled kernels and their cache, and what ptxas says of them."""
