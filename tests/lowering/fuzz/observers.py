"""Operators that see how a tensor lies in memory, for programs of the fuzzer."""

import torch


@torch.library.custom_op("fuzz::needs_contiguous", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def needs_contiguous(x: torch.Tensor) -> torch.Tensor:
    if not x.is_contiguous():
        raise ValueError(f"expected contiguous, got strides {x.stride()}")
    return x * 2


@needs_contiguous.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("fuzz::strides", mutates_args=(), tags=(torch.Tag.needs_exact_strides,))
def strides(x: torch.Tensor) -> torch.Tensor:
    """The strides of ``x``, those of dimensions of one element or none left out."""
    return torch.tensor([step if size > 1 else 0 for step, size in zip(x.stride(), x.shape, strict=True)] + [0])


@strides.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.dim() + 1, dtype=torch.int64)


@torch.library.custom_op("fuzz::write_", mutates_args=("x",), tags=(torch.Tag.needs_exact_strides,))
def write_(x: torch.Tensor) -> None:
    """Change a tensor in an order that nobody but its memory knows."""
    x.mul_(2)


@write_.register_fake
def _(x: torch.Tensor) -> None:
    return None
