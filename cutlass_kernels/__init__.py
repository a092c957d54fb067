"""CUTLASS-generated kernels and everything that needs nvcc."""
