"""Calls of the mock runtime, answered by a `Device`; and libraries, loaded so that they call it."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cutlass_kernels.emulator.device import Device
from cutlass_kernels.emulator.errors import EmulatorError, LaunchError, NoPtx, RuntimeUnavailable
from cutlass_kernels.emulator.machine.tensormap import SIZE, TensorMap
from cutlass_kernels.emulator.runtime import build, fatbin

_INVALID, _OUT_OF_MEMORY, _LAUNCH_FAILURE = 1, 2, 719
_MAX_DYNAMIC_SHARED = 8
_DEFAULT_SHARED = 48 * 1024

_I, _U, _S, _P = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t, ctypes.c_void_p
_Unsigneds, _Longs = ctypes.POINTER(_U), ctypes.POINTER(ctypes.c_uint64)
_SIGNATURES: dict[str, Any] = {
    "launch": ctypes.CFUNCTYPE(_I, _I, ctypes.c_char_p, _Unsigneds, _Unsigneds, _Unsigneds, _S, ctypes.POINTER(_P)),
    "function_attribute": ctypes.CFUNCTYPE(_I, _I, ctypes.c_char_p, _I, _I),
    "device_attribute": ctypes.CFUNCTYPE(_I, _I, ctypes.POINTER(_I)),
    "allocate": ctypes.CFUNCTYPE(_I, _S, ctypes.POINTER(_P)),
    "occupancy": ctypes.CFUNCTYPE(_I, _I, _S, ctypes.POINTER(_I)),
    "encode": ctypes.CFUNCTYPE(_I, _P, _I, _U, _P, _Longs, _Longs, _Unsigneds, _Unsigneds, _I, _I, _I),
    "touched": ctypes.CFUNCTYPE(_I, _P, _S),
}


class _Hooks(ctypes.Structure):
    _fields_ = list(_SIGNATURES.items())


@dataclass(frozen=True)
class Library:
    """A loaded library: its handle, its PTX texts, and the numbers under which the mock knows its modules."""

    handle: ctypes.CDLL
    ptx: tuple[str, ...]
    modules: range
    runtime: ctypes.CDLL


_loaded: dict[tuple[Path, int, int], Library] = {}
_runtimes: dict[str, ctypes.CDLL] = {}


def load(path: Path, ptx: str | None = None) -> Library:
    """Load a library on the mock. ``ptx`` takes the place of its own. Raises `RuntimeUnavailable`, `NoPtx`."""
    path = path.resolve()
    stamp = path.stat()
    key = (path, stamp.st_mtime_ns, stamp.st_size)
    if key not in _loaded:
        _loaded[key] = _load(path, fresh=not any(known[0] == path for known in _loaded))
    library = _loaded[key]
    if ptx is not None:
        return Library(library.handle, (ptx,), library.modules, library.runtime)
    if not library.ptx:
        raise NoPtx(f"{path} carries no PTX and {path.with_suffix('.ptx').name} is not beside it")
    return library


def _load(path: Path, *, fresh: bool) -> Library:
    soname = build.needed(path)
    if soname not in _runtimes:
        runtime = build.load(soname)
        runtime.mock_fatbin.restype = ctypes.c_void_p
        _runtimes[soname] = runtime
    runtime = _runtimes[soname]
    if not fresh:
        # The loader would hand back the old file under that name.
        copied = Path(tempfile.mkdtemp(prefix="flashmla-emulator-")) / path.name
        shutil.copy(path, copied)
        path = copied
    before = runtime.mock_fatbin_count()
    try:
        handle = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    except OSError as error:
        raise RuntimeUnavailable(f"the library does not load on the mock runtime: {error}") from error
    after = runtime.mock_fatbin_count()
    if after == before:
        raise RuntimeUnavailable(f"{path} found another libcudart in this process: load it in a fresh one")
    texts = [text for index in range(before, after) for text in fatbin.ptx_of(_registered(runtime, index))]
    beside = path.with_suffix(".ptx")
    if not texts and beside.is_file():
        texts = [beside.read_text()]
    return Library(handle, tuple(texts), range(before, after), runtime)


def _registered(runtime: ctypes.CDLL, index: int) -> bytes:
    address = runtime.mock_fatbin(index)
    size = fatbin.size_of(ctypes.string_at(address, 16))
    return ctypes.string_at(address, size)


class Bridge:
    """Answers the mock's calls for one `Device`. The first error is kept in ``error``; the host code sees a code."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.error: Exception | None = None
        self._shared_limits: dict[str, int] = {}
        self._callbacks = {name: kind(self._answer(name)) for name, kind in _SIGNATURES.items()}
        self._hooks = _Hooks(**self._callbacks)

    @contextmanager
    def serving(self, runtime: ctypes.CDLL) -> Iterator[None]:
        """The mock calls this bridge inside of the context, and nobody after it."""
        runtime.mock_set_hooks(ctypes.byref(self._hooks))
        try:
            yield
        finally:
            runtime.mock_set_hooks(ctypes.byref(_Hooks()))

    def _answer(self, name: str) -> Callable[..., int]:
        method: Callable[..., int] = getattr(self, f"_{name}")

        def answer(*arguments: Any) -> int:
            try:
                return method(*arguments)
            except Exception as error:  # Raised again by `run`: an exception cannot cross the C code between.
                self.error = self.error or error
                return _LAUNCH_FAILURE if isinstance(error, EmulatorError) else _INVALID

        return answer

    def _launch(
        self, module: int, name: bytes, grid: Any, block: Any, cluster: Any, shared: int, arguments: Any
    ) -> int:
        kernel = self.device.program(name.decode()).kernel
        limit = self._shared_limits.get(kernel.name, _DEFAULT_SHARED)
        if shared > limit:
            raise LaunchError(
                f"{kernel.name} is launched with {shared} bytes of dynamic shared memory, of which"
                f" cudaFuncSetAttribute allowed {limit}"
            )
        block_of = bytearray(kernel.parameter_bytes)
        for number, parameter in enumerate(kernel.parameters):
            value = ctypes.string_at(arguments[number], parameter.size)
            block_of[parameter.offset : parameter.offset + parameter.size] = value
        sizes = [(int(size[0]), int(size[1]), int(size[2])) for size in (grid, block, cluster)]
        self.device.launch(kernel.name, sizes[0], sizes[1], bytes(block_of), shared, sizes[2])
        return 0

    def _function_attribute(self, module: int, name: bytes, attribute: int, value: int) -> int:
        if attribute != _MAX_DYNAMIC_SHARED:
            return 0
        static = self.device.program(name.decode()).layout.shared_bytes(0)
        if static + value > self.device.model.shared_per_block:
            return _INVALID
        self._shared_limits[name.decode()] = value
        return 0

    def _device_attribute(self, attribute: int, value: Any) -> int:
        model = self.device.model
        known = {
            1: 1024,  # threads per block
            8: _DEFAULT_SHARED,
            10: 32,  # warp size
            16: model.sm_count,
            39: model.threads_per_sm,
            75: model.major,
            76: model.minor,
            81: model.shared_per_sm,
            95: 1,  # cooperative launch
            97: model.shared_per_block,
            106: 32,  # blocks per multiprocessor
            111: 1024,  # reserved shared memory per block
            120: int(model.cluster_limit > 1),
        }
        if attribute not in known:
            return _INVALID
        value[0] = known[attribute]
        return 0

    def _allocate(self, size: int, pointer: Any) -> int:
        try:
            pointer[0] = self.device.heap.allocate(max(size, 1))
        except MemoryError:
            return _OUT_OF_MEMORY
        return 0

    def _occupancy(self, block: int, shared: int, blocks: Any) -> int:
        model = self.device.model
        by_shared = model.shared_per_sm // max(shared + 1024, 1)
        blocks[0] = max(min(by_shared, model.threads_per_sm // max(block, 1), 32), 0)
        return 0

    def _encode(
        self,
        target: int,
        kind: int,
        rank: int,
        address: int | None,
        sizes: Any,
        strides: Any,
        box: Any,
        steps: Any,
        interleave: int,
        swizzle: int,
        fill: int,
    ) -> int:
        if interleave:
            raise LaunchError("an interleaved tensor map is not modelled")
        found = TensorMap(
            kind,
            address or 0,
            tuple(sizes[n] for n in range(rank)),
            tuple(strides[n] for n in range(rank - 1)),
            tuple(box[n] for n in range(rank)),
            tuple(steps[n] for n in range(rank)),
            swizzle,
            bool(fill),
        )
        found.check()
        ctypes.memmove(target, found.encode(), SIZE)
        return 0

    def _touched(self, address: int | None, size: int) -> int:
        heap = self.device.heap
        if address is not None and heap.holds(address, size):
            start = heap.offset(address)
            heap.memory.write_bytes(start, np.array(heap.memory.data[start : start + size]))
        return 0
