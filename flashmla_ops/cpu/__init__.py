"""The CPU implementations: C++ kernels where a compiler is found, the float64 reference where not.

``FLASHMLA_CPU`` chooses an instruction set by name (``avx512_bf16``, ``avx512``, ``avx2``, ``generic``, ``emulated``),
or ``reference`` for no C++ at all. ``FLASHMLA_BINDING=ctypes`` loads the same kernels without torch's C++ headers.
"""

from flashmla_ops.cpu.loader import REFERENCE, STATE, load, using

__all__ = ["REFERENCE", "STATE", "load", "using"]
