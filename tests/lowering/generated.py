"""The code that Inductor generates for a function, alone and under our backend, without compiling a line of it.

The graph is traced once and lowered twice. Lowering ends where the generated module would be loaded, which is what
takes a C++ compiler; the function itself runs eagerly.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch._inductor.graph import GraphLowering

from lowering import backend, registration, versions
from lowering.passes import Decision
from lowering.session import recording


class _Generated(BaseException):
    """The source of a module, instead of the module: no handler of the compiler takes it for a failure."""


@dataclass
class Generated:
    """For each graph of a function, the modules of stock Inductor and ours; and what we decided in all of them."""

    stock: list[str] = field(default_factory=list)
    ours: list[str] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def fired(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.rewritten]


def generate(function: Callable[..., Any], *args: Any, dynamic: bool | None = None, **kwargs: Any) -> Generated:
    """Trace ``function`` for these inputs and generate code for each of its graphs, both ways."""
    found = Generated()

    def compile_both(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        stock = versions.inductor_options(None, {})
        found.stock.append(_source(lambda g: versions.compile_fx(g, inputs, stock), graph))
        with recording() as collected:
            found.ours.append(_source(lambda g: backend.flashmla(g, inputs), graph))
        found.decisions += [decision for record in collected.rewrites for decision in record]
        found.decisions += collected.lowered
        return graph.forward

    registration.install()
    torch._dynamo.reset()
    torch.compile(function, backend=compile_both, dynamic=dynamic)(*args, **kwargs)
    return found


def _source(compile_graph: Callable[[torch.fx.GraphModule], object], graph: torch.fx.GraphModule) -> str:
    with versions.without_caches(), _stopped():
        try:
            compile_graph(copy.deepcopy(graph))
        except _Generated as generated:
            return str(generated).partition("\n")[2]  # the first line is the number of the compilation
    return ""  # nothing to compute


@contextlib.contextmanager
def _stopped() -> Iterator[None]:
    def stop(code: str) -> None:
        raise _Generated(code)

    with patch.object(GraphLowering, "save_output_code", stop):
        yield
