"""What a model's weights are now: formats, bits, bytes and kernels, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from tabulate import tabulate
from torch import nn

from flashmla_ops import capability
from flashmla_ops.nn.fast_linear import FastLinear
from flashmla_ops.ops.check import dtype_name
from flashmla_ops.quant.linear import QuantizedLinear
from flashmla_ops.quant.plan import linear_layers
from flashmla_ops.quant.weights import NATIVE


@dataclass(frozen=True)
class Layer:
    """One weight."""

    name: str
    shape: tuple[int, ...]
    format: str
    elements: int
    before: int  # bytes
    bytes: int
    kernel: str
    note: str = ""

    @property
    def bits(self) -> float:
        """Of an element, scales counted."""
        return 8 * self.bytes / max(1, self.elements)

    def line(self) -> tuple[object, ...]:
        shape = "x".join(map(str, self.shape))
        bits = f"{self.bits:.2f}" if self.elements else "-"
        return self.name, shape, self.format, bits, self.before, self.bytes, self.kernel, self.note


@dataclass(frozen=True)
class Report:
    """All weights of a model. The bytes of one that two layers share are those of the first."""

    layers: list[Layer]
    #: Perplexity before and after, by the text that it was measured on.
    perplexity: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def plan(self) -> dict[str, str]:
        """The format of each quantised layer: ``weights`` of `quantize`, for another model of this kind."""
        return {layer.name: layer.format for layer in self.layers if layer.format != NATIVE}

    @property
    def before(self) -> int:
        """Bytes of all weights as they were."""
        return sum(layer.before for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Bytes of all weights."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def bits(self) -> float:
        """Of an element of those layers that are quantised, on average."""
        quantised = [layer for layer in self.layers if layer.format != NATIVE]
        return 8 * sum(layer.bytes for layer in quantised) / max(1, sum(layer.elements for layer in quantised))

    def table(self) -> str:
        """Markdown: every weight."""
        rows = [layer.line() for layer in self.layers]
        heads = ("weight", "shape", "format", "bits", "bytes before", "bytes", "kernel", "note")
        return tabulate(rows, heads, tablefmt="pipe", disable_numparse=True)

    def __str__(self) -> str:
        """Markdown: a line for each format, the sum, and what kept its weight and why."""
        lines = []
        for name in dict.fromkeys(layer.format for layer in self.layers):
            lines.append(_line(name, [layer for layer in self.layers if layer.format == name]))
        lines.append(_line("all", self.layers))
        table = tabulate(
            lines, ("format", "weights", "bits", "MB before", "MB"), tablefmt="pipe", disable_numparse=True
        )
        notes: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.note:
                notes.setdefault(f"{layer.format}: {layer.note}", []).append(layer.name)
        told = [
            f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {why}" for why, names in notes.items()
        ]
        measured = [
            f"perplexity on {text}: {before:.3f} before, {after:.3f} after ({100 * (after / before - 1):+.2f} %)"
            for text, (before, after) in self.perplexity.items()
        ]
        return "\n".join([table, *measured, *told])


def report(model: nn.Module, notes: dict[str, str] | None = None) -> Report:
    """The weights of ``model`` as they are: parameters of two or more dimensions, and quantised ones."""
    return Report(list(_layers(model, notes or {})))


def explain(model: nn.Module) -> str:
    """Markdown: which kernel each weight of ``model`` runs."""
    return report(model).table()


def _layers(model: nn.Module, notes: dict[str, str]) -> Iterator[Layer]:
    linear, seen = dict(linear_layers(model)), set[int]()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield _quantised(name, module, notes.get(name, ""))
            continue
        for own, tensor in module._parameters.items():
            if tensor is None or tensor.dim() < 2:
                continue
            path = name if own == "weight" else f"{name}.{own}"
            note = notes.get(name, "") if name in linear else f"no linear layer ({type(module).__name__})"
            kernel = _native_kernel(module) if name in linear else "torch"
            elements, size = (0, 0) if id(tensor) in seen else (tensor.numel(), tensor.nbytes)
            seen.add(id(tensor))
            yield Layer(path, tuple(tensor.shape), NATIVE, elements, size, size, kernel, note)


def _quantised(name: str, layer: QuantizedLinear, note: str) -> Layer:
    n, k = layer.out_features, layer.in_features
    size = layer.packed.nbytes + layer.scale.nbytes
    dtype = layer.empty.dtype
    kernel = f"flashmla::gemm, {dtype_name(dtype)} x {layer.format}, {capability.operators()['gemm']}"
    return Layer(name, (n, k), layer.format, n * k, n * k * dtype.itemsize, size, kernel, note)


def _native_kernel(layer: nn.Module) -> str:
    if isinstance(layer, FastLinear):
        return "flashmla::gemm"
    return "torch" if type(layer).forward is nn.Linear.forward else f"that of {type(layer).__name__}"


def _line(name: str, layers: list[Layer]) -> tuple[str, ...]:
    size, before = sum(layer.bytes for layer in layers), sum(layer.before for layer in layers)
    bits = 8 * size / max(1, sum(layer.elements for layer in layers))
    return name, str(len(layers)), f"{bits:.2f}", f"{before / 1e6:.2f}", f"{size / 1e6:.2f}"
