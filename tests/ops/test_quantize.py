"""Rows of bytes: their definitions, and `append_` that quantises on the way into a cache."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from flashmla_ops import reference
from flashmla_ops.errors import from_message
from flashmla_ops.formats import FP8_V32, INT8_G128, QUANTIZED
from tests.strategies import DTYPES, SEEDS
from tests.support.poison import same_bits, strided
from tests.support.rows import empty_cache

NOWHERE = -(2**63)


def rows_of(n: int, dtype: str, seed: int, spread: float = 1.0, h_kv: int = 1, d: int = 576) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, h_kv, d, generator=generator) * spread).to(getattr(torch, dtype))


def test_the_layout_is_the_official_one() -> None:
    row = FP8_V32
    assert (row.elements, row.bytes, row.scales_at, row.rope_at, row.groups) == (576, 656, 512, 528, 4)


def by_hand(row: Tensor) -> tuple[list[float], list[float]]:
    """Scales and values of one row, written apart from the definition: search the scale, then the nearest e4m3."""
    grid = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()  # 0 to 448
    scales, values = [], []
    for group in row[:512].double().split(128):
        scale = next(2.0**k for k in range(-13, 130) if float(group.abs().max()) <= 448 * 2.0**k)
        scales.append(scale)
        for x in (group / scale).tolist():
            distance = (grid - abs(x)).abs()
            nearest = (distance == distance.min()).nonzero().flatten().tolist()
            code = next((n for n in nearest if n % 2 == 0), nearest[0])
            values.append(math.copysign(float(grid[code]), x) * scale)
    return scales, values


@settings(max_examples=15)
@given(st.sampled_from(DTYPES), st.sampled_from([1e-6, 0.01, 1.0, 300.0]), SEEDS)
def test_quantised_rows_are_the_nearest(dtype: str, spread: float, seed: int) -> None:
    row = rows_of(1, dtype, seed, spread)[0, 0]
    made = torch.ops.flashmla.quantize_rows(row)
    scales, values = by_hand(row)
    assert made[512:528].view(torch.float32).tolist() == scales
    back = torch.ops.flashmla.dequantize_rows(made, dtype=torch.float32)
    assert back[:512].tolist() == values
    assert torch.equal(back[512:], row[512:].bfloat16().float())


def test_scales_at_the_edges() -> None:
    """448 fits scale 1 and the next number does not; a group of zeros has the least scale; NaN and Inf have no say."""
    row = torch.zeros(576)
    row[0], row[128], row[256] = 448.0, math.nextafter(448.0, 500.0) + 1e-3, math.nan
    row[257], row[258] = math.inf, -1.0
    made = torch.ops.flashmla.quantize_rows(row)
    assert made[512:528].view(torch.float32).tolist() == [1.0, 2.0, 2.0**-8, 2.0**-13]
    back = torch.ops.flashmla.dequantize_rows(made, dtype=torch.float32)
    assert back[0] == 448
    assert back[256].isnan()
    assert back[257].isnan()
    assert back[258] == -1
    assert (back[384:512] == 0).all()


def test_int8_rows_by_hand() -> None:
    """The largest of a group is 127; zeros stay zeros; a group with a NaN or an infinity is NaN whole."""
    row = torch.zeros(576)
    row[:3] = torch.tensor([-254.0, 1.0, 3.0])
    row[128], row[129], row[256], row[400] = 1e-45, 0.0, math.nan, -math.inf
    row[512:] = torch.linspace(-3, 3, 64)
    made = torch.ops.flashmla.quantize_rows(row, "int8_g128")
    assert made.view(torch.int8)[:3].tolist() == [-127, 0, 2]
    assert made[512:516].view(torch.float32).item() == 2.0
    back = torch.ops.flashmla.dequantize_rows(made, "int8_g128", torch.float32)
    assert back[:4].tolist() == [-254.0, 0.0, 4.0, 0.0]
    assert (back[128:256] == 0).all()
    assert back[256:512].isnan().all()
    assert torch.equal(back[512:], row[512:].bfloat16().float())
    assert INT8_G128.bytes == 656


@settings(max_examples=20)
@given(st.sampled_from(DTYPES), st.sampled_from([1e-30, 0.01, 300.0]), SEEDS)
def test_int8_errs_by_half_a_step(dtype: str, spread: float, seed: int) -> None:
    rows = rows_of(3, dtype, seed, spread)
    back = torch.ops.flashmla.dequantize_rows(torch.ops.flashmla.quantize_rows(rows, "int8_g128"), "int8_g128")
    groups = rows[..., :512].double().unflatten(-1, (4, 128))
    step = groups.abs().amax(-1, keepdim=True) / 127
    error = (
        INT8_G128.dequantize(torch.ops.flashmla.quantize_rows(rows, "int8_g128"))[..., :512] - groups.flatten(-2)
    ).abs()
    assert (error <= (0.5 + 1e-4) * step.expand_as(groups).flatten(-2)).all()
    assert back.dtype == torch.bfloat16


@given(SEEDS)
@settings(max_examples=20)
def test_what_was_quantised_once_stays(seed: int) -> None:
    once = torch.ops.flashmla.quantize_rows(rows_of(3, "float32", seed))
    back = torch.ops.flashmla.dequantize_rows(once, dtype=torch.float32)
    again = torch.ops.flashmla.dequantize_rows(torch.ops.flashmla.quantize_rows(back), dtype=torch.float32)
    assert torch.equal(back, again)
    assert same_bits(torch.ops.flashmla.dequantize_rows(once.view(torch.float8_e4m3fn)), back.bfloat16())


@settings(max_examples=60)
@given(
    slots=st.lists(st.integers(0, 11) | st.sampled_from([-1, NOWHERE]), max_size=9),
    h_kv=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    byte=st.sampled_from([torch.uint8, torch.float8_e4m3fn]),
    gaps=st.booleans(),
    lay_out=st.booleans(),
    special=st.booleans(),
    row_format=st.sampled_from(sorted(QUANTIZED)),
    seed=SEEDS,
)
def test_append_writes_what_quantize_rows_makes(
    slots: list[int],
    h_kv: int,
    dtype: str,
    byte: torch.dtype,
    gaps: bool,
    lay_out: bool,
    special: bool,
    row_format: str,
    seed: int,
) -> None:
    row = QUANTIZED[row_format]
    h_kv = 1 if row.tail else h_kv
    rows = rows_of(len(slots), dtype, seed, h_kv=h_kv, d=row.elements)
    if special:
        rows.view(-1)[:: 37 + seed % 5] = torch.tensor([math.nan, math.inf, -math.inf, -0.0, 6e-8])[seed % 5]
    if lay_out:
        rows = strided(rows, torch.Generator().manual_seed(seed), contiguous_rows=False)
    actual, expected = (empty_cache(row, 3, 4, gaps=gaps, h_kv=h_kv, dtype=byte, byte=77) for _ in range(2))
    mapping = torch.tensor(slots, dtype=torch.int64)
    torch.ops.flashmla.append_(actual, rows, mapping, row_format)
    reference.append(expected, rows, mapping, row_format)
    whole = [x if x._base is None else x._base for x in (actual, expected)]
    assert same_bits(*(x.view(torch.uint8) for x in whole))


def test_many_rows_for_few_slots_keep_their_order() -> None:
    rows = rows_of(3000, "bfloat16", 0)
    cache = torch.zeros(2, 4, 1, 656, dtype=torch.uint8)
    torch.ops.flashmla.append_(cache, rows, torch.arange(3000) % 7, row_format="fp8_v32")
    last = torch.ops.flashmla.quantize_rows(rows[-7:, 0])
    where = torch.arange(2993, 3000) % 7
    assert torch.equal(cache.flatten(0, 1)[where, 0], last)
    assert (cache[1, 3] == 0).all()


@pytest.mark.parametrize("bad", [8, 2**62])
def test_a_bad_slot_raises_and_nothing_is_written(bad: int) -> None:
    cache = torch.full((2, 4, 1, 656), 9, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"argument 'slot_mapping': expected slots below 8, got \d+ at \[1\]"):
        torch.ops.flashmla.append_(cache, rows_of(2, "float32", 0), torch.tensor([0, bad]), "fp8_v32")
    assert (cache == 9).all()


BYTES = torch.zeros(2, 4, 1, 656, dtype=torch.uint8)
MISUSES = {
    "row_format": ({"row_format": "fp9"}, "one of native, fp8_v32"),
    "cache-dtype": ({"kv_cache": BYTES.float()}, "uint8 or float8_e4m3fn"),
    "cache-width": ({"kv_cache": BYTES[..., :655]}, "rows of 656 bytes"),
    "cache-strides": ({"kv_cache": torch.zeros(2, 4, 1, 1312, dtype=torch.uint8)[..., ::2]}, "a contiguous last"),
    "cache-page_size": ({"kv_cache": BYTES[:, :0]}, "page_size of at least 1"),
    "rows-dtype": ({"rows": torch.zeros(3, 1, 576, dtype=torch.int32)}, "float32, bfloat16 or float16"),
    "rows-width": ({"rows": torch.zeros(3, 1, 577)}, "rows of 576 elements"),
    "rows-heads": ({"rows": torch.zeros(3, 2, 576)}, "1 KV heads, as kv_cache"),
    "rows-count": ({"rows": torch.zeros(4, 1, 576)}, "one row for each slot"),
    "slots": ({"slot_mapping": torch.zeros(3, dtype=torch.int32)}, "int64"),
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_of_append(name: str) -> None:
    changes, expected = MISUSES[name]
    good = {"kv_cache": BYTES, "rows": torch.zeros(3, 1, 576), "slot_mapping": torch.zeros(3, dtype=torch.int64)}
    kwargs = {**good, "row_format": "fp8_v32", **changes}
    with pytest.raises(RuntimeError) as caught:
        torch.ops.flashmla.append_(**kwargs)
    error = from_message(str(caught.value))
    assert error.op == "append_"
    assert error.expected.startswith(expected)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as faked:
        torch.ops.flashmla.append_(**{k: mode.from_tensor(x) if torch.is_tensor(x) else x for k, x in kwargs.items()})
    assert str(faked.value) == str(caught.value)


@pytest.mark.parametrize(
    ("op", "arguments", "expected"),
    [
        ("quantize_rows", (torch.zeros(2, 577),), "rows of 576 elements"),
        ("quantize_rows", (torch.zeros(576, dtype=torch.int8),), "float32, bfloat16 or float16"),
        ("quantize_rows", (torch.zeros(576), "native"), "one of fp8_v32, int8_g128"),
        ("dequantize_rows", (torch.zeros(576, dtype=torch.uint8),), "rows of 656 bytes"),
        ("dequantize_rows", (torch.zeros(656),), "uint8 or float8_e4m3fn"),
        ("dequantize_rows", (torch.zeros(656, dtype=torch.uint8), "fp8_v32", torch.int8), "float32, bfloat16"),
    ],
)
def test_misuse(op: str, arguments: tuple[object, ...], expected: str) -> None:
    with pytest.raises(RuntimeError) as caught:
        getattr(torch.ops.flashmla, op)(*arguments)
    error = from_message(str(caught.value))
    assert error.op == op
    assert error.expected.startswith(expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: str) -> None:
    rows = rows_of(3, dtype, 0)
    opcheck(torch.ops.flashmla.quantize_rows.default, (rows,))
    made = torch.ops.flashmla.quantize_rows(rows)
    opcheck(torch.ops.flashmla.dequantize_rows.default, (made, "fp8_v32", rows.dtype))
    slots = torch.tensor([5, -1, 0])
    opcheck(torch.ops.flashmla.append_.default, (torch.zeros_like(BYTES), rows, slots, "fp8_v32"))


def test_vmap() -> None:
    rows = rows_of(6, "float32", 0).view(2, 3, 576)
    made = torch.vmap(torch.ops.flashmla.quantize_rows, 1)(rows)
    assert torch.equal(made, torch.ops.flashmla.quantize_rows(rows.transpose(0, 1)))
    assert torch.equal(torch.vmap(torch.ops.flashmla.dequantize_rows)(made), torch.ops.flashmla.dequantize_rows(made))
