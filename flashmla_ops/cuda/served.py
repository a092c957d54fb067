"""How a call is served: by a kernel where one takes it, else by the definition; `explain` says which, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.magic import magic_of
from cutlass_kernels.errors import MissingToolError
from flashmla_ops.cuda.engine import Engine, Unserved
from flashmla_ops.ops.operator import Operator

#: Names of element types, as configurations have them.
ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
INT32 = 2**31 - 1


def served(
    engine: Engine, operator: Operator[Any], a: Any, call: str, like: Tensor, launch: Callable[[list[Tensor]], str]
) -> list[Tensor]:
    """The results of a call. ``launch`` fills them and names its kernel, or raises `Unserved`.

    ``like`` is on their device. Raises what the operator's contract does not allow.
    """
    results = operator.results(a)
    try:
        if engine.device.capability < (8, 0):
            raise Unserved(f"compute capability 8.0 is needed, the device has {engine.device.capability}")
        found = [like.new_empty(shape, dtype=dtype) for shape, dtype in results]
        engine.remember(call, launch(found))
    except (Unserved, MissingToolError) as reason:
        engine.remember(call, f"the float64 definition ({reason})")
        computed = operator.reference(*a.values())
        return [] if computed is None else [computed] if isinstance(computed, Tensor) else list(computed)
    return found


def in_int32(name: str, value: int) -> int:
    """Raises `Unserved` for what kernels do not count to."""
    if value > INT32:
        raise Unserved(f"{value} {name}, kernels count to {INT32}")
    return value


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """In bytes; 0 for a dimension of one entry, whatever its stride is."""
    return tuple(
        stride * tensor.element_size() if size > 1 else 0
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def divisor(name: str, value: int) -> dict[str, int]:
    """A number that a kernel divides by."""
    magic, shift = magic_of(max(value, 1))
    return {name: value, f"{name}_magic": magic, f"{name}_shift": shift}


def are_multiples(width: int, *numbers: int) -> bool:
    return not any(number % width for number in numbers)
