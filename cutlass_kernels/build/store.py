"""Where built kernels are kept."""

from __future__ import annotations

from cutlass_kernels.errors import BuildError
from flashmla_build import Store

STORE = Store("cutlass", "CUDA kernels", BuildError)
