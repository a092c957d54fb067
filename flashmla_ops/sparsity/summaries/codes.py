"""``codes``: the box of a page's keys, and where in it each key lies, in 4 bits an element.

Element i of a key lies in ``[low_i, low_i + 16 step_i]``, and its code says in which sixteenth. The middle of that
sixteenth is within ``step_i / 2`` of the element, so the scores of q with the middles are within

    min(sum_i |q_i| step_i / 2, |q| radius)

of the true ones, where ``radius`` is the largest distance of a key of the page to its middles. The same then holds for
the logarithm of the sum of their exponentials.

    radius   float32                              infinite where a key is not finite: then nothing is proven
    low      d bfloat16, from byte 16             d is padded to a multiple of 8 here, the page to one of 16
    step     d bfloat16
    codes    [d / 8, page_size] uint32            elements 8 j + 2 k and 8 j + 2 k + 1 of key t: bits 4 k and 16 + 4 k

Pairs of codes 16 bits apart are what the kernels multiply by pairs of 16-bit weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from flashmla_ops.sparsity.summaries.summary import (
    Summary,
    down_to_bfloat16,
    joined,
    part,
    round_up,
    up_to_bfloat16,
)

HEADER = 16
LEVELS = 16


class Codes(Summary):
    name = "codes"
    proves = True

    def n_bytes(self, page_size: int, d: int) -> int:
        elements = round_up(d, 8)
        return HEADER + 4 * elements + elements // 2 * round_up(page_size, 16)

    def multiply_adds(self, page_size: int, d: int) -> int:
        return page_size * d

    def encode(self, keys: Tensor, planes: Tensor | None) -> Tensor:
        _, page_size, d = keys.shape
        low = down_to_bfloat16(keys.amin(dim=1))
        step = up_to_bfloat16((keys.amax(dim=1) - low.float()) / LEVELS)
        places = (keys - low.float()[:, None]) / step.float()[:, None]
        codes = places.floor().nan_to_num(0.0).clamp(0, LEVELS - 1).to(torch.int32)
        away = keys.double() - _middles(low, step, codes)
        radius = up_to_bfloat16(away.norm(dim=-1).amax(dim=1).float() * (1 + 2**-20)).float()
        radius = torch.where(keys.isfinite().all(dim=(1)).all(dim=1) & radius.isfinite(), radius, math.inf)
        more = round_up(d, 8) - d
        words = _packed(pad(codes, (0, more, 0, round_up(page_size, 16) - page_size)))
        header = pad(radius[:, None], (0, HEADER // 4 - 1))
        return joined(header, pad(low, (0, more)), pad(step, (0, more)), words)

    def mass(self, q: Tensor, pages: Tensor, page_size: int, planes: Tensor | None) -> tuple[Tensor, Tensor]:
        d, elements, tokens = q.size(1), round_up(q.size(1), 8), round_up(page_size, 16)
        radius = part(pages, 0, (), torch.float32).double()
        low = part(pages, HEADER, (elements,), torch.bfloat16)[:, :d]
        step = part(pages, HEADER + 2 * elements, (elements,), torch.bfloat16)[:, :d]
        words = part(pages, HEADER + 4 * elements, (elements // 8, tokens), torch.int32)
        middles = _middles(low, step, _unpacked(words)[:, :page_size, :d])
        scores = torch.einsum("rd,ntd->rnt", q, middles)
        within_box = q.abs() @ step.double().T / 2
        within_ball = q.norm(dim=-1)[:, None] * radius
        slack = torch.minimum(within_box, within_ball).where(radius < math.inf, math.inf)
        return scores.logsumexp(dim=-1), slack


def _middles(low: Tensor, step: Tensor, codes: Tensor) -> Tensor:
    """Keys ``[n, page_size, d]`` float64 as the codes have them; low and step ``[n, d]``."""
    return low.double()[:, None] + (codes.double() + 0.5) * step.double()[:, None]


def _packed(codes: Tensor) -> Tensor:
    """Codes ``[n, t, d]`` as words ``[n, d / 8, t]``."""
    n, t, d = codes.shape
    eights = codes.view(n, t, d // 8, 4, 2)
    shifts = torch.tensor([[4 * k, 16 + 4 * k] for k in range(4)], device=codes.device)
    return (eights << shifts).sum(dim=(3, 4)).to(torch.int64).transpose(1, 2).to(torch.int32)


def _unpacked(words: Tensor) -> Tensor:
    """Words ``[n, d / 8, t]`` as codes ``[n, t, d]``."""
    shifts = torch.tensor([[4 * k, 16 + 4 * k] for k in range(4)], device=words.device)
    eights = (words.transpose(1, 2)[..., None, None] >> shifts) & (LEVELS - 1)
    return eights.flatten(2)
