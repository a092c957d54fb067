"""``signs``: on which side of 128 planes each key lies, seen from the mean of its page (SimHash: Charikar, 2002).

Two vectors at an angle a lie on different sides of a random plane with probability a / pi. The Hamming distance of the
signatures of q and of a key therefore estimates their angle, and their lengths the rest of the score.

    mean     d bfloat16
    length   page_size bfloat16, of key - mean
    signs    [page_size, 16] bytes: bit k of byte j is set where the key is on the upper side of plane 8 j + k
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashmla_ops.sparsity.summaries.summary import Summary, joined, part

PLANES = 128
BYTES = PLANES // 8


class Signs(Summary):
    name = "signs"
    n_planes = PLANES

    def n_bytes(self, page_size: int, d: int) -> int:
        return 2 * d + (2 + BYTES) * page_size

    def multiply_adds(self, page_size: int, d: int) -> int:
        return d + page_size  # and Hamming distances

    def encode(self, keys: Tensor, planes: Tensor | None) -> Tensor:
        assert planes is not None
        mean = keys.mean(dim=1).bfloat16()
        offsets = keys - mean.float()[:, None]
        signs = (offsets @ planes.float() > 0).unflatten(-1, (BYTES, 8))
        packed = (signs << torch.arange(8, device=keys.device)).sum(dim=-1).to(torch.uint8)
        return joined(mean, offsets.norm(dim=-1).bfloat16(), packed)

    def mass(self, q: Tensor, pages: Tensor, page_size: int, planes: Tensor | None) -> tuple[Tensor, Tensor]:
        assert planes is not None
        d = q.size(1)
        mean = part(pages, 0, (d,), torch.bfloat16).double()
        length = part(pages, 2 * d, (page_size,), torch.bfloat16).double()
        packed = part(pages, 2 * d + 2 * page_size, (page_size, BYTES), torch.uint8)
        signs = ((packed[..., None] >> torch.arange(8, device=q.device)) & 1).flatten(2)  # [n, t, PLANES]
        sides = torch.where(q @ planes.double() > 0, 1.0, -1.0).double()
        agreement = torch.einsum("rk,ntk->rnt", sides, 2.0 * signs.double() - 1.0) / PLANES
        cosine = torch.sin(agreement * (math.pi / 2))
        scores = (q @ mean.T)[..., None] + q.norm(dim=-1)[:, None, None] * length * cosine
        mass = scores.logsumexp(dim=-1)
        return mass, torch.full_like(mass, math.inf)
