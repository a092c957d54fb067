"""A device that is emulated: its memory, the launches on it, and their reports."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cutlass_kernels.emulator.errors import LaunchError
from cutlass_kernels.emulator.machine.geometry import Geometry, Triple, volume
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.memory import Heap
from cutlass_kernels.emulator.machine.scheduler import WARP
from cutlass_kernels.emulator.options import Options, Site
from cutlass_kernels.emulator.program import Program
from cutlass_kernels.emulator.ptx.parser import parse
from cutlass_kernels.emulator.ptx.syntax import Module
from cutlass_kernels.emulator.report import Counters, Hazard, LaunchReport


@dataclass(frozen=True)
class Model:
    """The limits of an architecture for a launch (CUDA C++ programming guide, "Technical Specifications")."""

    major: int
    minor: int
    sm_count: int
    shared_per_block: int
    shared_per_sm: int
    cluster_limit: int = 1
    threads_per_sm: int = 2048

    def resident(self, shared: int, threads: int) -> int:
        """How many blocks a multiprocessor holds: two if they fit. More would only show what two show."""
        return 2 if 2 * shared <= self.shared_per_sm and 2 * threads <= self.threads_per_sm else 1


MODELS = {
    "sm_80": Model(8, 0, 108, 166_912, 167_936),
    "sm_86": Model(8, 6, 84, 101_376, 102_400, threads_per_sm=1536),
    "sm_89": Model(8, 9, 128, 101_376, 102_400, threads_per_sm=1536),
    "sm_90": Model(9, 0, 132, 232_448, 233_472, cluster_limit=16),
    "sm_90a": Model(9, 0, 132, 232_448, 233_472, cluster_limit=16),
}


@lru_cache(maxsize=32)
def _parsed(text: str) -> Module:
    return parse(text)


@lru_cache(maxsize=64)
def _translated(text: str, name: str, drop: frozenset[Site]) -> Program:
    """Programs hold nothing of a device, so that launches on any of them share one."""
    module = _parsed(text)
    return Program(module.kernels[name], module, drop)


class DeviceArray:
    """Device memory of a shape and type. ``pointer`` is its address, ``bytes`` its size."""

    def __init__(self, heap: Heap, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype, self._heap = shape, dtype, heap
        self.bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.pointer = heap.allocate(max(self.bytes, 1))

    @property
    def _offset(self) -> int:
        return self._heap.offset(self.pointer)

    def numpy(self) -> NDArray[Any]:
        """A copy of what the memory holds now."""
        raw = self._heap.memory.data[self._offset : self._offset + self.bytes]
        return raw.copy().view(self.dtype).reshape(self.shape)

    def fill(self, values: ArrayLike) -> None:
        """Write ``values``, broadcast to the shape, and count the memory as written."""
        full = np.broadcast_to(np.asarray(values, self.dtype), self.shape)
        self._heap.memory.write_bytes(self._offset, np.frombuffer(np.ascontiguousarray(full).tobytes(), np.uint8))


class Device:
    """``memory`` bytes and an architecture of `MODELS`. Kernels come from `load_ptx`; launches are reported in
    order."""

    def __init__(self, arch: str = "sm_80", options: Options | None = None, memory: int = 1 << 26) -> None:
        if arch not in MODELS:
            raise LaunchError(f"an architecture of {', '.join(MODELS)} is expected, got {arch}")
        self.arch, self.model, self.options = arch, MODELS[arch], options or Options()
        self.heap = Heap(memory)
        self.launches: list[LaunchReport] = []
        self._kernels: dict[str, Module] = {}
        self._symbols: dict[int, dict[str, int]] = {}

    # Memory

    def array(self, values: ArrayLike) -> DeviceArray:
        """Device memory with a copy of ``values``."""
        host = np.asarray(values)
        made = self.empty(host.shape, host.dtype)
        made.fill(host)
        return made

    def empty(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.uint8) -> DeviceArray:
        """Device memory that was never written: a kernel that reads it commits a hazard."""
        return DeviceArray(self.heap, (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype))

    def zeros(self, shape: int | tuple[int, ...], dtype: DTypeLike = np.uint8) -> DeviceArray:
        """Device memory of zeros."""
        made = self.empty(shape, dtype)
        made.fill(0)
        return made

    # Kernels

    def load_ptx(self, text: str) -> list[str]:
        """Make the kernels of a PTX module known; returns their names."""
        module = _parsed(text)
        symbols = {}
        for variable in module.variables.values():
            if variable.space in ("global", "const"):
                symbols[variable.name] = self.heap.allocate(max(variable.size, 1), max(variable.align, 16))
                start = self.heap.offset(symbols[variable.name])
                content = variable.initial.ljust(variable.size, b"\0")
                self.heap.memory.write_bytes(start, np.frombuffer(content, np.uint8))
        self._symbols[id(module)] = symbols
        for name in module.kernels:
            self._kernels[name] = module
        return list(module.kernels)

    def program(self, name: str) -> Program:
        """A kernel, translated. Raises `LaunchError` for a name that no loaded module has."""
        if name not in self._kernels:
            raise LaunchError(f"no loaded PTX has a kernel {name}")
        drop = frozenset(site for site in self.options.drop if site.kernel == name)
        return _translated(self._kernels[name].text, name, drop)

    def launch(
        self,
        name: str,
        grid: Triple,
        block: Triple,
        parameters: bytes,
        dynamic_shared: int = 0,
        cluster: Triple | None = None,
    ) -> LaunchReport:
        """Run a kernel to its end. ``parameters``: its parameter block as bytes. Raises `EmulatorError`."""
        started = time.perf_counter()
        program = self.program(name)
        cluster = program.kernel.cluster or cluster or (1, 1, 1)
        self._check(program, grid, block, cluster, dynamic_shared, parameters)
        counters, hazards, sites, steps = Counters(), Counter[tuple[str, str, int, str]](), set[Site](), 0
        shared = program.layout.shared_bytes(dynamic_shared)
        at_once = max(self.model.sm_count // volume(cluster), 1) * volume(cluster)
        at_once *= self.model.resident(shared, volume(block))
        symbols = self._symbols[id(self._kernels[name])]
        for first in range(0, volume(grid), at_once):
            ctas = min(at_once, volume(grid) - first)
            geometry = Geometry(grid, block, cluster, dynamic_shared, first, ctas, self.model.sm_count)
            machine = Machine(program, geometry, self.heap, symbols, parameters, self.options)
            machine.run()
            machine.counters.instructions = program.count(machine)
            _add(counters, machine.counters)
            for found in machine.hazards.found():
                hazards[found.kind, found.detail, found.line, found.text] += found.count
            sites |= machine.sites
            steps += machine.scheduler.steps
        report = LaunchReport(
            name,
            grid,
            block,
            cluster,
            shared,
            tuple(Hazard(*key, count) for key, count in hazards.items()),
            counters,
            tuple(sorted(sites)),
            steps,
            time.perf_counter() - started,
        )
        self.launches.append(report)
        return report

    def _check(
        self, program: Program, grid: Triple, block: Triple, cluster: Triple, dynamic_shared: int, parameters: bytes
    ) -> None:
        kernel, shared = program.kernel, program.layout.shared_bytes(dynamic_shared)
        most = kernel.max_threads
        rules = (
            (min(*grid, *block, *cluster) > 0, f"a grid {grid} and block {block} without zeros"),
            (volume(block) <= 1024 and block[2] <= 64, f"a block of at most 1024 threads, got {block}"),
            (volume(block) % WARP == 0, f"a multiple of 32 threads (others are not modelled), got {block}"),
            (most is None or volume(block) <= volume(most), f"at most {most} threads (.maxntid), got {block}"),
            (grid[0] < 1 << 31 and max(grid[1:]) < 1 << 16, f"a grid within the limits, got {grid}"),
            (
                shared <= self.model.shared_per_block,
                f"{self.model.shared_per_block} bytes of shared memory, got {shared}",
            ),
            (volume(cluster) <= self.model.cluster_limit, f"clusters of {self.model.cluster_limit}, got {cluster}"),
            (all(g % c == 0 for g, c in zip(grid, cluster, strict=True)), f"a grid {grid} of whole clusters {cluster}"),
            (
                len(parameters) == kernel.parameter_bytes,
                f"{kernel.parameter_bytes} bytes of parameters, got {len(parameters)}",
            ),
        )
        for holds, wanted in rules:
            if not holds:
                raise LaunchError(f"launch of {kernel.name} on {self.arch}: expected {wanted}")


def _add(total: Counters, part: Counters) -> None:
    for each in fields(Counters):
        setattr(total, each.name, getattr(total, each.name) + getattr(part, each.name))
