"""How the backend changes a model: `explain` compiles it with Inductor alone and with our backend, and compares."""

from __future__ import annotations

import copy
import inspect
import itertools
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from tabulate import tabulate
from torch._dynamo.utils import ReinplaceCounters, counters

from lowering import backend, registration, versions
from lowering.explain.figure import draw
from lowering.explain.program import Program, read_programs
from lowering.explain.undisturbed import undisturbed
from lowering.passes import Decision
from lowering.session import recording

_names = itertools.count()


@dataclass(frozen=True)
class Explanation:
    """The comparison. Print it, or write `svg` to a file.

    ``before`` is the model under Inductor alone, ``after`` under the `flashmla` backend. ``rewrites`` are what the
    graph passes decided, ``lowered`` what the lowerings decided; each names the place and, where nothing was done, the
    reason. ``breaks`` are the reasons of graph breaks.
    """

    graphs: int
    compilations: int
    breaks: tuple[str, ...]
    rewrites: tuple[Decision, ...]
    lowered: tuple[Decision, ...]
    before: Program
    after: Program

    def __str__(self) -> str:
        lines = [
            f"graphs          {self.graphs}, breaks {len(self.breaks)}, compilations {self.compilations}",
            *(f"  break: {reason}" for reason in self.breaks),
            tabulate(self._rows(), ("", "Inductor", "flashmla"), tablefmt="plain"),
        ]
        lines.append("graph passes" + ("" if self.rewrites else "    nothing to rewrite"))
        lines += [f"  {decision}" for decision in self.rewrites]
        lines.append("lowerings" + ("" if self.lowered else "       no operator of ours"))
        lines += [f"  {decision}" for decision in self.lowered]
        return "\n".join(lines)

    def svg(self) -> str:
        """The steps before and after, side by side, as a picture."""
        return draw(self.before, self.after, self._rows())

    def _rows(self) -> list[tuple[str, int, int]]:
        return [(label, value(self.before), value(self.after)) for label, value in ROWS]


#: The numbers by which the two programs are compared.
ROWS: tuple[tuple[str, Callable[[Program], int]], ...] = (
    ("kernels", lambda p: p.kernels),
    ("library calls", lambda p: p.calls),
    ("buffers", lambda p: len(p.buffers)),
    ("bytes", lambda p: p.nbytes),
    ("cache copies", lambda p: p.missed),
    ("bytes copied", lambda p: p.missed_bytes),
)


@dataclass
class _Watch:
    """A backend that passes on to another and counts."""

    compile: Callable[..., Any]
    compilations: int = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.compilations += 1
        return self.compile(graph, inputs)  # type: ignore[no-any-return]


def explain(model: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Explanation:
    """Compile ``model`` for these inputs and say what became of it.

    The model runs twice on deep copies of the inputs and of its buffers, under `torch.no_grad` and without torch's
    compilation caches; it, the inputs, the random numbers to come and what the process has compiled stay as they are.
    ``options`` as for ``torch.compile(backend="flashmla")``.
    """
    before, _ = _compiled(model, args, kwargs, lambda g, x: versions.compile_fx(g, x, _inductor_only(options)))
    registration.install()
    with recording() as session:
        after, facts = _compiled(model, args, kwargs, lambda g, x: backend.flashmla(g, x, options=options))
    names = {f"args[{i}]": name for i, name in enumerate(_parameters(model))}
    return Explanation(
        **facts,
        rewrites=tuple(_renamed(decision, names) for record in session.rewrites for decision in record),
        lowered=tuple(session.lowered),
        before=before,
        after=after,
    )


def _parameters(model: Callable[..., Any]) -> list[str]:
    """The names of the model's positional arguments, as far as they have any."""
    function = model.forward if isinstance(model, torch.nn.Module) else model
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _renamed(decision: Decision, names: dict[str, str]) -> Decision:
    def said(text: str) -> str:
        return re.sub(r"\bargs\[\d+\]", lambda found: names.get(found.group(), found.group()), text)

    return replace(decision, pattern=said(decision.pattern), reason=said(decision.reason))


def _inductor_only(options: dict[str, Any] | None) -> dict[str, Any]:
    return versions.inductor_options(None, backend.split_options(options)[1])


def _compiled(
    model: Callable[..., Any], args: Any, kwargs: Any, compile_graph: Callable[..., Any]
) -> tuple[Program, dict[str, Any]]:
    """Run the model once, compiled; its generated program, and what Dynamo counted."""
    watch = _Watch(compile_graph)
    args, kwargs = copy.deepcopy((args, kwargs))
    missed, missed_bytes = ReinplaceCounters.get_total_missed(), ReinplaceCounters.get_total_missed_bytes()
    seen = dict(counters["graph_break"])
    with undisturbed(model), versions.without_caches(), read_programs() as programs, torch.no_grad():
        torch.compile(_fresh(model), backend=watch)(*args, **kwargs)
    program = Program.joined(
        programs,
        missed=ReinplaceCounters.get_total_missed() - missed,
        missed_bytes=ReinplaceCounters.get_total_missed_bytes() - missed_bytes,
    )
    breaks = [reason for reason, n in counters["graph_break"].items() if n > seen.get(reason, 0)]
    return program, {"graphs": len(programs), "compilations": watch.compilations, "breaks": tuple(breaks)}


def _fresh(model: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Dynamo has never seen: it caches by code object."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    code = run.__code__.replace(co_name=f"explained_{next(_names)}")
    return types.FunctionType(code, run.__globals__, code.co_name, None, run.__closure__)
