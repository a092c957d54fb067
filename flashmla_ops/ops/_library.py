"""The one ``torch.library`` of the package, and what every operator file needs to define its operators in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError, NotDifferentiableError

NAMESPACE = "flashmla"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901 (lives as long as the process)

#: Element types of queries and cache rows.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"

Function = Callable[..., Any]


def define(
    schema: str,
    *,
    fake: Function,
    reference: Function,
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator: its schema, its fake and the reference that runs where no kernel is registered.

    A kernel for a device is registered by the library that holds it (`flashmla_ops.cpu` for the CPU). The reference
    sits below every device key, so an operator works wherever torch does.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides, *tags))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)


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


def refuse_gradient(op: str, **tensors: Tensor | None) -> None:
    """Raise at the forward if a gradient would be needed: no operator here has a backward yet."""
    if not torch.is_grad_enabled():
        return
    for argument, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise NotDifferentiableError(op, argument)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the form used in every message."""
    return str(dtype).removeprefix("torch.")
