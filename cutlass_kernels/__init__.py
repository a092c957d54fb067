"""CUTLASS-generated kernels and everything that needs nvcc.

    python -m cutlass_kernels list | generate | build | verify

`GemmConfig` describes a kernel, `catalogue` lists those that we ship, `generate` writes their source without a device,
`build` compiles them, and `verify` runs the compiled libraries in `emulator`, on the CPU. Importing this package, and
listing, needs neither nvidia-cutlass (whose import name is cutlass_cppgen) nor nvcc.
"""

from cutlass_kernels.gemm.catalogue import by_name, kernels
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.gemm.epilogue import Epilogue
from cutlass_kernels.gemm.inductor import inductor_cutlass_dir

__all__ = ["Epilogue", "GemmConfig", "by_name", "inductor_cutlass_dir", "kernels"]
