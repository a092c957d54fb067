"""``boxes``: the least and the largest of each element of a page's keys (Quest, arXiv:2406.10774). A baseline.

No score of the page is above that of the best corner of the box, and the page's mass is estimated as if every key had
it. This ranks pages well enough, and proves next to nothing: the bound is some 20 nats above the mass.

    low, high   d bfloat16 each, rounded away from the keys
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashmla_ops.sparsity.summaries.summary import Summary, down_to_bfloat16, joined, part, up_to_bfloat16


class Boxes(Summary):
    name = "boxes"

    def n_bytes(self, page_size: int, d: int) -> int:
        return 4 * d

    def multiply_adds(self, page_size: int, d: int) -> int:
        return 2 * d

    def encode(self, keys: Tensor, planes: Tensor | None) -> Tensor:
        return joined(down_to_bfloat16(keys.amin(dim=1)), up_to_bfloat16(keys.amax(dim=1)))

    def mass(self, q: Tensor, pages: Tensor, page_size: int, planes: Tensor | None) -> tuple[Tensor, Tensor]:
        d = q.size(1)
        low, high = part(pages, 0, (2, d), torch.bfloat16).double().unbind(1)
        best = q.clamp_min(0) @ high.T + q.clamp_max(0) @ low.T
        worst = q.clamp_min(0) @ low.T + q.clamp_max(0) @ high.T
        return best + math.log(page_size), best - worst
