"""The limits of the device, measured in the run: bytes and operations a second."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.gpu_check.report import Report, one_paragraph
from bench.gpu_check.timing import interleaved

#: Bytes of the buffer that is read or copied: far more than any L2.
BUFFER = 4 << 30
#: How memory is used. A product reads far more than it writes, and reading alone is faster than a copy.
MEMORY = ("read", "copy")
SQUARE = 8192


SECTION = "limits"
TERA = 1e12


def measure(report: Report) -> None:
    """Rows of section "limits". What the device lacks is left out."""
    for name, (amount, make) in candidates().items():
        try:
            call = make()
            timed = interleaved({name: call})[name]
        except RuntimeError as error:  # out of memory, or a type that this device has no product of
            report.add(SECTION, {"name": name, "state": "left out", "why": one_paragraph(error)})
            continue
        unit = "TB/s" if name in MEMORY else "TFLOP/s"
        value = amount / timed.seconds / TERA
        report.add(SECTION, {"name": name, "value": value, "unit": unit, "spread": timed.spread})
        del call
        torch.cuda.empty_cache()


def measured(report: Report) -> dict[str, float]:
    """By name, bytes or operations a second: what `measure` found. "memory": the fastest use of it."""
    found = {row["name"]: row["value"] * TERA for row in report.sections.get(SECTION, []) if "value" in row}
    memory = [found.pop(name) for name in MEMORY if name in found]
    return found | ({"memory": max(memory)} if memory else {})


def candidates() -> dict[str, tuple[float, Callable[[], Callable[[], object]]]]:
    """By name: bytes or operations of a call, and what makes the call."""
    operations = 2.0 * SQUARE**3
    return {
        "read": (float(BUFFER), read),
        "copy": (2.0 * BUFFER, copy),
        "bf16": (operations, partial(product, torch.bfloat16)),
        "fp16": (operations, partial(product, torch.float16)),
        "s8": (operations, product_s8),
        "e4m3": (operations, product_e4m3),
    }


def read() -> Callable[[], object]:
    source = torch.randn(BUFFER // 4, device="cuda")
    return lambda: source.sum()


def copy() -> Callable[[], object]:
    """By a kernel: a copy that is a node of a graph may be left to the copy engine, which is slower."""
    source = torch.randn(BUFFER // 4, device="cuda")
    target = torch.empty_like(source)
    return lambda: torch.neg(source, out=target)


def product(dtype: torch.dtype) -> Callable[[], object]:
    """On random data: zeros draw less power, and clocks stay higher."""
    a, b = (torch.randn(SQUARE, SQUARE, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def product_s8() -> Callable[[], object]:
    a, b = (torch.randint(-127, 128, (SQUARE, SQUARE), dtype=torch.int8, device="cuda") for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def product_e4m3() -> Callable[[], object]:
    a, b = (torch.randn(SQUARE, SQUARE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one, scaled = torch.ones((), device="cuda"), torch._scaled_mm
    return lambda: scaled(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def bound(flops: float, moved: float, kind: str, limits: dict[str, float]) -> tuple[float, str]:
    """Seconds that work takes at least, by the limits of this run, and which one binds. NaN if none was measured."""
    by = {
        name: amount / limits[limit]
        for name, amount, limit in (("tensor cores", flops, kind), ("memory", moved, "memory"))
        if limit in limits
    }
    if not by:
        return float("nan"), "no limit was measured"
    binding = max(by, key=lambda name: by[name])
    return by[binding], binding
