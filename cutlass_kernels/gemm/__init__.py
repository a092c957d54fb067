"""Products that CUTLASS generates: what kernels there are, their source, which one runs a problem, and its C ABI."""
