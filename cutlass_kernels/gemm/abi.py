"""The C ABI of csrc/flashmla_gemm.h from Python: load a kernel, ask, run. Addresses are plain integers."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cutlass_kernels.errors import BuildError, CallError
from cutlass_kernels.gemm.config import GemmConfig

ABI = 2
NO_DEVICE = 100
WORKSPACE_TOO_SMALL = 101


class GemmCall(ctypes.Structure):
    """``FlashmlaGemm``. Strides count elements: row, then batch."""

    _fields_ = (
        *((name, c_int64) for name in ("m", "n", "k", "batch")),
        *((name, c_void_p) for name in ("a", "weight", "c", "d")),
        *((f"{name}_stride", c_int64 * 2) for name in ("a", "weight", "c", "d")),
        *((name, c_void_p) for name in ("bias", "row_scale", "col_scale")),
        *((name, c_float) for name in ("alpha", "beta")),
        *((name, c_int32) for name in ("splits", "sm_count")),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    )


class GroupedGemmCall(ctypes.Structure):
    """``FlashmlaGroupedGemm``."""

    _fields_ = (
        *((name, c_int64) for name in ("groups", "rows", "n", "k")),
        *((name, c_void_p) for name in ("a", "weight", "d")),
        ("a_stride", c_int64),
        ("weight_stride", c_int64 * 2),
        ("d_stride", c_int64),
        ("offsets", c_void_p),
        ("alpha", c_float),
        ("sm_count", c_int32),
        ("workspace", c_void_p),
        ("workspace_bytes", c_size_t),
    )


Call = GemmCall | GroupedGemmCall


@dataclass(frozen=True)
class Kernel:
    """A loaded kernel. ``library`` is its shared library; whoever loaded it keeps the CUDA runtime that it found."""

    config: GemmConfig
    library: ctypes.CDLL

    @cached_property
    def _prefix(self) -> str:
        if (found := self.library.flashmla_gemm_abi()) != ABI:
            raise BuildError(f"{self.config.name}: expected ABI {ABI}, got {found}: build it again")
        return "flashmla_grouped_gemm" if self.config.family == "grouped" else "flashmla_gemm"

    def refuses(self, call: Call) -> str | None:
        """Why it does not take a problem, in CUTLASS's words; None if it does."""
        code = getattr(self.library, f"{self._prefix}_can_run")(ctypes.byref(call))
        return None if code == 0 else self.status(code)

    def workspace(self, call: Call) -> int:
        """Bytes that `run` needs. Raises `CallError` without a device."""
        size = c_size_t()
        self._check(getattr(self.library, f"{self._prefix}_workspace")(ctypes.byref(call), ctypes.byref(size)))
        return size.value

    def run(self, call: Call, stream: int) -> None:
        """Launch on a stream and return; nothing is allocated and nothing waits. Raises `CallError`."""
        self._check(getattr(self.library, f"{self._prefix}_run")(ctypes.byref(call), c_void_p(stream)))

    def status(self, code: int) -> str:
        name = self.library.flashmla_gemm_status
        name.restype = ctypes.c_char_p
        text: bytes = name(code)
        return text.decode()

    def _check(self, code: int) -> None:
        if code != 0:
            raise CallError(f"{self.config.name}: {self.status(code)}")


def load(config: GemmConfig, library: Path) -> Kernel:
    """Load a built kernel. Its libcudart must be in the process, or where the loader finds it: torch brings one."""
    try:
        return Kernel(config, ctypes.CDLL(str(library)))
    except OSError as error:
        raise BuildError(f"{config.name}: {error}") from error
