"""The compilers that a program goes through: ours and torch's own, each whole or without code generation.

Without code generation the graph that Inductor would get is rewritten and then run operator by operator: it costs a
hundredth of a whole compilation, and shows everything that graph passes can do wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from lowering import backend, registration, session, versions
from lowering.passes import Decision
from tests.lowering.fuzz.program import Program

MODES = ("passes", "whole")


class Compiler:
    """Compiles programs in one mode, with our backend or, ``ours=False``, as torch does it alone."""

    def __init__(self, mode: str, *, ours: bool) -> None:
        self.mode, self.ours = mode, ours
        self.decisions: list[Decision] = []

    def compile(self, function: Callable[..., Any], program: Program) -> Callable[..., Any]:
        if program.traced and self.mode == "passes":
            return self._traced(function, program)

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
            build = self._whole if self.mode == "whole" else self._passes
            with versions.without_caches():
                return self._recorded(build, graph, inputs, program.options) if self.ours else build(graph, inputs, {})

        return torch.compile(function, backend=compile_graph, fullgraph=program.fullgraph, dynamic=program.dynamic)

    def _recorded(self, build: Callable[..., Any], *arguments: Any) -> Any:
        with session.recording() as recorded:
            try:
                return build(*arguments)
            finally:
                for record in (*recorded.rewrites, recorded.lowered):
                    self.decisions += record

    def _whole(self, graph: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Any:
        if self.ours:
            return backend.flashmla(graph, inputs, options=options)
        return versions.compile_fx(graph, inputs, {})

    def _rewrite(self, graph: torch.fx.GraphModule) -> None:
        """Run the passes. What they do not rewrite they leave as it was, node for node."""
        if not self.ours:
            return
        before = _nodes(graph)
        registration.RunPasses()(graph.graph)
        graph.recompile()
        current = session.session()
        assert current is not None
        if not any(decision.rewritten for decision in current.rewrites[-1]) and _nodes(graph) != before:
            raise AssertionError("a graph in which nothing was rewritten was changed")

    def _traced(self, function: Callable[..., Any], program: Program) -> Callable[..., Any]:
        """Without Dynamo and AOTAutograd, for what needs neither: a third of the time."""
        graphs: list[torch.fx.GraphModule] = []

        def build(*inputs: Any) -> None:
            functional = torch.func.functionalize(lambda *args: function(*args))
            with enable_python_dispatcher(), preserve_node_meta():
                trace = make_fx(functional, decomposition_table=select_decomp_table(), tracing_mode="fake")
                graphs.append(trace(*inputs))
            if self.ours:
                with registration.entered(backend.split_options(program.options)[0]):
                    self._rewrite(graphs[0])

        def call(*inputs: Any) -> Any:
            if not graphs:
                self._recorded(build, *inputs) if self.ours else build(*inputs)
            return graphs[0](*inputs)

        return call

    def _passes(self, graph: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Any:
        def run(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            return graph.forward

        def run_inference(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            self._rewrite(graph)
            return graph.forward

        def partition(joint: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            self._rewrite(joint)
            return default_partition(joint, *args, **kwargs)

        compile_graph = aot_autograd(
            fw_compiler=run,
            bw_compiler=run,
            inference_compiler=run_inference,
            partition_fn=partition,
            decompositions=select_decomp_table(),
        )
        if not self.ours:
            return compile_graph(graph, inputs)
        with registration.entered(backend.split_options(options)[0]):
            return compile_graph(graph, inputs)


def _nodes(graph: torch.fx.GraphModule) -> list[tuple[int, str]]:
    return [(id(node), node.format_node() or node.name) for node in graph.graph.nodes]
