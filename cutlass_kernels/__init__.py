"""CUTLASS-generated kernels and everything that needs nvcc.

    python -m cutlass_kernels list | generate | build

`GemmConfig` describes a kernel, `catalogue` lists those that we ship, `generate` writes their source without a device,
and `build` compiles them. Importing this package, and
listing, needs neither nvidia-cutlass (whose import name is cutlass_cppgen) nor nvcc.
"""

from cutlass_kernels.catalogue import by_name, kernels
from cutlass_kernels.config import GemmConfig
from cutlass_kernels.epilogue import Epilogue
from cutlass_kernels.inductor import inductor_cutlass_dir

__all__ = ["Epilogue", "GemmConfig", "by_name", "inductor_cutlass_dir", "kernels"]
