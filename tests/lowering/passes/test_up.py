"""`decode` and the product of each head's result become `decode_up`, however written; near misses are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters

from flashmla_ops.errors import ArgumentError
from lowering import Settings
from tests.lowering.compiled import Compiled
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, operators, rewrite, traced
from tests.support.cases import DecodeCase, build

B, S, H, D_V, D_UP = 2, 3, 4, 16, 8
CASE = DecodeCase((9, 30), s_q=S, h_q=H, d=24, d_v=D_V, page_size=8, dtype="float32", causal=True, strided=False)

#: q, kv_cache, block_table, cache_seqlens, weight [h_q, d_up, d_v].
Tensors = tuple[Tensor, ...]


def inputs(case: DecodeCase = CASE) -> Tensors:
    made = build(case)
    weight = torch.randn(case.h_q, D_UP, D_V, generator=torch.Generator().manual_seed(1)).to(made.q.dtype)
    return made.q, made.kv_cache.nan_to_num(0.0), made.block_table, made.cache_seqlens, weight


def decode(q: Tensor, kv_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.flashmla.decode(q, kv_cache, None, block_table, cache_seqlens, D_V, causal=True)


def behind(product: Callable[..., Any]) -> Callable[..., Any]:
    """A product of what was attended to, [b, s_q, h_q, d_v], and the weight, [h_q, d_up, d_v]."""
    return lambda *x: product(decode(*x[:4])[0], x[4])


def by_head(out: Tensor) -> Tensor:  # [h_q, b * s_q, d_v]
    return out.flatten(0, 1).transpose(0, 1)


def in_groups(out: Tensor, weight: Tensor) -> Tensor:
    """Heads in two dimensions, as grouped heads are written."""
    out = out.unflatten(2, (2, 2)).permute(2, 3, 0, 1, 4)
    return torch.einsum("kgbsc,kgdc->bskgd", out, weight.unflatten(0, (2, 2))).flatten(2)


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": lambda out, w: torch.bmm(by_head(out), w.mT).transpose(0, 1).reshape(B, S, H * D_UP),
    "flashmla.bmm": lambda out, w: torch.ops.flashmla.bmm(by_head(out), w.mT).transpose(0, 1).reshape(B, S, -1),
    "matmul": lambda out, w: (out.transpose(1, 2) @ w.mT).transpose(1, 2).flatten(2),
    "einsum": lambda out, w: torch.einsum("bshc,hdc->bshd", out, w).flatten(2),
    "einsum-weight-first": lambda out, w: torch.einsum("hdc,bshc->bshd", w, out).flatten(2),
    "weight-left": lambda out, w: torch.bmm(w, by_head(out).mT).permute(2, 0, 1).reshape(B, S, -1),
    "groups": in_groups,
    "part-of-kv_b_proj": lambda out, w: torch.einsum("bshc,hdc->bshd", out, w[:, 3:]),
    "contiguous-weight": lambda out, w: torch.bmm(by_head(out), w.mT.contiguous()),
    "result-as-it-is": lambda out, w: torch.bmm(by_head(out), w.mT),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_for_each_head(name: str) -> None:
    function, tensors = behind(PRODUCTS[name]), inputs()
    graph = traced(function, *tensors)
    record = rewrite(graph)
    assert [d.rewritten for d in record] == [True], "\n".join(map(str, record))
    assert operators(graph) == ["decode_up"]
    assert_equal_to(graph(*tensors), function(*tensors))


@pytest.mark.parametrize("case", [CASE, DecodeCase((7,), h_q=3, d=24, d_v=D_V, page_size=4, dtype="float32")])
def test_the_lse_may_be_used_too(case: DecodeCase) -> None:
    def function(*x: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = decode(*x[:4])
        weighed = lse.exp()
        return torch.einsum("bshc,hdc->bshd", out, x[4]), weighed

    tensors = inputs(case)
    graph = traced(function, *tensors)
    rewrite(graph)
    assert operators(graph) == ["decode_up"]
    for actual, expected in zip(graph(*tensors), function(*tensors), strict=True):
        assert_equal_to(actual, expected)


def test_arguments_are_kept() -> None:
    def function(*x: Tensor) -> Tensor:
        sink = torch.zeros(H)
        out, _ = torch.ops.flashmla.decode(
            x[0], x[1][..., :20], x[1][..., 20:], *x[2:4], D_V, 0, 0.3, False, None, "native", sink, 2
        )
        return torch.einsum("bshc,hdc->bshd", out, x[4])

    tensors = inputs()
    graph = traced(function, *tensors)
    rewrite(graph)
    assert operators(graph) == ["decode_up"]
    assert_equal_to(graph(*tensors), function(*tensors))


class NearMiss(NamedTuple):
    product: Callable[[Tensor, Tensor], Any]
    reason: str  # a part of it


NEAR_MISSES = {
    "attended-returned": NearMiss(lambda out, w: (torch.bmm(by_head(out), w.mT), out), "another use, output"),
    "attended-normalised": NearMiss(lambda out, w: (torch.bmm(by_head(out), w.mT), out.norm()), "another use"),
    "scaled": NearMiss(lambda out, w: torch.bmm(by_head(out * 2), w.mT), ""),
    "cast": NearMiss(
        lambda out, w: torch.bmm(by_head(out.double()), w.mT.double()), "computed from what was attended to"
    ),
    "cast-down": NearMiss(
        lambda out, w: torch.bmm(by_head(out).half(), w.mT.half()), "computed from what was attended to"
    ),
    "some-heads": NearMiss(lambda out, w: torch.bmm(by_head(out[:, :, :2]), w[:2].mT), "takes a part"),
    "last-query": NearMiss(lambda out, w: torch.bmm(out[:, -1].transpose(0, 1), w.mT), "takes a part"),
    "part-of-d_v": NearMiss(lambda out, w: torch.bmm(by_head(out[..., :8]), w.mT[:, :8]), "takes a part"),
    "one-weight-for-all": NearMiss(
        lambda out, w: torch.bmm(by_head(out), w[:1].mT.expand(H, -1, -1)), "the same for several heads"
    ),
    "weight-by-sequence": NearMiss(
        lambda out, w: torch.bmm(out.flatten(1, 2), w[:B].mT), "which are sequences or queries"
    ),
    "sum-over-heads": NearMiss(
        lambda out, w: torch.bmm(out.transpose(2, 3).flatten(0, 1), w.flatten()[: B * S * H * 5].view(B * S, H, 5)),
        "not the d_v",
    ),
    "with-itself": NearMiss(lambda out, w: torch.bmm(by_head(out), by_head(out).mT), "both factors"),
    "two-products": NearMiss(
        lambda out, w: (torch.bmm(by_head(out), w.mT), torch.bmm(by_head(out), w.mT * 2)), "another use, bmm"
    ),
    "weight-of-the-result": NearMiss(
        lambda out, w: torch.bmm(by_head(out), (w + torch.arange(5.0).sum()).mT), "computed after the attention"
    ),
    "scattered-weight": NearMiss(
        lambda out, w: torch.bmm(by_head(out), torch.as_strided(w, (H, D_V, 4), (D_UP * D_V, 4, 3))),
        "",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    miss, tensors = NEAR_MISSES[name], inputs()
    graph = traced(behind(miss.product), *tensors)
    record = rewrite(graph)
    assert "decode_up" not in operators(graph)
    assert "decode" in operators(graph)
    reasons = [decision.reason for decision in record]
    assert all(reasons)
    if miss.reason:
        assert any(miss.reason in reason for reason in reasons), reasons
    expected = behind(miss.product)(*tensors)
    pairs = (
        zip(graph(*tensors), expected, strict=True) if isinstance(expected, tuple) else [(graph(*tensors), expected)]
    )
    for actual, wanted in pairs:
        assert_equal_to(actual, wanted, tolerance=1e-2 if name == "cast-down" else 2e-5)


@pytest.mark.parametrize(
    "product",
    [lambda out, w: out.flatten(2) @ w.flatten(0, 1).mT[: H * D_V // 4].repeat(4, 1), lambda out, w: out + 1],
    ids=["output projection", "no product"],
)
def test_what_is_no_candidate_is_not_mentioned(product: Callable[[Tensor, Tensor], Tensor]) -> None:
    graph = traced(behind(product), *inputs())
    assert len(rewrite(graph)) == 0
    assert operators(graph) == ["decode"]


def test_sizes_that_are_not_static() -> None:
    graph = traced(behind(PRODUCTS["bmm"]), *inputs(), mode="symbolic")
    (refusal,) = rewrite(graph)
    assert refusal.reason
    assert operators(graph) == ["decode"]


def test_a_gradient_is_required() -> None:
    """The product of a weight that is trained needs what was attended to for its backward."""
    compiled = Rewritten(behind(PRODUCTS["bmm"]))
    *rest, weight = inputs()
    with torch.enable_grad():
        compiled(*rest, weight.requires_grad_())
    assert compiled.refusals
    assert all("a gradient" in refusal or "another use" in refusal for refusal in compiled.refusals)
    assert not any("decode_up" in operators(graph) for graph in compiled.graphs)


def test_batches_and_lengths_of_any_size_are_one_graph() -> None:
    compiled = Rewritten(behind(PRODUCTS["einsum"]))
    for lengths in ((9, 30), (5, 0, 7), (40,) * 5):
        tensors = inputs(DecodeCase(**{**CASE.__dict__, "lengths": lengths}))
        for x in (tensors[0], tensors[2], tensors[3]):
            torch._dynamo.mark_dynamic(x, 0)
        assert_equal_to(compiled(*tensors), behind(PRODUCTS["einsum"])(*tensors))
    assert compiled.refusals == []
    assert all(operators(graph) == ["decode_up"] for graph in compiled.graphs)
    assert len(compiled.graphs) <= 2


def step(cache: Tensor, rows: Tensor, slots: Tensor, *x: Tensor) -> Tensor:
    """Two layers that write to one cache: the first must read it before the second writes."""
    torch.ops.flashmla.append_(cache, rows, slots)
    first = behind(PRODUCTS["bmm"])(x[0], cache, *x[1:])
    torch.ops.flashmla.append_(cache, rows * 2, slots)
    return first + behind(PRODUCTS["bmm"])(x[0], cache, *x[1:])


@pytest.mark.parametrize(("choice", "calls"), [("auto", "decode_up"), (True, "decode_up"), (False, "decode")])
def test_the_setting_decides_and_no_cache_is_copied(choice: bool | str, calls: str) -> None:
    q, cache, table, lengths, weight = inputs()
    rows, slots = torch.randn(2, 1, 24), torch.tensor([int(page) * 8 for page in table[:, 0]])
    compiled = Compiled(step, options={"flashmla.decode_up": choice})
    actual, expected = cache.clone(), cache.clone()
    assert_equal_to(
        compiled(actual, rows, slots, q, table, lengths, weight), step(expected, rows, slots, q, table, lengths, weight)
    )
    assert torch.equal(actual, expected)
    ours = [each.name for each in compiled.program.steps if each.kind == "flashmla"]
    assert ours.count(f"flashmla.{calls}.default") == 2
    assert ("flashmla.decode_up.default" in ours) == (choice is not False)
    assert ReinplaceCounters.get_total_missed() == 0


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ArgumentError, match="expected one of 'auto', True, False, got 'always'"):
        Settings(decode_up="always")
