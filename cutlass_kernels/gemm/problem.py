"""A kernel is chosen by two things: the product, and the device that computes it."""

from __future__ import annotations

from dataclasses import dataclass, field

from cutlass_kernels.gemm.epilogue import Epilogue


@dataclass(frozen=True)
class Device:
    """The device that kernels are chosen for. ``shared_memory``: the bytes that one block may use."""

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    def runs(self, arch: str) -> bool:
        """sm_90a is machine code for 9.0 alone; sm_80 comes with PTX, which every newer device translates."""
        return self.capability == (9, 0) if arch == "sm_90a" else self.capability >= (8, 0)


@dataclass(frozen=True)
class Problem:
    """A product without its addresses. Types in the short names of `config`."""

    m: int
    n: int
    k: int
    a: str
    weight: str
    d: str
    family: str = "linear"
    batch: int = 1
    epilogue: Epilogue = field(default_factory=Epilogue)
