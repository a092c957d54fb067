"""`run`: a library's host code, called with a device in place of CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cutlass_kernels.emulator.device import Device
from cutlass_kernels.emulator.options import Options
from cutlass_kernels.emulator.report import Report
from cutlass_kernels.emulator.runtime.bridge import Bridge, load

Result = TypeVar("Result")
Call = Callable[[Device, ctypes.CDLL], Result]


def run(
    library: str | Path,
    call: Call[Result],
    *,
    arch: str = "sm_80",
    options: Options | None = None,
    memory: int = 1 << 26,
    ptx: str | None = None,
) -> Report[Result]:
    """Call ``call(device, library)`` with every CUDA call of the library answered by an emulated device.

    ``memory``: bytes of the device. ``ptx``: PTX to run in place of what the library carries. Raises the first
    `EmulatorError` of a launch, also where the library's host code only returned an error code; whatever ``call``
    raises otherwise; `RuntimeUnavailable` and `NoPtx` before it is called.
    """
    loaded = load(Path(library), ptx)
    device = Device(arch, options, memory)
    for text in loaded.ptx:
        device.load_ptx(text)
    bridge = Bridge(device)
    with bridge.serving(loaded.runtime):
        try:
            result = call(device, loaded.handle)
        finally:
            if bridge.error is not None:
                raise bridge.error
    return Report(result, tuple(device.launches))
