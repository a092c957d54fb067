"""A pass changes a graph as a whole or not at all, and one that fails does not keep a model from compiling."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from flashmla_ops.errors import ArgumentError
from lowering.passes import PASSES, Record, run_passes
from lowering.passes.attempt import INTERNAL, attempt
from lowering.passes.graph import aten
from lowering.passes.writer import Writer
from lowering.record import Refusal
from lowering.settings import Settings
from tests.lowering.passes.attentions import inputs, sdpa
from tests.lowering.passes.graphs import operators, traced


def program(x: Tensor) -> Tensor:
    return x.exp().clone() + x[:]


def nodes(graph: GraphModule) -> list[tuple[object, ...]]:
    return [(id(node), node.name, str(node.target), node.args, str(node.kwargs)) for node in graph.graph.nodes]


def given() -> GraphModule:
    """With a dead node and views that do nothing."""
    graph = traced(program, torch.ones(3, 4))
    last = graph.graph.output_node()
    with graph.graph.inserting_before(last):
        dead = graph.graph.call_function(aten.neg.default, (last.all_input_nodes[0],))
        dead.meta["val"] = last.all_input_nodes[0].meta["val"]
    return graph


def negate_all(graph: Graph, record: Record, after: Exception | None = None, before: Exception | None = None) -> None:
    """A rewrite ``exp(x) -> exp(-x)`` that may fail before or after it changes what is read."""
    writer = Writer(graph)

    def serve(node: torch.fx.Node) -> str:
        writer.before = node
        new = writer.call(aten.exp.default, writer.call(aten.neg.default, node.args[0]))
        if before is not None:
            raise before
        writer.replace(node, new)
        if after is not None:
            raise after  # nobody does; it cannot be undone but as a whole
        return "exp -> neg"

    for node in graph.find_nodes(op="call_function", target=aten.exp.default):
        attempt(writer, record, "exp", node, partial(serve, node))


def test_a_graph_without_a_rewrite_is_the_very_same() -> None:
    graph = given()
    before = nodes(graph)
    record = run_passes(graph.graph, Settings())
    assert not list(record)
    assert nodes(graph) == before


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Refusal("no"), "no"),
        (ArgumentError("gemm", "a", "2 dimensions", 3), "flashmla::gemm: argument 'a': expected 2 dimensions, got 3"),
        (KeyError("val"), f"{INTERNAL}: KeyError: 'val'"),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.usefixtures("tolerated")
def test_what_fails_leaves_the_graph_as_it_was(
    error: Exception, reason: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lowering.passes.run.PASSES", [partial(negate_all, **{when: error})])
    graph = given()
    before = nodes(graph)
    (decision,) = run_passes(graph.graph, Settings())
    assert not decision.rewritten
    assert (reason if when == "before" else f"{INTERNAL}: {type(error).__name__}") in decision.reason
    assert nodes(graph) == before


@pytest.mark.usefixtures("tolerated")
def test_a_pass_that_fails_leaves_what_the_others_did(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: Graph, record: Record) -> None:
        negate_all(graph, record)
        raise ZeroDivisionError

    monkeypatch.setattr("lowering.passes.run.PASSES", [negate_all, fails])
    graph = given()
    record = run_passes(graph.graph, Settings())
    assert [decision.rewritten for decision in record] == [True, False]
    graph.recompile()
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph(x), (-x).exp() + x)


def test_nodes_that_stay_keep_their_names_and_places() -> None:
    graph = traced(lambda q, k, v: (q.sin(), sdpa()(q, k, v).sin(), k.cos()), *inputs(5, 9))
    before = [node.name for node in graph.graph.nodes]
    run_passes(graph.graph, Settings())
    after = [node.name for node in graph.graph.nodes if node.name in before]
    assert operators(graph) == ["decode"]
    assert after == [name for name in before if name in after]
    assert {"sin", "sin_1", "cos"} <= set(after)


def test_the_list_of_passes_is_the_one_that_runs() -> None:
    from lowering.passes import run

    assert run.PASSES is PASSES
