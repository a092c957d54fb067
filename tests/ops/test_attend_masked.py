"""`flashmla::attend_masked` against its float64 definition: masks that are spans of keys, and masks that are not."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from flashmla_ops.ops.attend_masked import ATTEND_MASKED
from tests.strategies import DTYPES, SEEDS
from tests.support.compare import Tolerance, difference

TOLERANCES = {
    "float32": Tolerance(1e-5, 1e-4, 1e-9),
    "bfloat16": Tolerance(2e-2, 8.01 / 128, 3e-5),
    "float16": Tolerance(2e-3, 1.01 / 128, 1e-6),
}

#: Keys that query i of s_q sees in a sequence of s_kv: by name, all of them [s_q, s_kv] bool.
MASKS = ("full", "prefix", "causal", "causal-prefix", "left", "left-causal", "window", "hole", "random", "none", "rows")
FORMS = ("bool", "-inf", "least", "least-of-bf16", "mixed", "bias")
LAYOUTS: dict[str, dict[str, int | None]] = {
    "two-tensors": {"d": 24, "d_v": 24, "qk_start": 24, "d_k": 16},
    "one-tensor": {"d": 40, "d_v": 24, "qk_start": 24, "d_k": None},
    "latents": {"d": 32, "d_v": 32, "qk_start": 0, "d_k": 8},
    "latents-one-tensor": {"d": 40, "d_v": 32, "qk_start": 0, "d_k": None},
}


def shown(kind: str, s_q: int, s_kv: int, generator: torch.Generator) -> Tensor:
    i, j = torch.arange(s_q)[:, None], torch.arange(s_kv)
    n = int(torch.randint(1, s_kv + 1, (), generator=generator))
    start = int(torch.randint(0, n, (), generator=generator))
    causal = j <= i + s_kv - s_q
    return {
        "full": j >= 0 * i,
        "prefix": j < n + 0 * i,
        "causal": causal,
        "causal-prefix": j <= i + n - s_q,
        "left": j >= start + 0 * i,
        "left-causal": (j >= start) & causal,
        "window": causal & (j > i + s_kv - s_q - n),
        "hole": causal & (j != start),
        "random": torch.rand(s_q, s_kv, generator=generator) < 0.5,
        "none": j < 0 * i,
        "rows": (i % 2 == 0) & causal,
    }[kind]


def additive(seen: Tensor, form: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    if form == "bool":
        return seen
    least = torch.finfo(torch.bfloat16 if form == "least-of-bf16" or dtype == torch.float16 else dtype).min
    mask_dtype = torch.float32 if dtype == torch.float16 else dtype
    hidden = torch.full_like(seen, -math.inf if form in ("-inf", "bias") else least, dtype=torch.float32)
    if form == "mixed":
        hidden = hidden.where(torch.rand(seen.shape, generator=generator) < 0.5, -math.inf)
    shift = torch.randn(seen.shape, generator=generator) if form == "bias" else torch.zeros(())
    return torch.where(seen, shift, hidden).to(mask_dtype)


@dataclass(frozen=True)
class Case:
    kinds: tuple[str, ...]  # of each sequence
    s_q: int = 3
    s_kv: int = 20
    group: int = 2
    h_kv: int = 2
    layout: str = "two-tensors"
    dtype: str = "float32"
    form: str = "bool"
    by_head: bool = False
    heads_first: bool = False
    nan_where_empty: bool = False
    seed: int = 0

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(self.seed)
        dtype, layout, b = getattr(torch, self.dtype), LAYOUTS[self.layout], len(self.kinds)
        d, d_v, qk_start, d_k = (layout[name] for name in ("d", "d_v", "qk_start", "d_k"))
        assert d is not None
        assert qk_start is not None

        def rows(heads: int, tokens: int, width: int) -> Tensor:
            x = torch.randn(b, *((heads, tokens) if self.heads_first else (tokens, heads)), width, generator=generator)
            return (x.transpose(1, 2) if self.heads_first else x).to(dtype)

        seen = torch.stack([shown(kind, self.s_q, self.s_kv, generator) for kind in self.kinds])[:, None]
        if self.by_head:
            seen = seen.repeat(1, self.h_kv * self.group, 1, 1)
            seen[:, -1, -1, 0] ^= True
        return {
            "q": rows(self.h_kv * self.group, self.s_q, d - qk_start + (d_k or 0)),
            "kv_cache": rows(self.h_kv, self.s_kv, d),
            "k_cache": None if d_k is None else rows(self.h_kv, self.s_kv, d_k),
            "mask": additive(seen, self.form, dtype, generator),
            "d_v": d_v,
            "qk_start": qk_start,
            "softmax_scale": 0.3,
            "nan_where_empty": self.nan_where_empty,
        }


def check(case: Case) -> None:
    arguments = case.arguments()
    out = torch.ops.flashmla.attend_masked(**arguments)
    assert out.dtype == getattr(torch, case.dtype)
    assert out.is_contiguous()
    wrong = difference("out", out, reference.attend_masked(**arguments), TOLERANCES[case.dtype])
    assert wrong is None, wrong


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("s_q", [1, 3])
@pytest.mark.parametrize("kind", MASKS)
def test_every_mask(kind: str, s_q: int, form: str) -> None:
    for nan_where_empty in (False, True):
        check(Case((kind, "causal", kind), s_q, form=form, nan_where_empty=nan_where_empty))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kinds", [("causal", "causal"), ("full", "left-causal"), ("hole", "causal", "rows")])
def test_long_queries(kinds: tuple[str, ...], layout: str) -> None:
    for heads_first in (False, True):
        check(Case(kinds, s_q=70, s_kv=90, layout=layout, heads_first=heads_first))


@given(st.data())
def test_any_case(data: st.DataObject) -> None:
    s_kv = data.draw(st.integers(1, 80))
    check(
        Case(
            kinds=tuple(data.draw(st.lists(st.sampled_from(MASKS), min_size=1, max_size=4))),
            s_q=data.draw(st.integers(1, 5)),
            s_kv=s_kv,
            group=data.draw(st.sampled_from([1, 2, 7])),
            h_kv=data.draw(st.integers(1, 3)),
            layout=data.draw(st.sampled_from(list(LAYOUTS))),
            dtype=data.draw(st.sampled_from(DTYPES)),
            form=data.draw(st.sampled_from(FORMS)),
            by_head=data.draw(st.booleans()),
            heads_first=data.draw(st.booleans()),
            nan_where_empty=data.draw(st.booleans()),
            seed=data.draw(SEEDS),
        )
    )


@pytest.mark.parametrize("kind", ["prefix", "causal-prefix", "left"])
@pytest.mark.parametrize("s_q", [1, 2])
def test_hidden_rows_are_not_read(kind: str, s_q: int) -> None:
    """The mask is a span: the other rows hold NaN here, as unused memory of a cache may."""
    if kind == "left" and s_q > 1:
        kind = "left-causal"
    arguments = Case((kind, "prefix" if s_q == 1 else "causal-prefix"), s_q, seed=3).arguments()
    expected = torch.ops.flashmla.attend_masked(**arguments)
    unseen = ~arguments["mask"].any(dim=2)[:, 0, :, None, None]
    assert unseen.any()
    for name in ("kv_cache", "k_cache"):
        arguments[name] = arguments[name].masked_fill(unseen, math.nan)
    assert torch.equal(torch.ops.flashmla.attend_masked(**arguments), expected)


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 20), (2, 1, 1, 1), (1, 4, 1, 20), (1, 1, 3, 20), (2, 1, 3, 1), (1, 1, 1, 1)]
)
def test_masks_that_are_broadcast(shape: tuple[int, ...]) -> None:
    for seed in range(3):
        arguments = Case(("full", "full"), seed=seed).arguments()
        arguments["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.7
        expanded = arguments | {"mask": arguments["mask"].expand(2, 4, 3, 20)}
        out = torch.ops.flashmla.attend_masked(**arguments)
        wrong = difference("out", out, reference.attend_masked(**expanded), TOLERANCES["float32"])
        assert wrong is None, wrong


def test_fp16_least_number_hides_nothing_of_a_large_score() -> None:
    q, rows = torch.full((1, 1, 1, 1), 300.0), torch.tensor([[1.0], [300.0]])[None, :, None]
    mask = torch.tensor([0.0, torch.finfo(torch.float16).min])[None, None, None]
    q, rows, mask = (x.half() for x in (q, rows, mask))
    assert torch.ops.flashmla.attend_masked(q, rows, None, mask, 1, softmax_scale=1.0).item() == 300


@pytest.mark.parametrize("form", ["bool", "least"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout: str, dtype: str, form: str) -> None:
    arguments = Case(("causal", "random"), layout=layout, dtype=dtype, form=form, heads_first=True).arguments()
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    result = opcheck(torch.ops.flashmla.attend_masked.default, (), arguments, test_utils=utilities)
    assert result == dict.fromkeys(utilities, "SUCCESS")


WRONG: dict[str, dict[str, Any]] = {
    "q": {"q": torch.zeros(2, 3, 4)},
    "q-dtype": {"q": torch.zeros(2, 3, 4, 16, dtype=torch.float64)},
    "q-empty": {"q": torch.zeros(2, 0, 4, 16)},
    "q-heads": {"q": torch.zeros(2, 3, 3, 16)},
    "q-width": {"q": torch.zeros(2, 3, 4, 15)},
    "sequences": {"kv_cache": torch.zeros(1, 20, 2, 24)},
    "no-tokens": {"kv_cache": torch.zeros(2, 0, 2, 24), "k_cache": torch.zeros(2, 0, 2, 16)},
    "rows": {"kv_cache": torch.zeros(2, 20, 24, 2).mT},
    "k-tokens": {"k_cache": torch.zeros(2, 19, 2, 16)},
    "k-dtype": {"k_cache": torch.zeros(2, 20, 2, 16).half()},
    "d_v": {"d_v": 25},
    "qk_start": {"qk_start": 25},
    "mask-dims": {"mask": torch.ones(3, 20, dtype=torch.bool)},
    "mask-dtype": {"mask": torch.ones(2, 1, 3, 20, dtype=torch.int64)},
    "mask-size": {"mask": torch.ones(2, 1, 3, 19, dtype=torch.bool)},
    "mask-heads": {"mask": torch.ones(2, 2, 3, 20, dtype=torch.bool)},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_refused(name: str) -> None:
    """By the kernel and by the fake, in the same words."""
    arguments = Case(("full", "full")).arguments() | WRONG[name]
    messages = []
    for function in (torch.ops.flashmla.attend_masked, ATTEND_MASKED.fake, ATTEND_MASKED.reference):
        with pytest.raises(Exception, match="flashmla::attend_masked") as raised:
            function(**arguments)
        messages.append(str(raised.value))
        assert from_message(messages[-1]) is not None
    assert len(set(messages)) == 1
