"""Bytes of rows that were worked out by hand, for every format of the official package and ours."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from flashmla_ops.formats import FP4_V41, FP8_MODEL1, FP8_V41, INT4_G32, QUANTIZED
from tests.support.poison import same_bits

INT = torch.int32


def quantised(elements: dict[int, float], name: str) -> Tensor:
    """A row of zeros but for a few elements, from C++ and by the definition."""
    row = torch.zeros(QUANTIZED[name].elements)
    for place, value in elements.items():
        row[place] = value
    cache = torch.full((1, 1, 1, QUANTIZED[name].bytes), 77, dtype=torch.uint8)
    torch.ops.flashmla.append_(cache, row[None, None], torch.tensor([0]), name)
    made = torch.ops.flashmla.quantize_rows(row, name)
    assert torch.equal(cache.flatten(), made)
    return made


def test_sizes() -> None:
    sizes = {name: (row.bytes, row.elements) for name, row in QUANTIZED.items()}
    assert sizes == {
        "fp8_v32": (656, 576),
        "int8_g128": (656, 576),
        "fp8_model1": (584, 512),
        "fp8_v41": (528, 512),
        "fp4_v41": (288, 512),
        "int4_g32": (448, 576),
    }


def test_fp8_model1() -> None:
    made = quantised({0: 448.0, 1: -1.0, 64: 449.0, 447: 2.0**-30, 448: 1.0, 511: -2.0}, "fp8_model1")
    assert made[:3].tolist() == [0x7E, 0xB8, 0]  # 448, -1, 0
    assert made[64] == 0x76  # 224, the nearest to 449 / 2
    assert made[448:450].tolist() == [0x80, 0x3F]  # 1 in bfloat16
    assert made[574:576].tolist() == [0x00, 0xC0]
    assert made[576:].tolist() == [127, 128, 114, 114, 114, 114, 114, 0]  # 1, 2, and the least, 2^-13; padding


def test_a_page_of_fp8_model1() -> None:
    """576 bytes of each token, and then the 8 bytes of each token's scales; pages lie apart by more than they hold."""
    rows = torch.randn(6, 1, 512)
    memory = torch.full((2, 2304), 77, dtype=torch.uint8)  # 3 * 584 bytes, padded to a multiple of 576
    cache = memory.as_strided((2, 3, 1, 584), (2304, 584, 584, 1))
    torch.ops.flashmla.append_(cache, rows, torch.tensor([4, 0, 5, 1, 3, 2]), "fp8_model1")
    made = torch.ops.flashmla.quantize_rows(rows, "fp8_model1")[:, 0]
    for page, tokens in enumerate([[1, 3, 5], [4, 0, 2]]):
        assert torch.equal(memory[page, :1728].view(3, 576), made[tokens, :576])
        assert torch.equal(memory[page, 1728:1752].view(3, 8), made[tokens, 576:])
    assert (memory[:, 1752:] == 77).all()
    assert FP8_MODEL1.tail == 8


def test_fp8_v41() -> None:
    made = quantised({0: -1.0, 1: 2.0**-17, 31: 0.3, 480: 896.0}, "fp8_v41")
    assert made[:2].tolist() == [0xF8, 0x01]  # -256 and 2^-9, which are -1 and 2^-17 under 2^-8
    assert made[31] == 0x6A  # 80 (0.3 * 256 = 76.8 lies between 72 and 80)
    assert made[480] == 0x7E
    assert made[512:].tolist() == [119, *[114] * 14, 128]
    assert FP8_V41.dequantize(made)[31] == 0.3125


def test_fp4_v41() -> None:
    made = quantised({0: 6.0, 1: 0.5, 2: -3.0, 16: 7.0, 17: -7.0, 511: 1e-3}, "fp4_v41")
    assert made[:2].tolist() == [0x17, 0x0D]  # codes 7 and 1, then 13 (-3) and 0: the even element is the low half
    assert made[8] == 0xF7  # 6 and -6 under 1.25, the smallest e4m3 number from 7 / 6 on
    assert made[256:258].tolist() == [0x38, 0x3A]
    assert made[258:287].tolist() == [1] * 29  # the least positive scale, 2^-9
    assert made[255] == 0x10  # 1e-3 is 0.512 of it
    assert FP4_V41.dequantize(made)[17] == -7.5


def test_ties_of_fp4_v41_go_to_even_codes() -> None:
    halfway = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    made = quantised({0: 6.0, **{1 + i: x for i, x in enumerate(halfway)}}, "fp4_v41")
    codes = torch.stack([made[:8] & 15, made[:8] >> 4], dim=-1).flatten()[1:8]
    assert codes.tolist() == [0, 2, 2, 4, 4, 6, 6]


def test_int4_g32() -> None:
    made = quantised({0: 14.0, 1: -14.0, 2: 1.0, 3: 3.0, 33: -7.0, 512: 1.0}, "int4_g32")
    assert made[:2].tolist() == [0x97, 0x20]  # 7 and -7; 0.5 and 1.5 go to 0 and 2
    assert made[16] == 0x90
    assert made[256:264].view(torch.float32).tolist() == [2.0, 1.0]
    assert made[320:322].tolist() == [0x80, 0x3F]
    assert INT4_G32.dequantize(made)[:4].tolist() == [14.0, -14.0, 0.0, 4.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["fp8_model1", "fp8_v41", "fp4_v41", "int4_g32"])
def test_what_is_not_finite_becomes_nan(name: str, bad: float) -> None:
    row = QUANTIZED[name]
    back = row.dequantize(quantised({3: bad, 4: 1.0}, name))
    assert back[3].isnan()
    whole_group = not name.startswith("fp8")
    assert bool(back[4].isnan()) == whole_group
    assert back[row.group :].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_every_code_is_read_exactly(name: str, dtype: torch.dtype) -> None:
    """A query with one row gets the row: the key is its last element, so that a NaN elsewhere is none of the score."""
    row = QUANTIZED[name]
    generator = torch.Generator().manual_seed(0)
    rows = row.quantize(torch.randn(40, row.elements, generator=generator) * 2)
    rows[:, : row.values * row.bits // 8] = torch.randint(
        0, 256, (40, row.values * row.bits // 8), generator=generator, dtype=torch.uint8
    )
    rows[:, row.values * row.bits // 8 - 1] = 0
    cache = torch.stack(list(rows))[:, None, None]
    indices = torch.arange(40, dtype=INT)[:, None, None]
    for h_q in (1, 16):
        q = torch.ones(40, 1, h_q, 1, dtype=dtype)
        named = {"qk_start": row.elements - 1, "softmax_scale": 1e-3, "row_format": name}
        out, _ = torch.ops.flashmla.sparse_decode(q, cache, None, indices, 512, **named)
        expected = row.dequantize(rows).float().to(dtype)[:, None, None, :512].expand_as(out)
        assert torch.equal(out.isnan(), expected.isnan())
        assert same_bits(out.nan_to_num(0.0).abs(), expected.nan_to_num(0.0).abs())
        assert torch.equal(out.nan_to_num(0.0), expected.nan_to_num(0.0))
