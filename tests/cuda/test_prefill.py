"""`flashmla::prefill` on CUDA, with torch's kernel stood in for by what it is documented to compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmla_ops import reference
from flashmla_ops.cuda import prefill
from flashmla_ops.cuda.catalogue import DEVICES
from flashmla_ops.cuda.engine import Engine
from tests.support.compare import OFFICIAL_LSE, OFFICIAL_OUT, difference

NO_KERNEL = Engine(DEVICES["sm_80"], lambda *_: pytest.fail("a kernel of ours"))


def flash(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, *rest: Any, scale: float
) -> list[Tensor]:
    dropout, causal, debug = rest
    assert (dropout, debug) == (0.0, False)
    assert q.size(2) == k.size(2) == v.size(2)
    assert q.size(2) % 8 == 0
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    out, lse = reference.prefill(q, k, v, cu_q, cu_k, causal, scale)
    return [out.to(q.dtype), lse.float()]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    prefill.proven.cache_clear()
    yield
    prefill.proven.cache_clear()


def inputs(d_qk: int = 24, d_v: int = 16, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = (9, 4, d_qk), (12, 2, d_qk), (12, 2, d_v)
    q, k, v = (torch.randn(shape, generator=generator).mul(0.3).to(dtype) for shape in shapes)
    bounds = torch.tensor([0, 3, 3, 9]), torch.tensor([0, 0, 5, 12])
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": bounds[0], "cu_seqlens_k": bounds[1]}


@pytest.mark.parametrize("sizes", [(24, 16), (16, 24), (20, 12), (64, 64)])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softmax_scale": 0.3}], ids=str)
def test_it_is_torchs(sizes: tuple[int, int], options: dict[str, Any]) -> None:
    given = inputs(*sizes) | options
    out, lse = prefill.prefill(NO_KERNEL, **given)
    expected, expected_lse = reference.prefill(**given)
    assert out.is_contiguous()
    assert difference("out", out, expected.bfloat16(), OFFICIAL_OUT) is None
    assert difference("lse", lse, expected_lse.float(), OFFICIAL_LSE) is None
    assert list(NO_KERNEL.chosen.values())[-1] == "torch's flash attention"


@pytest.mark.parametrize(
    ("changes", "why"),
    [({"d_qk": 264}, "256"), ({"dtype": torch.float32}, "float32"), ({"softmax_scale": -1.0}, "above 0")],
    ids=str,
)
def test_the_rest_is_the_definition(changes: dict[str, Any], why: str) -> None:
    options = {"softmax_scale": changes.pop("softmax_scale")} if "softmax_scale" in changes else {}
    given = inputs(**changes) | options
    engine = Engine(DEVICES["sm_80"], NO_KERNEL.prepare)
    out, _ = prefill.prefill(engine, **given)
    assert torch.equal(out, reference.prefill(**given)[0].to(out.dtype))
    assert why in next(iter(engine.chosen.values()))


def upper_left(*tensors: Tensor, scale: float) -> list[Tensor]:
    """The mask of FlashAttention before 2.1: row s sees the keys up to s."""
    q, k, v, cu_q, cu_k, *rest = tensors
    counts = torch.minimum(cu_q.diff(), cu_k.diff())
    shorter = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    keys = torch.cat([torch.arange(int(a), int(a + n)) for a, n in zip(cu_k, counts, strict=False)])
    return flash(q, k[keys], v[keys], cu_q, shorter, q.size(0), q.size(0), *rest[2:], scale=scale)


@pytest.mark.parametrize(
    "other",
    [
        upper_left,
        lambda *tensors, scale: [x if i == 0 else x.mT for i, x in enumerate(flash(*tensors, scale=scale))],
        lambda *tensors, scale: [x.nan_to_num(0.0, 0.0, 0.0) for x in flash(*tensors, scale=scale)],
        lambda *tensors, scale: flash(*tensors, scale=2 * scale),
    ],
)
def test_another_kernel_is_not_trusted(other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", other)
    engine = Engine(DEVICES["sm_80"], NO_KERNEL.prepare)
    out, _ = prefill.prefill(engine, **inputs())
    assert torch.equal(out, reference.prefill(**inputs())[0].to(out.dtype))
    assert "not what the definition is" in next(iter(engine.chosen.values()))


def test_without_keys_there_is_nothing_to_see() -> None:
    given = inputs()
    given |= {"k": given["k"][:0], "v": given["v"][:0], "cu_seqlens_k": torch.zeros(4, dtype=torch.int64)}
    out, lse = prefill.prefill(NO_KERNEL, **given)
    assert not out.any()
    assert (lse == torch.inf).all()


@pytest.mark.parametrize(
    ("given", "bent"),
    [
        ([0, 3, 9], [0, 3, 9]),
        ([5, -1, 3, 2], [0, 5, 5, 9]),
        ([0, 99], [0, 9]),
        ([0, 4, 99, 7], [0, 4, 9, 9]),
    ],
)
def test_boundaries_rise(given: list[int], bent: list[int]) -> None:
    found = prefill.boundaries(torch.tensor(given), 9)
    assert found.dtype == torch.int32
    assert found.tolist() == bent
