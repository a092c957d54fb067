"""``spread``: the mean of a page's keys, and the standard deviation of each element. A baseline.

Were the elements of the n keys independent and normal, the mass would be
``log n + q . mean + sum_i (q_i deviation_i)^2 / 2``.

    mean, deviation   d bfloat16 each
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashmla_ops.sparsity.summaries.summary import Summary, joined, part


class Spread(Summary):
    name = "spread"

    def n_bytes(self, page_size: int, d: int) -> int:
        return 4 * d

    def multiply_adds(self, page_size: int, d: int) -> int:
        return 2 * d

    def encode(self, keys: Tensor, planes: Tensor | None) -> Tensor:
        mean = keys.mean(dim=1)
        deviation = (keys - mean[:, None]).square().mean(dim=1).sqrt()
        return joined(mean.bfloat16(), deviation.bfloat16())

    def mass(self, q: Tensor, pages: Tensor, page_size: int, planes: Tensor | None) -> tuple[Tensor, Tensor]:
        mean, deviation = part(pages, 0, (2, q.size(1)), torch.bfloat16).double().unbind(1)
        mass = q @ mean.T + q.square() @ deviation.square().T / 2 + math.log(page_size)
        return mass, torch.full_like(mass, math.inf)
