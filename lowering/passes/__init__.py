"""The graph passes of the `flashmla` backend.

A pass is a function of the graph and of the record of decisions. It rewrites the graph in place, and only where the
result is proven equal; it says in the record what it rewrote, and why it left alone what looked like a candidate. The
backend runs `PASSES` in order on every joint graph (inference graphs included) before Inductor's own joint passes: the
graph is functional, its operators are those of ATen and of custom libraries, and each node's ``meta["val"]`` is a fake
tensor with symbolic sizes. Afterwards the backend removes dead code and recompiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lowering.passes.absorb import absorb_latents
from lowering.passes.attend import rewrite_attention
from lowering.passes.products import serve_products
from lowering.passes.queries import join_queries
from lowering.passes.record import Decision, Record
from lowering.passes.up import form_decode_up

GraphPass = Callable[[torch.fx.Graph, Record], None]

#: In the order in which they run.
PASSES: list[GraphPass] = [absorb_latents, rewrite_attention, form_decode_up, serve_products, join_queries]

__all__ = ["PASSES", "Decision", "GraphPass", "Record"]
