"""Compiling with the backend under test, and looking at what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lowering import backend, versions
from lowering.explain.program import Program, read_programs


@dataclass
class Compiled:
    """``function`` compiled by the `flashmla` backend, uncached; ``sources`` are the modules generated so far."""

    function: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None
    compilations: int = 0
    sources: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._compiled = torch.compile(self.function, backend=self._backend, fullgraph=True, dynamic=self.dynamic)

    def _backend(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        with versions.without_caches(), read_programs() as sources:
            compiled = backend.flashmla(graph, inputs, options=self.options)
        self.sources += sources
        return compiled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    @property
    def program(self) -> Program:
        """The one generated program."""
        (source,) = self.sources
        return Program.joined([source])
