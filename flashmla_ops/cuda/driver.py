"""Attention kernels on a CUDA device, by the driver alone: a cubin in, launches on torch's stream out.

Nothing here needs nvcc, a CUDA runtime or the package that compiled the kernel. CUDA driver API:
https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.config import Config
from cutlass_kernels.attention.libraries import ARCHS, Built, arch_of, build
from cutlass_kernels.errors import BuildError, CallError

Grid = tuple[int, int, int]
#: A kernel's arguments by the names of its parameters; a tensor stands for its address, None for no address.
Values = Mapping[str, Tensor | int | float | None]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BUFFER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*


@cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, doing: str, error: type[Exception] = CallError) -> None:
    if code:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(code, ctypes.byref(text))
        raise error(f"{doing}: CUDA error {code}: {(text.value or b'unknown').decode()}")


@cache
def _layout(parameters: tuple[tuple[str, str], ...]) -> tuple[struct.Struct, Callable[[Values], tuple[Any, ...]]]:
    """Each parameter lies at a multiple of its size."""
    names, codes = zip(*parameters, strict=True)
    return struct.Struct(f"@{''.join(codes)}"), itemgetter(*names)


def pack(parameters: tuple[tuple[str, str], ...], values: Values) -> bytes:
    """A kernel's parameters as it reads them."""
    layout, getter = _layout(parameters)
    return layout.pack(*[value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in getter(values)])


@dataclass(frozen=True)
class Function:
    """A kernel that a device has loaded."""

    built: Built
    handle: ctypes.c_void_p

    @classmethod
    def load(cls, built: Built, capability: tuple[int, int]) -> Function:
        """Into the current context. A device newer than all that cubins are made for translates the PTX itself."""
        own = built.arch == arch_of(capability) and built.arch.rstrip("a") == f"sm_{capability[0]}{capability[1]}"
        image = built.cubin if own else built.ptx.encode() + b"\0"
        module, handle = ctypes.c_void_p(), ctypes.c_void_p()
        cuda, name = _cuda(), built.config.name
        _check(cuda.cuModuleLoadData(ctypes.byref(module), image), f"loading {name}", BuildError)
        entry = built.entry.encode()
        _check(cuda.cuModuleGetFunction(ctypes.byref(handle), module, entry), f"finding {name}", BuildError)
        if (shared := built.config.shared_bytes) > 48 << 10:
            _check(cuda.cuFuncSetAttribute(handle, _MAX_DYNAMIC_SHARED, shared), f"shared memory of {name}", BuildError)
        return cls(built, handle)

    def launch(self, grid: Grid, values: Values, stream: int) -> None:
        """Returns at once; nothing is allocated and nothing waits. Raises `CallError`."""
        parameters = pack(self.built.parameters, values)
        buffer, size = ctypes.create_string_buffer(parameters, len(parameters)), ctypes.c_size_t(len(parameters))
        extra = (ctypes.c_void_p * 5)(_BUFFER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END)
        config = self.built.config
        block, shared = (config.threads, 1, 1), config.shared_bytes
        code = _cuda().cuLaunchKernel(self.handle, *grid, *block, shared, ctypes.c_void_p(stream), None, extra)
        _check(code, f"launching {config.name}")


@cache
def function(index: int, config: Config) -> Function:
    """The kernel on a device of this process, built now if it is not in the cache."""
    capability = torch.cuda.get_device_capability(index)
    arch = arch_of(capability)
    if arch is None:
        raise BuildError(f"{config.name}: compute capability 8.0 or newer is expected, got {capability}")
    with torch.cuda.device(index):
        torch.cuda.current_stream()  # the context is there
        return Function.load(build(config, arch), capability)


__all__ = ["ARCHS", "Function", "Grid", "Values", "function", "pack"]
