"""The one ``torch.library`` of the package, and what every operator file needs to define its operators in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops import _autocast, _autograd, _docs

NAMESPACE = "flashmla"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901 (lives as long as the process)

#: Element types of queries and cache rows.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"

Function = Callable[..., Any]


class Rules(NamedTuple):
    """What `complete` binds to an operator when all are defined."""

    vmap: Function | None
    autocast: _autocast.Rule | None


#: Every operator, as "append_" and "append_.two".
DEFINED: dict[str, Rules] = {}

LIBRARY.define("_refuse_gradient(str op, str argument) -> ()")
LIBRARY.impl("_refuse_gradient", _autograd.raise_refusal, "CompositeImplicitAutograd")


def define(
    schema: str,
    *,
    fake: Function,
    reference: Function,
    vmap: Function | None = None,
    autocast: _autocast.Rule | None = None,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator: its schema, its fake, the reference that runs where no kernel is registered, and its rules.

    A kernel for a device is registered by the library that holds it (`flashmla_ops.cpu` for the CPU). The reference
    sits below every device key, so an operator works wherever torch does. ``vmap`` is as `torch.library.register_vmap`
    takes it, ``autocast`` as in `_autocast`; without one, arguments stay as they are. No operator has a backward yet:
    `_autograd` refuses a gradient for all of them.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, *tags))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    DEFINED[name] = Rules(vmap, autocast)


def complete() -> None:
    """Bind to every operator what depends on all of them, and what the compiled kernels, loaded by now, did not."""
    operators = {name: operator(name) for name in DEFINED}
    _autograd.complete(LIBRARY, list(operators.values()))
    for name, (vmap, autocast) in DEFINED.items():
        if vmap is not None:
            torch.library.register_vmap(f"{NAMESPACE}::{name}", vmap, lib=LIBRARY)
        if autocast is not None:
            _autocast.register(LIBRARY, operators[name], autocast)
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__package__}."):
            _docs.document(module)


def operator(name: str) -> torch._ops.OpOverload:
    """``torch.ops.flashmla.append_.two`` for "append_.two". Only when all are defined: torch lists overloads once."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.flashmla, packet), overload or "default")  # type: ignore[no-any-return]


def require(op: str, argument: str, condition: Any, expected: str, actual: object) -> None:
    """Raise `ArgumentError` unless ``condition`` holds. Works on symbolic sizes: the condition becomes a guard."""
    if not condition:
        raise ArgumentError(op, argument, expected, actual)


def require_dims(op: str, argument: str, tensor: Tensor, shape: str) -> None:
    """``shape`` as in "[b, s_q, h_q, d_qk]": the tensor must have that many dimensions."""
    require(op, argument, tensor.dim() == shape.count(",") + 1, f"shape {shape}", f"{tensor.dim()} dimensions")


def require_dtype(op: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    require(op, argument, tensor.dtype == dtype, dtype_name(dtype), dtype_name(tensor.dtype))


def require_float(op: str, argument: str, tensor: Tensor) -> None:
    require(op, argument, tensor.dtype in FLOATS, FLOAT_NAMES, dtype_name(tensor.dtype))


def require_device(op: str, argument: str, tensor: Tensor, device: torch.device) -> None:
    require(op, argument, tensor.device == device, f"device {device}", tensor.device)


def require_contiguous_rows(op: str, argument: str, tensor: Tensor) -> None:
    require(
        op,
        argument,
        tensor.stride(-1) == 1 or tensor.size(-1) == 1,
        "a contiguous last dimension",
        f"stride {tensor.stride(-1)}",
    )


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the form used in every message."""
    return str(dtype).removeprefix("torch.")
