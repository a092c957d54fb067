"""The words in which operators state their contracts: a check that fails raises, naming argument, expected and actual.

A contract is a function ``contract(check, a)`` over a `Check` and the operator's arguments. It runs as it stands under
fake tensors and before the reference, where sizes may be symbolic: a condition on them becomes a guard. The C++ binding
runs the same statements, translated by `flashmla_ops.ops.translate`; ``csrc/flashmla/torch_checks.h`` has these words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._overlap import require_apart, same_elements

#: Element types of queries and cache rows.
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_NAMES = "float32, bfloat16 or float16"


class Result(NamedTuple):
    """A tensor that an operator returns: contiguous, on the device of its inputs."""

    shape: Sequence[int]
    dtype: torch.dtype


@dataclass(frozen=True)
class Check:
    """Checks of the arguments of operator ``op``, or of element ``index`` of those that are lists."""

    op: str
    index: int = -1

    def at(self, index: int) -> Check:
        return Check(self.op, index)

    def require(self, argument: str, condition: Any, expected: str, actual: object) -> None:
        if not condition:
            name = argument if self.index < 0 else f"{argument}[{self.index}]"
            raise ArgumentError(self.op, name, expected, actual)

    def dims(self, argument: str, tensor: Tensor, shape: str) -> None:
        """``shape`` as in "[b, s_q, h_q, d_qk]": the tensor has that many dimensions."""
        self.require(argument, tensor.dim() == shape.count(",") + 1, f"shape {shape}", f"{tensor.dim()} dimensions")

    def dtype(self, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
        self.require(argument, tensor.dtype == dtype, dtype_name(dtype), dtype_name(tensor.dtype))

    def floating(self, argument: str, tensor: Tensor) -> None:
        self.require(argument, tensor.dtype in FLOATS, FLOAT_NAMES, dtype_name(tensor.dtype))

    def device(self, argument: str, tensor: Tensor, like: Tensor) -> None:
        self.require(argument, tensor.device == like.device, f"device {like.device}", tensor.device)

    def contiguous_rows(self, argument: str, tensor: Tensor) -> None:
        contiguous = tensor.stride(-1) == 1 or tensor.size(-1) == 1
        self.require(argument, contiguous, "a contiguous last dimension", f"stride {tensor.stride(-1)}")

    def size(self, argument: str, tensor: Tensor, dim: int, wanted: int, unit: str) -> None:
        """``unit`` says what there are ``wanted`` of: " sequences, as q"."""
        self.require(argument, tensor.size(dim) == wanted, f"{wanted}{unit}", tensor.size(dim))

    def same_sizes(self, argument: str, tensor: Tensor, other_name: str, other: Tensor, dims: int) -> None:
        """The first ``dims`` sizes are those of another tensor."""
        for dim in range(dims):
            size, wanted = tensor.size(dim), other.size(dim)
            self.require(argument, size == wanted, f"size {wanted} in dimension {dim}, as {other_name}", size)

    def shape(self, argument: str, tensor: Tensor, wanted: Sequence[int]) -> None:
        same = tensor.dim() == len(wanted) and all(x == y for x, y in zip(tensor.shape, wanted, strict=True))
        self.require(argument, same, f"shape {list(wanted)}", list(tensor.shape))

    def apart(self, argument: str, tensor: Tensor, others: Mapping[str, Tensor | None]) -> None:
        """A tensor that is written shares no memory with the others, nor its elements with each other."""
        require_apart(self.op, argument, tensor, **others)

    def outs(
        self,
        results: Sequence[Result],
        outs: dict[str, Tensor],
        inputs: dict[str, Any],
        *,
        contiguous_rows: Sequence[str] = (),
        in_place: str = "",
    ) -> None:
        """Output tensors are as the results, and apart from each other and from what is read.

        ``contiguous_rows`` names outputs whose last dimension must be contiguous; ``in_place`` an input that an output
        may be, element for element: each is read before it is written.
        """
        read = {name: x for name, x in inputs.items() if isinstance(x, Tensor)}
        like = next(iter(read.values()))
        for (name, out), (shape, dtype) in zip(outs.items(), results, strict=True):
            self.dtype(name, out, dtype)
            self.device(name, out, like)
            self.shape(name, out, shape)
        for name in contiguous_rows:
            self.contiguous_rows(name, outs[name])
        for name, out in outs.items():
            same = in_place in read and same_elements(out, read[in_place])
            self.apart(name, out, {other: x for other, x in read.items() if not (same and other == in_place)})
            read[name] = out


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` for ``torch.bfloat16``: the form used in every message."""
    return str(dtype).removeprefix("torch.")


def sizes_of(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def strides_of(tensor: Tensor) -> list[int]:
    return list(tensor.stride())


def with_last(tensor: Tensor, size: int) -> list[int]:
    """The shape of a tensor, but for its last dimension."""
    return [*tensor.shape[:-1], size]


def lse_shape(out: Tensor) -> list[int]:
    """[..., h_q, s_q] of an out [..., s_q, h_q, d_v]."""
    *batch, s_q, h_q, _ = out.shape
    return [*batch, h_q, s_q]
