"""CUDA kernels executed on the CPU: the PTX inside the very library that ships, through its own host code.

An unmodified shared library, built with ``nvcc -cudart shared``, is loaded into a process where a mock CUDA runtime has
taken the place of libcudart. Its host code computes the launch, the mock forwards it, and every thread of the grid runs
as a lane of numpy vectors, with the checks that a device does not make::

    from cutlass_kernels import emulator

    def call(device, library):                       # library: a ctypes.CDLL
        a = device.array(emulator.to_bf16(values))   # DeviceArray: .pointer (int), .numpy()
        out = device.empty((m, n), np.uint16)        # uninitialised: reading it before a write is a hazard
        status = library.my_gemm(ctypes.c_void_p(a.pointer), ctypes.c_void_p(out.pointer), None)   # stream: None
        assert status == 0
        return emulator.from_bf16(out.numpy())

    report = emulator.run("kernel.so", call, arch="sm_80", options=emulator.Options(landing="late"))
    report.result, report.hazards, report.launches[0].counters

    survey = emulator.mutate("kernel.so", call, accept=lambda result: close(result), arch="sm_80")
    survey.detection                                 # the fraction of dropped waits and barriers that was noticed

- `run` raises the `EmulatorError` that a launch met (`MemoryFault`, `Deadlock`, ...), also when the library's host code
  turned it into an error code. Hazards do not raise: they are in the report.
- bf16 and fp8 have no numpy type: they travel as uint16 and uint8 bit patterns (`to_bf16`, `from_bf16`, `to_e4m3`,
  `from_e4m3`).
- One process serves many libraries, one after the other. The mock takes libcudart's place by its SONAME, so it must
  come first: in a process where a real libcudart is loaded (torch built for CUDA), `run` raises `RuntimeUnavailable`,
  and the caller starts a fresh one. Nothing depends on LD_LIBRARY_PATH.
- PTX comes from the library's embedded fatbin, so that what is checked is what ships; compile with a ``compute_XX``
  code target and ``--compress-mode=none`` (or any mode that `ptx_of` can unpack). A file ``<library>.ptx``
  beside the library is taken where the library carries none.

`LIMITS` says what is not modelled. Nothing here is a statement about speed or about a real device.
"""

from cutlass_kernels.emulator.device import MODELS, Device, DeviceArray
from cutlass_kernels.emulator.errors import (
    BarrierFault,
    Deadlock,
    DeviceTrap,
    DivergentCollective,
    EmulatorError,
    LaunchError,
    MemoryFault,
    NoPtx,
    PtxSyntaxError,
    RuntimeUnavailable,
    UnsupportedInstruction,
)
from cutlass_kernels.emulator.formats import from_bf16, from_e4m3, to_bf16, to_e4m3
from cutlass_kernels.emulator.limits import LIMITS
from cutlass_kernels.emulator.mutation import Mutant, NotClean, Survey, mutate, survey
from cutlass_kernels.emulator.options import Landing, Options, Site
from cutlass_kernels.emulator.registry import opcodes
from cutlass_kernels.emulator.report import Counters, Hazard, LaunchReport, Report
from cutlass_kernels.emulator.runner import run

__all__ = [
    "LIMITS",
    "MODELS",
    "BarrierFault",
    "Counters",
    "Deadlock",
    "Device",
    "DeviceArray",
    "DeviceTrap",
    "DivergentCollective",
    "EmulatorError",
    "Hazard",
    "Landing",
    "LaunchError",
    "LaunchReport",
    "MemoryFault",
    "Mutant",
    "NoPtx",
    "NotClean",
    "Options",
    "PtxSyntaxError",
    "Report",
    "RuntimeUnavailable",
    "Site",
    "Survey",
    "UnsupportedInstruction",
    "from_bf16",
    "from_e4m3",
    "mutate",
    "opcodes",
    "run",
    "survey",
    "to_bf16",
    "to_e4m3",
]
