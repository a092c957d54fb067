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
from torch._inductor.virtualized import V

from flashmla_ops import cpu
from flashmla_ops.ops.decode import DECODE, Decode
from lowering import versions
from lowering.ops import choose
from lowering.ops.products import laid_out
from lowering.session import session
from lowering.templates.decode import ELEMENTS, Arguments, DecodeTemplate

PATTERN = "decode generated"


def install() -> None:
    choose.install()
    versions.enter_lowering(torch.ops.flashmla.decode.default, lower)


def lower(*args: Any, **kwargs: Any) -> tuple[TensorBox, None] | None:
    """Out and nothing for the LSE, which nobody reads; None: Inductor calls the library."""
    current = session()
    if current is None or current.settings.decode == "extern":
        return None
    a = DECODE.bind(*args, **kwargs)  # of tensor boxes
    reason = why_not(a)
    if reason:
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
        return None
    given: dict[str, Any] = {name: value for name, value in vars(a).items() if isinstance(value, TensorBox)}
    if "schedule" in given:  # it is read as it lies: a strided one is copied, as by the library
        given["schedule"] = ir.ExternKernel.require_contiguous(given["schedule"])
    inputs = {name: laid_out(tensor) for name, tensor in given.items()}
    arguments = Arguments(int(a.d_v), int(a.qk_start), a.softmax_scale, a.causal, a.softcap, tuple(inputs))
    q: Any = a.q
    sizes = [*q.get_size()[:3], sympy.Integer(int(a.d_v))]
    layout = ir.FixedLayout(q.get_device_or_error(), q.get_dtype(), sizes)
    if current.settings.decode == "autotune" and not (reason := choose.why_not(arguments)):
        out, generated = choose.fastest([*inputs.values()], layout, arguments)
        reason = "" if generated else "a call of the library was faster"
    elif current.settings.decode == "autotune":
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
        return None
    else:
        out = DecodeTemplate([*inputs.values()], layout, arguments).generate().output_node()  # type: ignore[no-untyped-call]
    if reason:
        current.lowered.refused(PATTERN, V.graph.current_node, reason)
    else:
        current.lowered.rewrote(PATTERN, V.graph.current_node)
    return out, None


def why_not(a: Decode) -> str:
    """Why this call stays a call of the library; empty if the template serves it."""
    q: Any = a.q
    device = q.get_device_or_error()
    if device.type != "cpu":
        return f"the template is for the CPU, q is on {device}"
    if not all(isinstance(x, (int, sympy.Integer)) for x in (a.d_v, a.qk_start)):
        return f"d_v {a.d_v} and qk_start {a.qk_start} must be known when compiling"
    if a.row_format != "native" or q.get_dtype() not in ELEMENTS:
        return f"rows of format {a.row_format!r} and type {q.get_dtype()}"
    if a.levels != 3:
        return f"levels {a.levels}, the template has 3"
    if a.cu_seqlens_q is not None or a.batch_invariant or not (isinstance(a.window, int) and a.window == 0):
        return "a window, cu_seqlens_q or batch_invariant: the template cuts whole sequences alone"
    if cpu.STATE.active == cpu.REFERENCE:
        return f"the reference runs here: {cpu.STATE.reason}"
    if lse_is_used(V.graph.current_node):
        return "the LSE is used, and a template has one result"
    return ""


def lse_is_used(node: torch.fx.Node) -> bool:
    return any(user.args[1] == 1 and user.users for user in node.users)
