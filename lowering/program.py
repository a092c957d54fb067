"""Reading what Inductor generated: the steps of the program, and the memory it takes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

Kind = Literal["kernel", "flashmla", "library"]

_STEP = re.compile(
    r"^\s+(?:\S+ = )?(?P<call>(?P<kernel>cpp_\w+)|extern_kernels\.(?P<extern>\w+)|torch\.ops\.(?P<op>[\w.]+))\(",
    re.MULTILINE,
)
_BUFFER = re.compile(r"^\s+(?P<name>buf\d+) = empty_strided_cpu\(\((?P<shape>[^)]*)\)", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One call that the program makes: a generated kernel, an operator of ours, or another library routine."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Program:
    """The calls and buffers of a model, in order; ``missed`` counts in-place writes that became copies."""

    steps: tuple[Step, ...]
    buffers: tuple[tuple[str, str], ...]
    missed: int = 0
    missed_bytes: int = 0

    @property
    def kernels(self) -> int:
        return sum(step.kind == "kernel" for step in self.steps)

    @property
    def calls(self) -> int:
        return len(self.steps) - self.kernels

    @staticmethod
    def joined(sources: list[str], *, missed: int = 0, missed_bytes: int = 0) -> Program:
        steps = tuple(step for source in sources for step in steps_of(source))
        return Program(steps, tuple(b for source in sources for b in buffers_of(source)), missed, missed_bytes)


def _body(source: str) -> str:
    """The function that runs the kernels, without their sources."""
    start = source.find("def call(self, args):")
    return source[start : source.find("\nrunner = ", start)] if start >= 0 else ""


def steps_of(source: str) -> Iterator[Step]:
    """The calls in a generated Python module, in order."""
    for found in _STEP.finditer(_body(source)):
        if found["kernel"]:
            yield Step("kernel", found["kernel"])
            continue
        name = found["op"] or found["extern"]
        yield Step("flashmla" if name.startswith("flashmla") else "library", name)


def buffers_of(source: str) -> Iterator[tuple[str, str]]:
    """Name and shape of each buffer that a generated module allocates."""
    for found in _BUFFER.finditer(_body(source)):
        yield found["name"], found["shape"].strip(", ")


@contextlib.contextmanager
def read_programs() -> Iterator[list[str]]:
    """The source of every module that Inductor generates in the block."""
    from torch._inductor.graph import GraphLowering  # takes seconds, and compiling takes them anyway

    sources: list[str] = []
    with patch.object(GraphLowering, "save_output_code", sources.append):
        yield sources
