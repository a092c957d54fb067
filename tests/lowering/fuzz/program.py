"""A program of the fuzzer: what makes its inputs, its steps, and how it is called; as data, and as Python that runs."""

from __future__ import annotations

import linecache
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import flashmla_ops  # noqa: F401 (defines torch.ops.flashmla)
from tests.lowering.fuzz import observers

NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*")

#: Settings of Dynamo under which sizes that depend on data do not break a graph.
CAPTURED = ("capture_scalar_outputs", "capture_dynamic_output_shape_ops")

#: Names that the code of programs may use beside its own variables.
NAMESPACE: dict[str, Any] = {"torch": torch, "F": F, "math": math}


@dataclass(frozen=True)
class Step:
    """``name = code``; without a name a statement; code that starts with ``def`` or ``class`` defines the name."""

    name: str
    code: str

    def render(self) -> list[str]:
        lines = self.code.split("\n")
        if self.name and not self.code.startswith("def "):
            lines[0] = f"{self.name} = {lines[0]}"
        return lines

    def reads(self) -> set[str]:
        return set(NAME.findall(self.code)) - ({self.name} if self.code.startswith("def ") else set())


@dataclass(frozen=True)
class Program:
    """``setup`` makes the inputs from the named sizes of a call; ``steps`` are what is compiled.

    ``family`` says what kind of program the generator meant it to be. ``marked`` are dimensions marked as dynamic.
    ``traced``: the passes may see the graph of a plain trace, instead of what Dynamo and AOTAutograd make.
    """

    family: str
    setup: tuple[Step, ...]
    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    calls: tuple[dict[str, int], ...]
    dynamic: bool | None = None
    marked: tuple[tuple[str, int], ...] = ()
    fullgraph: bool = True
    autocast: bool = False
    grad: bool = False
    traced: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Program:
        return replace(self, **changes)

    @property
    def sizes(self) -> list[str]:
        """The names of sizes that ``setup`` reads."""
        read = {name for step in self.setup for name in step.reads()}
        return [name for name in self.calls[0] if name in read]

    def arguments(self, call: int) -> dict[str, int]:
        """The sizes of a call, as ``setup`` takes them."""
        return {name: self.calls[call][name] for name in self.sizes}

    @property
    def text(self) -> str:
        return "\n".join(step.code for step in (*self.setup, *self.steps))

    @property
    def calls_ours(self) -> bool:
        return "ops.flashmla." in "\n".join(step.code for step in self.steps)

    def functions(self) -> list[str]:
        """The lines of ``setup`` and ``program``."""
        lines = [f"def setup({', '.join(['call', *self.sizes])}):", "    torch.manual_seed(call)"]
        for step in self.setup:
            lines += [f"    {line}" for line in step.render()]
        lines += [f"    return [{', '.join(self.inputs)}]", "", "", f"def program({', '.join(self.inputs)}):"]
        pad = "    "
        if self.autocast:
            lines.append('    with torch.autocast("cpu", dtype=torch.bfloat16):')
            pad = "        "
        for step in self.steps:
            lines += [pad + line for line in step.render()]
        return [*lines, f"{pad}return [{', '.join(self.outputs)}]"]

    def build(self) -> tuple[Callable[..., list[Any]], Callable[..., list[Any]]]:
        """The two functions, new ones at every call: Dynamo knows functions by their code."""
        source = "\n".join(self.functions())
        name = f"<program {id(source)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        scope = dict(NAMESPACE)
        exec(compile(source, name, "exec"), scope)
        return scope["setup"], scope["program"]

    def values(self) -> dict[str, Any]:
        """Every variable of the first call, as far as it runs."""
        setup, _ = self.build()
        scope = setup.__globals__
        scope.update(zip(self.inputs, setup(0, **self.arguments(0)), strict=True))
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            for step in self.steps:
                try:
                    exec("\n".join(step.render()), scope)
                except Exception:
                    break
        return scope

    def render(self) -> str:
        """The program as a file that runs on its own and shows what differs."""
        lines = ["import math", "import torch", "import torch.nn.functional as F", "import flashmla_ops", ""]
        lines += [f"torch._dynamo.config.{name} = True" for name in CAPTURED]
        if "ops.fuzz." in self.text:
            lines += [Path(observers.__file__).read_text(), ""]
        lines += [*self.functions(), "", f"calls = {[self.arguments(call) for call in range(len(self.calls))]}"]
        options = f", options={self.options}" if self.options else ""
        lines += [
            f'compiled = torch.compile(program, backend="flashmla", fullgraph={self.fullgraph}, '
            f"dynamic={self.dynamic}{options})",
            f"with torch.set_grad_enabled({self.grad}):",
            "    for call, sizes in enumerate(calls):",
            "        expected = program(*setup(call, **sizes))",
            "        inputs = setup(call, **sizes)",
        ]
        for name, dim in self.marked:
            lines.append(f"        torch._dynamo.mark_dynamic(inputs[{self.inputs.index(name)}], {dim})")
        lines += [
            "        for x, y in zip(compiled(*inputs), expected):",
            "            if isinstance(y, torch.Tensor):",
            "                print(x.shape, x.stride(), y.stride(), (x.double() - y.double()).abs().max())",
        ]
        return "\n".join(lines) + "\n"
