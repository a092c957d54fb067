"""Attention kernels on a CUDA device, by the driver alone: a cubin in, launches on torch's stream out.

Nothing here needs nvcc, a CUDA runtime or the package that compiled the kernel. CUDA driver API:
https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from cutlass_kernels.attention.config import Config
from cutlass_kernels.attention.libraries import Built, arch_of, build
from cutlass_kernels.errors import BuildError, CallError

Grid = tuple[int, int, int]
#: A kernel's arguments by the names of its parameters; a tensor stands for its address, None for no address.
Values = Mapping[str, Tensor | int | float | None]
#: Launches a kernel with the tensors of its address parameters, by name.
Launch = Callable[[Values], None]

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_BUFFER, _BUFFER_SIZE, _END = 1, 2, 0  # CU_LAUNCH_PARAM_*
_ADDRESS = struct.Struct("@q")


@cache
def _cuda() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int, doing: str, error: type[Exception] = CallError) -> None:
    if code:
        text = ctypes.c_char_p()
        _cuda().cuGetErrorString(code, ctypes.byref(text))
        raise error(f"{doing}: CUDA error {code}: {(text.value or b'unknown').decode()}")


def pack(parameters: tuple[tuple[str, str], ...], values: Values) -> bytes:
    """A kernel's parameters as it reads them: each at a multiple of its size."""
    codes = "".join(code for _, code in parameters)
    found = (values[name] for name, _ in parameters)
    return struct.pack(f"@{codes}", *(value.data_ptr() if isinstance(value, Tensor) else value or 0 for value in found))


def places(parameters: tuple[tuple[str, str], ...], names: Collection[str]) -> list[tuple[str, int]]:
    """Where some of the parameters lie in what `pack` gives."""
    codes = "".join(code for _, code in parameters)
    ends = [(name, struct.calcsize(f"@{codes[: i + 1]}"), code) for i, (name, code) in enumerate(parameters)]
    return [(name, end - struct.calcsize(f"@{code}")) for name, end, code in ends if name in names]


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

    def prepare(self, grid: Grid, values: Values, stream: Callable[[], int]) -> Launch:
        """A launch of which all is known but addresses: those of ``values`` only say which parameters they are.

        It returns at once; nothing is allocated and nothing waits. Raises `CallError`.
        """
        addresses = [name for name, value in values.items() if isinstance(value, Tensor)]
        template = pack(self.built.parameters, {**values, **dict.fromkeys(addresses, 0)})
        slots = places(self.built.parameters, addresses)
        config, size = self.built.config, ctypes.c_size_t(len(template))
        block, shared = (config.threads, 1, 1), config.shared_bytes
        cuda, handle = _cuda().cuLaunchKernel, self.handle

        def launch(tensors: Values) -> None:
            buffer = ctypes.create_string_buffer(template, len(template))
            for name, place in slots:
                _ADDRESS.pack_into(buffer, place, tensors[name].data_ptr())  # type: ignore[union-attr]
            extra = (ctypes.c_void_p * 5)(_BUFFER, ctypes.addressof(buffer), _BUFFER_SIZE, ctypes.addressof(size), _END)
            _check(cuda(handle, *grid, *block, shared, ctypes.c_void_p(stream()), None, extra), config.name)

        return launch


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
