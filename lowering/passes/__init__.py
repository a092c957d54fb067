"""The graph passes of the `flashmla` backend.

A pass is a function of the graph and of the record of decisions. It rewrites the graph in place, and only where the
result is proven equal; it says in the record what it rewrote, and why it left alone what looked like a candidate. The
backend runs `PASSES` in order (`run_passes`) on every joint graph (inference graphs included) before Inductor's own
joint passes: the graph is functional, its operators are those of ATen and of custom libraries, and each node's
``meta["val"]`` is a fake tensor with symbolic sizes. Nodes that nobody reads are removed before and after each pass.
"""

from lowering.passes.run import PASSES, GraphPass, run_passes
from lowering.record import Decision, Record

__all__ = ["PASSES", "Decision", "GraphPass", "Record", "run_passes"]
