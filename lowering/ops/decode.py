"""`decode` in Inductor: a call of the library, or a generated kernel that also holds what follows it.

The choice is a setting (`lowering.settings`). A call that the template does not serve stays a call of the library, and
the record says why.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch._inductor import ir
from torch._inductor.ir import TensorBox
from torch._inductor.lowering import user_lowerings
from torch._inductor.virtualized import V

from flashmla_ops import cpu
from lowering.ops import choose
from lowering.ops.products import laid_out
from lowering.session import session
from lowering.templates.decode import ELEMENTS, Arguments, DecodeTemplate

PATTERN = "decode generated"


def install() -> None:
    choose.install()
    user_lowerings[torch.ops.flashmla.decode.default] = lower


def lower(
    q: TensorBox,
    kv_cache: TensorBox,
    k_cache: TensorBox | None,
    block_table: TensorBox,
    cache_seqlens: TensorBox,
    d_v: Any,
    qk_start: Any = 0,
    softmax_scale: float | None = None,
    causal: bool = False,
    schedule: TensorBox | None = None,
    row_format: str = "native",
    attn_sink: TensorBox | None = None,
    levels: int = 3,
) -> tuple[TensorBox, None] | None:
    """Out and nothing for the LSE, which nobody reads; None: Inductor calls the library."""
    current = session()
    if current is None or current.settings.decode == "extern":
        return None
    reason = why_not(q, d_v, qk_start, row_format, levels)
    if reason:
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
        return None
    arguments = Arguments(
        int(d_v), int(qk_start), softmax_scale, causal, k_cache is not None, schedule is not None, attn_sink is not None
    )
    # A schedule is read as it lies: a strided one is copied, as by the library.
    in_order = None if schedule is None else ir.ExternKernel.require_contiguous(schedule)
    given = (q, kv_cache, block_table, cache_seqlens, k_cache, in_order, attn_sink)
    inputs = [laid_out(tensor) for tensor in given if tensor is not None]
    sizes = [*q.get_size()[:3], sympy.Integer(int(d_v))]
    layout = ir.FixedLayout(q.get_device_or_error(), q.get_dtype(), sizes)
    if current.settings.decode == "autotune" and not (reason := choose.why_not(arguments)):
        out, generated = choose.fastest(inputs, layout, arguments)
        reason = "" if generated else "a call of the library was faster"
    elif current.settings.decode == "autotune":
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
        return None
    else:
        out = DecodeTemplate(inputs, layout, arguments).generate().output_node()  # type: ignore[no-untyped-call]
    if reason:
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
    else:
        current.lowered.rewrote(PATTERN, V.graph.current_node)
    return out, None


def why_not(q: TensorBox, d_v: Any, qk_start: Any, row_format: str, levels: int) -> str:
    """Why this call stays a call of the library; empty if the template serves it."""
    device = q.get_device_or_error()
    if device.type != "cpu":
        return f"the template is for the CPU, q is on {device}"
    if not all(isinstance(x, (int, sympy.Integer)) for x in (d_v, qk_start)):
        return f"d_v {d_v} and qk_start {qk_start} must be known when compiling"
    if row_format != "native" or q.get_dtype() not in ELEMENTS:
        return f"rows of format {row_format!r} and type {q.get_dtype()}"
    if levels != 3:
        return f"levels {levels}, the template has 3"
    if cpu.STATE.active == cpu.REFERENCE:
        return f"the reference runs here: {cpu.STATE.reason}"
    if lse_is_used(V.graph.current_node):
        return "the LSE is used, and a template has one result"
    return ""


def lse_is_used(node: torch.fx.Node) -> bool:
    return any(user.args[1] == 1 and user.users for user in node.users)
