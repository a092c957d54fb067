"""`fast_linear`: a model's linear layers on `flashmla::gemm`, which streams weights faster when there are few rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from flashmla_ops.nn.panel_weight import PanelWeight
from flashmla_ops.panels import PANEL, from_panels, to_panels


class _AsLinear(type):
    """The metaclass of a layer that takes the place of ``nn.Linear`` in tables of module classes too.

    ``torch.ao.quantization.quantize_dynamic`` looks layers up by their exact class, and would pass ours over.
    """

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is nn.Linear

    def __hash__(cls) -> int:
        return hash(nn.Linear)


class FastLinear(nn.Linear, metaclass=_AsLinear):
    """An ``nn.Linear`` whose forward is `flashmla::gemm`. Parameters, hooks and state_dict are those of the original.

    Where a gradient is required, or under autocast, it is the original: the operator has no backward.
    """

    def forward(self, input: Tensor) -> Tensor:  # [..., in_features] -> [..., out_features]
        weight = self._stored()
        needs_grad = torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad)
        if needs_grad or torch.is_autocast_enabled(input.device.type) or input.dtype != weight.dtype:
            return nn.functional.linear(input, self._rows(), self.bias)
        out: Tensor = torch.ops.flashmla.gemm(input, weight, self.bias)
        return out

    def _stored(self) -> Tensor:
        return self.weight

    def _rows(self) -> Tensor:
        return self.weight


class PanelLinear(FastLinear):
    """A `FastLinear` whose weight is kept in panels, for inference: a buffer, which is no parameter.

    state_dict is that of the original, a copy. So is ``weight``, made at each access: it can be read, and replaced by
    assignment, but whoever writes into it gets an `ArgumentError`.
    """

    panels: Tensor  # [out_features / 16, in_features, 16]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        rows = self._rows()
        # A graph that is being traced reads shape and dtype of it at most: no tensor subclass need enter it.
        return rows if torch.compiler.is_compiling() else rows.as_subclass(PanelWeight)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            with _unpacked(self):
                setattr(self, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value))
        else:
            super().__setattr__(name, value)

    def _rows(self) -> Tensor:
        return from_panels(self.panels)

    def _stored(self) -> Tensor:
        return self.panels

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self._rows()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        with _unpacked(self):
            nn.Linear._load_from_state_dict(self, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        with _unpacked(self):
            nn.Linear._apply(self, fn, recurse)
        return self


def fast_linear(model: nn.Module, *, panels: bool = False, keep: Collection[str] = ("kv_b_proj",)) -> int:
    """Swap every plain ``nn.Linear`` of ``model`` for `FastLinear`, in place; returns how many.

    Only layers whose class is exactly ``nn.Linear``, with floating weights on the CPU, are touched. No weight is copied
    or packed, so tied weights stay tied and ``state_dict`` is unchanged. `restore_linear` undoes it.

    With ``panels``, for inference with four sequences or more at once, weights are moved into panels
    (`flashmla_ops.panels`), layer by layer; ``state_dict`` stays what it was. Not those of a number of rows that is no
    multiple of 16, those that have a second owner, and those of layers named in ``keep``, whose weights are read by
    others (absorbed attention reads ``kv_b_proj``).
    """
    swapped = _swap(model, nn.Linear, FastLinear)
    if panels:
        owners = Counter(id(tensor) for module in model.modules() for tensor in module._parameters.values())
        for name, layer in model.named_modules():
            if not isinstance(layer, FastLinear) or name.rpartition(".")[2] in keep:
                continue
            if owners[id(layer.weight)] == 1:
                _pack(layer)
    return swapped


def restore_linear(model: nn.Module) -> int:
    """Undo `fast_linear`; returns how many layers were swapped back."""
    for layer in model.modules():
        if isinstance(layer, PanelLinear):
            _unpack(layer)
    return _swap(model, FastLinear, nn.Linear)


def _swap(model: nn.Module, old: type[nn.Linear], new: type[nn.Linear]) -> int:
    layers = [layer for layer in model.modules() if type(layer) is old and _is_served(layer.weight)]
    for layer in layers:
        layer.__class__ = new
    return len(layers)


def _is_served(weight: Tensor) -> bool:
    return weight.is_floating_point() and weight.device.type == "cpu"


def _pack(layer: nn.Linear) -> None:
    weight = layer.weight
    if not _is_served(weight) or weight.size(0) % PANEL != 0:
        return
    panels = to_panels(weight.detach())
    del layer._parameters["weight"]
    layer.__class__ = PanelLinear
    layer.register_buffer("panels", panels, persistent=False)


def _unpack(layer: nn.Linear) -> None:
    weight = from_panels(layer.panels)  # type: ignore[arg-type]
    del layer._buffers["panels"]
    layer._non_persistent_buffers_set.discard("panels")
    layer.__class__ = FastLinear
    # First, as in the layer that it was.
    layer._parameters = {"weight": nn.Parameter(weight), **layer._parameters}


@contextmanager
def _unpacked(layer: nn.Linear) -> Iterator[None]:
    _unpack(layer)
    try:
        yield
    finally:
        _pack(layer)
