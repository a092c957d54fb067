"""One case of one kernel in the emulator: operands to device memory, the call of the C ABI, the result back."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels import emulator
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.gemm import abi
from cutlass_kernels.gemm.abi import Call, GemmCall, GroupedGemmCall
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.verify.problem import Problem

Array = NDArray[Any]
Result = TypeVar("Result")
#: The byte between rows of strided operands, and of d: a NaN in every floating format, and 127 in s8.
PADDING = 0x7F


@dataclass(frozen=True)
class Outcome:
    """A case under one timing of asynchronous work. ``error_over_bound`` above 1 is a wrong result."""

    mismatches: int
    error_over_bound: float
    hazards: tuple[str, ...]
    steps: int
    seconds: float
    counters: dict[str, Any]

    @property
    def good(self) -> bool:
        return self.mismatches == 0 and not self.hazards


class Allocation(Protocol):
    """An array in device memory: its address, and its elements once all work on it is done."""

    @property
    def pointer(self) -> int: ...

    def numpy(self) -> Array: ...


class DeviceMemory(Protocol):
    """A device's memory: the emulator's, or a real one's."""

    def array(self, values: Array) -> Allocation: ...

    def empty(self, size: int) -> Allocation: ...


class Place:
    """An operand in device memory, its rows padded where the case is strided."""

    def __init__(self, device: DeviceMemory, values: Array, padding: int) -> None:
        self.shape = values.shape
        self.row = values.shape[-1] + padding
        wide = np.full((*values.shape[:-1], self.row), PADDING, np.uint8).repeat(values.itemsize, axis=-1)
        self.wide = np.ascontiguousarray(wide).view(values.dtype).reshape(*values.shape[:-1], self.row)
        self.wide[..., : values.shape[-1]] = values
        self.array = device.array(self.wide)

    @property
    def pointer(self) -> int:
        return self.array.pointer

    @property
    def strides(self) -> tuple[int, int]:
        """Row, then batch; the one row of a bias repeats itself."""
        rows = self.shape[-2]
        return (self.row if rows > 1 else 0, self.row * rows)


def execute(built: Built, problem: Problem, options: emulator.Options) -> Outcome:
    """Run a case. Raises `EmulatorError` for what the emulator cannot do or a device would not survive."""

    def call(device: emulator.Device, library: ctypes.CDLL) -> Array:
        return in_a_thread(lambda: launch(device, abi.Kernel(built.config, library), problem))

    report = emulator.run(built.library, call, arch=built.config.arch, options=options)
    mismatches, ratio = problem.mismatches(report.result)
    return Outcome(
        mismatches,
        ratio,
        tuple(str(hazard) for hazard in report.hazards if not is_past_the_edge(problem, hazard)),
        sum(launch.steps for launch in report.launches),
        round(sum(launch.seconds for launch in report.launches), 3),
        _counters(report.launches),
    )


def in_a_thread(function: Callable[[], Result]) -> Result:
    """Call it in a thread of its own: CUTLASS 2.x sets up a device once a thread, and each run has a new device."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function).result()


def is_past_the_edge(problem: Problem, hazard: emulator.Hazard) -> bool:
    """Whether a hazard concerns a sum past the edge of d, which is never stored there.

    CUTLASS's sm_80 mainloop neither copies nor clears rows past the last one of an operand, and computes with them. Two
    uses of such sums are seen: gelu's erf branches on them, and stream-K hands them on through its workspace. The
    emulator fills memory that nobody wrote with NaN, so right results beside them are the proof that nothing spreads.
    """
    config, case = problem.config, problem.case
    outside = case.n % config.tile[1] != 0 or case.m % config.tile[0] != 0
    branch = config.epilogue.activation == "gelu" and " bra " in hazard.text
    handed_on = config.stream_k and hazard.text.strip().startswith("st.global.v4.f32")
    unwritten = hazard.kind == "uninitialised" and config.arch == "sm_80"
    return unwritten and outside and (branch or handed_on)


def launch(device: DeviceMemory, kernel: abi.Kernel, problem: Problem) -> Array:
    """The result, as stored; [batch, m, n]. Raises `CallError` if the kernel refuses, and on a write between rows."""
    config, case = problem.config, problem.case
    step = {name: config.alignment(name) for name in ("a", "weight", "d")} | {"c": config.alignment("d")}
    matrices = {"a", "weight", "c"}
    places = {
        name: Place(device, values, step[name] if case.strided and name in matrices else 0)
        for name, values in problem.operands.items()
    }
    shape = problem.expected.shape
    canary = np.full(shape, PADDING, np.uint8).repeat(problem.stored_bytes, axis=-1).view(problem.stored_type)
    d = Place(device, canary, step["d"] if case.strided else 0)
    if config.family == "grouped":
        offsets = device.array(np.array(case.offsets or np.cumsum((0, *case.groups)), np.int32))
        call: Call = _grouped_call(problem, places, d, offsets.pointer)
    else:
        call = _gemm_call(problem, places, d)
    needed = kernel.workspace(call)
    if needed:
        workspace = device.empty(needed)
        call.workspace, call.workspace_bytes = workspace.pointer, needed
    kernel.run(call, 0)
    result = d.array.numpy()
    if result[..., shape[-1] :].tobytes() != d.wide[..., shape[-1] :].tobytes():  # bytes: the padding is NaN
        raise emulator.MemoryFault(f"{config.name}, {case}: wrote between the rows of d")
    return result[..., : shape[-1]]


def _gemm_call(problem: Problem, places: dict[str, Place], d: Place) -> GemmCall:
    case = problem.case
    call = GemmCall(case.m, case.n, case.k, case.batch, alpha=problem.alpha, beta=problem.beta, splits=case.splits)
    call.sm_count = case.sm_count
    for name, place in (*places.items(), ("d", d)):
        setattr(call, name, place.pointer)
        if hasattr(call, f"{name}_stride"):
            getattr(call, f"{name}_stride")[:] = _strides(problem.config, name, place, case.m)
    return call


def _strides(config: GemmConfig, name: str, place: Place, m: int) -> tuple[int, int]:
    row, batch = place.strides
    # One row needs no stride to the next, but it has one: only a bias in the place of c repeats itself.
    return (place.row if name != "c" or m == 1 else row, batch)


def _grouped_call(problem: Problem, places: dict[str, Place], d: Place, offsets: int) -> GroupedGemmCall:
    case = problem.case
    call = GroupedGemmCall(len(case.groups), case.m, case.n, case.k, alpha=problem.alpha, offsets=offsets)
    call.sm_count = case.sm_count
    call.a, call.weight, call.d = places["a"].pointer, places["weight"].pointer, d.pointer
    call.a_stride, call.d_stride = places["a"].row, d.row
    call.weight_stride[:] = (places["weight"].row, places["weight"].strides[1])
    return call


def _counters(launches: tuple[emulator.LaunchReport, ...]) -> dict[str, Any]:
    """The costs of all launches that no machine changes."""
    names = (
        "global_bytes_read",
        "global_bytes_written",
        "global_sectors_read",
        "global_sectors_written",
        "shared_wavefronts",
        "shared_ideal",
        "async_bytes",
        "mma",
    )
    found: dict[str, Any] = {name: sum(getattr(launch.counters, name) for launch in launches) for name in names}
    found["instructions"] = sum(launch.counters.instructions.total() for launch in launches)
    return found
