"""The mock CUDA runtime: C++ that takes libcudart's place, and the bridge from its calls to a `Device`."""
