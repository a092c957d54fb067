"""Small programs without anything of ours: what each computes, and its inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Inputs = tuple[Any, ...]
#: A function, and what makes its inputs for a floating-point type.
Program = tuple[Callable[..., Any], Callable[[torch.dtype], Inputs]]


def of(*shapes: tuple[int, ...]) -> Callable[[torch.dtype], Inputs]:
    """Floating-point inputs of these shapes."""
    return lambda dtype: tuple(torch.linspace(-2, 2, torch.Size(s).numel()).view(s).to(dtype) for s in shapes)


def with_index(*shapes: tuple[int, ...], n: int, size: int) -> Callable[[torch.dtype], Inputs]:
    """The same, and ``size`` indices below ``n``, each there at most once."""
    return lambda dtype: (*of(*shapes)(dtype), torch.arange(size) * 7 % n)


def in_place_where(c: Tensor, x: Tensor) -> Tensor:
    return c.add_(torch.where(x.t() > 0, x.t(), 0.0))


def in_place_masked(c: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    return c.add_(torch.where(mask, x.t(), 0.0))


def two_updates(c: Tensor, x: Tensor) -> Tensor:
    c.mul_(2).add_(x.t())
    c[1:].sub_(x.t()[:-1])
    return c.sum()


def slice_update(c: Tensor, x: Tensor) -> None:
    c[2:, ::2] = x[:, : c[2:, ::2].shape[1]]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotated(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)


def logits_loss(x: Tensor, index: Tensor) -> Tensor:
    return -F.log_softmax(x.float(), -1).gather(1, index[:, None]).mean()


def two_chains(x: Tensor, y: Tensor) -> Tensor:
    """Calls with generated work between them: their order is free."""
    a, b = torch.bmm(x, y).relu(), torch.bmm(y, x).tanh()
    return torch.bmm(a, a).sum(-1).sigmoid() + torch.bmm(b, b).sum(-1).exp()[:, : x.shape[1]]


POINTWISE: dict[str, Program] = {
    "sin": (lambda x: x.sin() + 1, of((5, 7))),
    "gelu": (lambda x: F.gelu(x) * 2, of((33, 65))),
    "silu gate": (lambda x, y: F.silu(x) * y, of((9, 40), (9, 40))),
    "broadcast": (lambda x, y: x * y + y.exp(), of((8, 1, 20), (6, 20))),
    "transposed": (lambda x, y: x.t() * y, of((48, 17), (17, 48))),
    "permuted": (lambda x, y: x.permute(2, 0, 1) + y, of((4, 20, 33), (33, 4, 20))),
    "where": (lambda x, y: torch.where(x > y, x, y.neg()), of((31, 18), (31, 18))),
    "clamp": (lambda x: x.clamp(-1, 1).abs().sqrt(), of((100,))),
    "cast": (lambda x: (x * 3).to(torch.int32).float() / 2, of((6, 30))),
    "mixed types": (lambda x, y: x.float() + y.double(), of((7, 21), (7, 21))),
    "compare": (lambda x, y: (x > y) & (x < 1) | ~(y > 0), of((5, 50), (5, 50))),
    "integers": (lambda x: (x.to(torch.int64) * 3 + 1) // 2 % 5, of((10, 10))),
    "one element": (lambda x: x + 1, of((1,))),
    "strided": (lambda x: x[::2, 1::3].exp(), of((20, 40))),
    "expanded": (lambda x: x[:, None].expand(-1, 6, -1) * 2, of((5, 16))),
    "scalar input": (lambda x, n: x * n, lambda dtype: (*of((4, 5))(dtype), 3)),
}
REDUCTIONS: dict[str, Program] = {
    "sum": (lambda x: x.sum(), of((40, 30))),
    "row sums": (lambda x: x.sum(-1), of((40, 30))),
    "column sums": (lambda x: x.sum(0), of((40, 33))),
    "mean and variance": (lambda x: (x.mean(1), x.var(1)), of((17, 50))),
    "argmax": (lambda x: x.argmax(-1), of((9, 77))),
    "amax of a transposed": (lambda x, y: (x.t() + y).amax(1), of((48, 20), (20, 48))),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (64,), w, b), of((5, 64), (64,), (64,))),
    "layer norm across": (lambda x, y: F.layer_norm(x.mT + y, (48,)), of((2, 48, 20), (2, 20, 48))),
    "layer norm across, long": (lambda x, y: F.layer_norm(x.mT + y, (51,)), of((2, 51, 37), (2, 37, 51))),
    "rms norm": (rms_norm, of((6, 96), (96,))),
    "group norm": (lambda x: F.group_norm(x, 4), of((2, 8, 5, 5))),
    "batch norm": (lambda x, m, v: F.batch_norm(x, m, v.abs() + 1), of((3, 6, 4, 4), (6,), (6,))),
    "softmax": (lambda x: x.softmax(-1), of((11, 45))),
    "softmax of columns": (lambda x: x.softmax(0), of((45, 19))),
    "log softmax and gather": (logits_loss, with_index((6, 30), n=30, size=6)),
    "norm": (lambda x: x / x.norm(dim=-1, keepdim=True), of((8, 24))),
    "cumsum": (lambda x: x.cumsum(-1), of((4, 40))),
    "any and all": (lambda x: ((x > 0).any(1), (x > 0).all(0)), of((12, 13))),
    "logsumexp": (lambda x: x.logsumexp(1) * 2, of((7, 33))),
    "product": (lambda x: x.float().prod(1), of((5, 12))),
}
UPDATES: dict[str, Program] = {
    "add": (lambda c, x: c.add_(x), of((30, 20), (30, 20))),
    "where across": (in_place_where, of((17, 48), (48, 17))),
    "where across, square": (in_place_where, of((33, 33), (33, 33))),
    "masked across": (in_place_masked, lambda dtype: (*of((17, 48), (48, 17))(dtype), torch.ones(17, 48).bool())),
    "two updates": (two_updates, of((20, 35), (35, 20))),
    "slice": (slice_update, of((10, 40), (8, 20))),
    "copy across": (lambda c, x: c.copy_(x.t()), of((21, 48), (48, 21))),
    "running mean": (lambda m, x: m.mul_(0.9).add_(x.mean(0), alpha=0.1), of((50,), (8, 50))),
    "fill": (lambda c, x: c.masked_fill_(x > 0, 0.5), of((14, 15), (14, 15))),
    "row": (lambda c, x: c[3].add_(x), of((8, 60), (60,))),
    "update and view": (lambda c, x: c.view(-1).add_(x.flatten()), of((6, 8), (6, 8))),
}
INDEXING: dict[str, Program] = {
    "embedding": (lambda w, i: F.embedding(i, w) * 2, with_index((50, 32), n=50, size=9)),
    "index_select": (lambda x, i: x.index_select(1, i).relu(), with_index((6, 40), n=40, size=11)),
    "gather rows": (lambda x, i: x[i] + x[:11], with_index((40, 24), n=40, size=11)),
    "index_put": (lambda c, x, i: c.index_put((i,), x), with_index((40, 24), (11, 24), n=40, size=11)),
    "index_add": (lambda c, x, i: c.index_add(0, i, x), with_index((40, 24), (11, 24), n=40, size=11)),
    "scatter": (
        lambda c, x, i: c.scatter(0, i[:, None].expand(-1, 24), x),
        with_index((40, 24), (11, 24), n=40, size=11),
    ),
    "scatter_add": (lambda c, i: c.scatter_add(0, i, c[:11]), with_index((40,), n=40, size=11)),
    "update by index": (lambda c, x, i: c.index_copy_(0, i, x * 2), with_index((40, 24), (11, 24), n=40, size=11)),
    "sort": (lambda x: x.sort(-1), of((4, 30))),
    "topk": (lambda x: x.topk(5, -1), of((4, 30))),
    "one hot": (lambda x, i: F.one_hot(i, 20) * x[0, 0], with_index((3, 3), n=20, size=6)),
    "tril": (lambda x: x.tril(1) + x.triu(2), of((20, 22))),
    "flip and roll": (lambda x: x.flip(1) + x.roll(3, 1), of((5, 26))),
}
LAYOUTS: dict[str, Program] = {
    "cat": (lambda x, y: torch.cat([x * 2, y + 1], -1), of((6, 20), (6, 13))),
    "cat of a product": (lambda x, y: torch.cat([torch.bmm(x, y), x.relu()], -1), of((3, 40, 40), (3, 40, 40))),
    "cat of views": (lambda x: torch.cat([x[:, 5:], x[:, :5]], 1), of((7, 22))),
    "stack": (lambda x, y: torch.stack([x, y.exp()], 1), of((6, 20), (6, 20))),
    "clone across": (lambda x: x.mT.contiguous() + 1, of((3, 20, 34))),
    "clone of a product": (lambda x, y: torch.bmm(x, y).transpose(0, 1).contiguous(), of((3, 40, 8), (3, 8, 40))),
    "channels last": (lambda x: x.to(memory_format=torch.channels_last) * 2, of((2, 8, 6, 6))),
    "split heads": (lambda x: x.view(2, 10, 4, 8).transpose(1, 2).contiguous(), of((2, 10, 32))),
    "rotary": (rotated, of((2, 4, 10, 16), (10, 8))),
    "pad": (lambda x: F.pad(x, (1, 2, 0, 3)), of((5, 18))),
    "unfold": (lambda x: x.unfold(1, 4, 2).sum(-1), of((3, 30))),
    "repeat": (lambda x: x.repeat(2, 3) - 1, of((5, 9))),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), of((4, 5))),
    "as_strided": (lambda x: x.as_strided((5, 7), (8, 1), 2) * 2, of((8, 8))),
    "no change": (lambda x: x.view(x.shape) + 0, of((8, 8))),
    "nothing to compute": (lambda x: (x.view(-1), x.t()), of((8, 9))),
}
CALLS: dict[str, Program] = {
    "matrix product": (lambda x, y: (x @ y).relu(), of((40, 50), (50, 60))),
    "linear, many rows": (lambda x, w, b: F.gelu(F.linear(x, w, b)), of((64, 48), (32, 48), (32,))),
    "computed right side": (lambda x, w: x @ w.exp(), of((4, 16), (16, 24))),
    "batched product": (lambda x, y: torch.bmm(x, y) * 0.5, of((3, 40, 9), (3, 9, 50))),
    "two chains": (two_chains, of((3, 40, 40), (3, 40, 40))),
    "scores and softmax": (lambda q, k: (q @ k.mT).softmax(-1), of((2, 3, 40, 16), (2, 3, 9, 16))),
    "convolution": (lambda x, w: F.conv2d(x, w).relu(), of((1, 4, 8, 8), (6, 4, 3, 3))),
    "convolution of a line": (lambda x, w: F.gelu(F.conv1d(x, w, padding=1)), of((2, 4, 20), (8, 4, 3))),
    "max pool": (lambda x: F.max_pool2d(x, 2), of((2, 3, 8, 8))),
    "average pool": (lambda x: F.avg_pool2d(x, 3, 1), of((2, 3, 8, 8))),
    "interpolate": (lambda x: F.interpolate(x, scale_factor=2.0), of((1, 2, 6, 6))),
    "einsum": (lambda x, y: torch.einsum("bik,bjk->bij", x, y).tanh(), of((2, 40, 8), (2, 50, 8))),
}
PROGRAMS: dict[str, Program] = {
    f"{kind}: {name}": program
    for kind, programs in {
        "pointwise": POINTWISE,
        "reduction": REDUCTIONS,
        "update": UPDATES,
        "indexing": INDEXING,
        "layout": LAYOUTS,
        "call": CALLS,
    }.items()
    for name, program in programs.items()
}
