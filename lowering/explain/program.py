"""Reading what Inductor generated: the steps of the program, and the memory it takes."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch

Kind = Literal["kernel", "flashmla", "library"]

_STEP = re.compile(
    r"^\s+(?:\S+ = )?(?P<call>(?P<kernel>cpp_\w+)|extern_kernels\.(?P<extern>\w+)|torch\.ops\.(?P<op>[\w.]+))\(",
    re.MULTILINE,
)
_BUFFER = re.compile(
    r"^\s+(?P<name>buf\d+) = empty_strided_cpu\(\((?P<shape>[^)]*)\), \([^)]*\), torch\.(?P<dtype>\w+)\)", re.MULTILINE
)
#: A line that `read_programs` adds to a source, for a result that a library call allocates itself.
_RETURNED = re.compile(r"^# returned (?P<name>buf\d+): \[(?P<shape>[^\]]*)\] (?P<dtype>\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """One call that the program makes: a generated kernel, an operator of ours, or another library routine."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Buffer:
    """Memory that the program allocates for one or, one after another, several results."""

    name: str
    shape: str
    dtype: str

    @property
    def nbytes(self) -> int:
        """Its size; a dimension that is symbolic counts as 1."""
        sizes = [int(size) if size.strip().isdigit() else 1 for size in self.shape.split(",") if size.strip()]
        return math.prod(sizes) * int(getattr(torch, self.dtype).itemsize)


@dataclass(frozen=True)
class Program:
    """The calls and buffers of a model, in order; ``missed`` counts in-place writes that became copies."""

    steps: tuple[Step, ...]
    buffers: tuple[Buffer, ...]
    missed: int = 0
    missed_bytes: int = 0

    @property
    def kernels(self) -> int:
        return sum(step.kind == "kernel" for step in self.steps)

    @property
    def calls(self) -> int:
        return len(self.steps) - self.kernels

    @property
    def nbytes(self) -> int:
        """Bytes that it allocates in one run, memory that is used again counted once."""
        return sum(buffer.nbytes for buffer in self.buffers)

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


def buffers_of(source: str) -> Iterator[Buffer]:
    """Each buffer that a generated module allocates, and each result that a library call in it does."""
    for found in (*_BUFFER.finditer(_body(source)), *_RETURNED.finditer(source)):
        yield Buffer(found["name"], found["shape"].strip(", "), found["dtype"])


@contextlib.contextmanager
def read_programs() -> Iterator[list[str]]:
    """The source of every module that Inductor generates in the block."""
    from torch._inductor.graph import GraphLowering  # takes seconds, and compiling takes them anyway

    sources: list[str] = []
    with patch.object(GraphLowering, "save_output_code", lambda code: sources.append(code + _returned())):
        yield sources


def _returned() -> str:
    """A comment for each result that is allocated by who computes it, in the graph whose code was just generated."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    lines = [
        f"\n# returned {buffer.get_name()}: {list(buffer.get_size())} {str(buffer.get_dtype()).removeprefix('torch.')}"
        for buffer in V.graph.buffers
        if isinstance(buffer, (ir.MultiOutput, ir.ExternKernelAlloc)) and isinstance(buffer.layout, ir.Layout)
    ]
    return "".join(lines)
