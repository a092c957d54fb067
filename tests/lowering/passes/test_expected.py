"""Three rewritten graphs, to be read. ``python -m tests.lowering.passes.test_expected`` writes them anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.fx import GraphModule, Node

from tests.lowering.passes import attentions, latents
from tests.lowering.passes.graphs import rewrite, traced
from tests.lowering.passes.test_attention import written_cache

EXPECTED = Path(__file__).parent / "expected"


def _static_cache() -> GraphModule:
    q, k, v = attentions.inputs(1, 12)
    return traced(written_cache, q, k, v, torch.randn(attentions.B, attentions.H, 1, attentions.D), torch.tensor(5))


CASES: dict[str, Callable[[], GraphModule]] = {
    "decode_on_a_static_cache": _static_cache,
    "causal_prefill": lambda: traced(attentions.sdpa(is_causal=True), *attentions.inputs(70, 70, b=1)),
    "absorbed_decode": lambda: traced(latents.Layer(), *latents.inputs(1, 9)),
}


def text(graph: GraphModule) -> str:
    """A line for each node: its name, what it is, and how it is computed."""
    return "\n".join(_line(node) for node in graph.graph.nodes) + "\n"


def _line(node: Node) -> str:
    value = node.meta.get("val")
    kind = f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
    if node.op == "placeholder":
        return f"{node.name}: {kind}"
    target = str(node.target) if node.op != "call_function" else getattr(node.target, "__name__", str(node.target))
    operands = [str(argument) for argument in node.args] + [f"{name}={x}" for name, x in node.kwargs.items()]
    return f"{node.name}: {kind} = {target}({', '.join(operands)})"


def rewritten(name: str) -> str:
    graph = CASES[name]()
    rewrite(graph)
    return text(graph)


@pytest.mark.parametrize("name", CASES)
def test_graph_is_as_expected(name: str) -> None:
    assert rewritten(name) == (EXPECTED / f"{name}.txt").read_text()


if __name__ == "__main__":
    with torch.no_grad():
        for each in CASES:
            (EXPECTED / f"{each}.txt").write_text(rewritten(each))
