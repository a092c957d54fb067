"""Graphs as the passes see them: functional, in ATen operators, decomposed as Inductor does it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._guards import detect_fake_mode
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils._pytree import tree_leaves, tree_map_only

from lowering.passes import Record, run_passes
from lowering.passes.strides import same_strides
from lowering.settings import Settings

Function = Callable[..., Any]


def traced(function: Function, *inputs: Tensor, mode: str = "fake") -> torch.fx.GraphModule:
    """The graph of a function of tensors. Sizes are constants, or all symbolic with ``mode="symbolic"``."""
    with enable_python_dispatcher(), preserve_node_meta():
        functional = torch.func.functionalize(lambda *args: function(*args))
        return make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode=mode)(*inputs)


#: Products around attention stay as they are: `test_products` is about that.
ATTENTION_ALONE = Settings(gemm=False)


def rewrite(graph: torch.fx.GraphModule, settings: Settings = ATTENTION_ALONE) -> Record:
    """Run the passes as the backend does."""
    wanted = [value for value in _outputs(graph) if isinstance(value, Tensor)]
    record = run_passes(graph.graph, settings)
    graph.recompile()
    for node in graph.graph.nodes:
        check_metadata(node)
    for before, after in zip(wanted, [x for x in _outputs(graph) if isinstance(x, Tensor)], strict=True):
        assert same_strides(before, after), (before, after)
    return record


def _outputs(graph: torch.fx.GraphModule) -> list[Any]:
    (returned,) = graph.graph.output_node().args
    return [node.meta.get("val") for node in tree_leaves(returned) if isinstance(node, torch.fx.Node)]


def check_metadata(node: torch.fx.Node) -> None:
    """Check that a node's metadata are what it computes from those of its inputs."""
    if (
        not isinstance(node.target, torch._ops.OpOverload)
        or "val" not in node.meta
        or node.meta.get("unbacked_bindings")
    ):
        return
    args, kwargs = tree_map_only(torch.fx.Node, lambda n: n.meta["val"], (node.args, node.kwargs))
    mode = detect_fake_mode(tree_leaves((args, kwargs, node.meta["val"])))
    with mode if mode is not None else contextlib.nullcontext():
        computed = node.target(*args, **kwargs)
    said = node.meta["val"]
    for one, other in zip(tree_leaves(said), tree_leaves(computed), strict=True):
        if isinstance(one, Tensor):
            assert (one.dtype, one.device, list(one.shape)) == (other.dtype, other.device, list(other.shape)), node
    assert same_strides(said, computed), (node.format_node(), said, computed)
    if "eager_input_vals" in node.meta:
        given = zip(tree_leaves(node.meta["eager_input_vals"]), tree_leaves((args, kwargs)), strict=True)
        assert all(one is None or not isinstance(one, Tensor) or same_strides(one, other) for one, other in given), node


def operators(graph: torch.fx.GraphModule) -> list[str]:
    """The operators of ours that a graph calls."""
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    return [target.removeprefix("flashmla.").removesuffix(".default") for target in targets if "flashmla" in target]


@dataclass
class Rewritten:
    """``function`` compiled with the passes alone: its rewritten graphs run operator by operator."""

    function: Function
    settings: Settings = ATTENTION_ALONE
    graphs: list[torch.fx.GraphModule] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        backend = aot_autograd(
            fw_compiler=self._compile, inference_compiler=self._compile, decompositions=select_decomp_table()
        )
        self._compiled = torch.compile(self.function, backend=backend, fullgraph=True)

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Function:
        self.records.append(rewrite(graph, self.settings))
        self.graphs.append(graph)
        return graph.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    @property
    def refusals(self) -> list[str]:
        return [str(decision) for record in self.records for decision in record if not decision.rewritten]


def dynamic_lengths(*tensors: Tensor) -> None:
    """Let the compiler take the sizes of dimension 2, the tokens of ``[b, h, s, d]``, for variables."""
    for x in tensors:
        torch._dynamo.mark_dynamic(x, 2)


def assert_equal_to(actual: Tensor, expected: Tensor, *, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)
