"""`QuantizedLinear`: a linear layer whose weight is kept in integers, and multiplied by `flashmla::gemm`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.nn.panel_weight import PanelWeight
from flashmla_ops.quant.weights import FORMATS, WeightFormat, decode


class QuantizedWeight(PanelWeight):
    """The weight of a `QuantizedLinear`, as others see it."""

    owner: ClassVar[tuple[str, str]] = ("quantize", "a quantised weight (call dequantize first)")


class QuantizedLinear(nn.Linear):
    """A linear layer with a weight in int8 or int4; `quantize` makes it of an ``nn.Linear``, in place.

    Its ``state_dict`` has ``packed`` (panels) and ``scale`` in place of ``weight``, and loads into a layer of the same
    format. ``weight`` is a copy, made at each access, of what the integers stand for; whoever writes into it, or
    assigns it, gets an `ArgumentError`. ``model.to(dtype)`` changes the dtype of ``weight`` and bias alone.

    The forward is `flashmla::gemm`; where a gradient of the input is required, which that has not, a product with
    ``weight``. Weights in integers have no gradient.
    """

    packed: Tensor  # panels: int8 [out_features / 16, in_features, 16], int4 [out_features / 16, in_features / 8, 16]
    scale: Tensor  # float32 [out_features]; of int4 bfloat16 [out_features / 16, in_features / group, 16]
    empty: Tensor  # [0] of the dtype that the weight stands for
    format: str

    def forward(self, input: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        bias = self.bias
        trained = bias is not None and bias.requires_grad
        if torch.is_grad_enabled() and (input.requires_grad or trained):
            return nn.functional.linear(input, self._decoded(), bias)
        out: Tensor = torch.ops.flashmla.gemm(input, self.packed, bias, None, self.scale)
        return out

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        rows = self._decoded()
        # A graph that is being traced reads shape and dtype of it at most: no tensor subclass need enter it.
        return rows if torch.compiler.is_compiling() else rows.as_subclass(QuantizedWeight)

    @property
    def kept(self) -> WeightFormat:
        """The weight's format."""
        return FORMATS[self.format]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={self.format}"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            op, what = QuantizedWeight.owner
            raise ArgumentError(op, "weight", f"no assignment to {what}", f"a {type(value).__name__}")
        super().__setattr__(name, value)

    def _decoded(self) -> Tensor:
        return decode(self.packed, self.scale, self.empty.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Scales follow to other devices, and keep their dtype."""
        before = self.scale
        nn.Linear._apply(self, fn, recurse)
        if self.scale.dtype != before.dtype:
            self.scale = before.to(self.scale.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: list[str],
    ) -> None:
        for name in ("packed", "scale"):
            own, given = getattr(self, name), state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                errors.append(f"{prefix}{name}: expected {own.dtype} of format {self.format}, got {given.dtype}")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)


def pack(
    layer: nn.Linear, kept: WeightFormat, encoded: tuple[Tensor, Tensor] | None = None, moments: Tensor | None = None
) -> None:
    """Make ``layer`` a `QuantizedLinear`. ``encoded``: its weight, encoded before; ``moments``: to encode it by."""
    weight = layer.weight
    on_meta = kept.empty(*weight.shape) if weight.is_meta else None
    packed, scale = encoded or on_meta or kept.encode(weight, moments)
    del layer._parameters["weight"]
    layer.__class__ = QuantizedLinear
    layer.format = kept.name  # type: ignore[assignment]
    layer.register_buffer("packed", packed)
    layer.register_buffer("scale", scale)
    layer.register_buffer("empty", weight.detach().new_empty(0), persistent=False)


def unpack(layer: QuantizedLinear, weight: nn.Parameter | None = None) -> None:
    """Make it an ``nn.Linear`` again, of the weight that it stands for, or of ``weight``."""
    if weight is None:
        weight = nn.Parameter(layer._decoded(), requires_grad=False)
    for name in ("packed", "scale", "empty"):
        del layer._buffers[name]
    layer._non_persistent_buffers_set.discard("empty")
    del layer.format
    layer.__class__ = nn.Linear  # type: ignore[assignment]
    # First, as in the layer that it was.
    layer._parameters = {"weight": weight, **layer._parameters}
