"""Run the passes so that a graph is changed as a whole and rightly, or not at all.

Passes work on copies. A copy that a pass rewrote becomes what the next pass sees, one without a rewrite or whose pass
failed is thrown away, and at the end the graph is made equal to the last copy, node by node. So a graph in which
nothing was rewritten is the very same afterwards: its nodes, their order, and what nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch.fx import Graph, Node, map_arg

from lowering import versions
from lowering.names import names_of_inputs
from lowering.passes.absorb import absorb_latents
from lowering.passes.attempt import internal_error
from lowering.passes.attend import rewrite_attention
from lowering.passes.complexes import write_out_complex
from lowering.passes.products import serve_products
from lowering.passes.queries import join_queries
from lowering.passes.up import form_decode_up
from lowering.record import Record
from lowering.settings import Settings

GraphPass = Callable[[Graph, Record], None]

#: In the order in which they run.
PASSES: list[GraphPass] = [
    write_out_complex,
    absorb_latents,
    rewrite_attention,
    form_decode_up,
    serve_products,
    join_queries,
]

#: A copied node, and the node of the user's graph that it stands for.
Origins = dict[Node, Node]


def run_passes(graph: Graph, settings: Settings, names: Sequence[str] = ()) -> Record:
    """Run `PASSES` on a graph; what they rewrote and refused. A pass that fails is as if it had not run.

    ``names``: what the user calls the flat inputs.
    """
    record = Record(settings, names=names_of_inputs(graph, names))
    current, origins = _copied(graph, {node: node for node in graph.nodes})
    versions.remove_noop_ops(current)
    current.eliminate_dead_code()
    for each in PASSES:
        trial, trial_origins = _copied(current, origins)
        decided = len(record)
        try:
            each(trial, record)
            trial.eliminate_dead_code()
            trial.lint()
        except Exception as error:  # whatever is wrong with a pass, the model compiles without it
            del record.decisions[decided:]
            record.refused(getattr(each, "__name__", repr(each)), "the graph", internal_error(error))
        else:
            if any(decision.rewritten for decision in record.decisions[decided:]):
                current, origins = trial, trial_origins
    if any(decision.rewritten for decision in record):
        _make_equal(graph, current, origins)
    return record


def _copied(graph: Graph, origins: Origins) -> tuple[Graph, Origins]:
    copy, copies = Graph(), dict[Node, Node]()
    for node in graph.nodes:
        copies[node] = copy.node_copy(node, lambda n: copies[n])
    copy.owning_module = graph.owning_module
    return copy, {copies[node]: origin for node, origin in origins.items() if node in copies}


def _make_equal(graph: Graph, wanted: Graph, origins: Origins) -> None:
    """Give ``graph`` the nodes of ``wanted`` in their order; nodes that were there before stay the same objects."""
    made: dict[Node, Node] = {}
    last = None
    for node in wanted.nodes:
        there = origins.get(node)
        if there is None:
            there = graph.node_copy(node, lambda n: made[n])
        else:
            there.args = map_arg(node.args, lambda n: made[n])
            there.kwargs = map_arg(node.kwargs, lambda n: made[n])
            there.meta = node.meta
        if last is not None:
            last.append(there)
        made[node] = last = there
    kept = set(made.values())
    for node in reversed(list(graph.nodes)):
        if node not in kept:
            graph.erase_node(node)
    graph.lint()
