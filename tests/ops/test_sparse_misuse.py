"""One misuse for each precondition of the sparse operators: kernels and fakes say the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_ops.errors import from_message
from flashmla_ops.formats import NAMES
from tests.support.calls import CALLS

INT, LONG, BF16 = torch.int32, torch.int64, torch.bfloat16
FLOATS = "float32, bfloat16 or float16"
FORMATS = f"one of {', '.join(NAMES)}"
Z = torch.zeros
BYTES = Z(5, 4, 1, 584, dtype=torch.uint8)
NO_EXTRA = {"extra_kv_cache": None, "extra_indices": None, "extra_topk_length": None}
MODEL1 = {"row_format": "fp8_model1", "k_cache": None, "q": Z(2, 3, 6, 512)}

Changes = Callable[[], dict[str, Any]]

# (changed arguments made when run, argument of the error, expected, actual)
DECODE: list[tuple[Changes, str, str, str]] = [
    (lambda: {"row_format": "fp9"}, "row_format", FORMATS, "fp9"),
    (lambda: {"extra_row_format": "fp9"}, "extra_row_format", FORMATS, "fp9"),
    (lambda: {"q": Z(2, 6, 48)}, "q", "shape [b, s_q, h_q, d_qk]", "3 dimensions"),
    (lambda: {"q": Z(2, 3, 6, 48).double()}, "q", FLOATS, "float64"),
    (lambda: {"q": Z(2, 3, 5, 48)}, "q", "query heads in multiples of the 2 KV heads", "5"),
    (lambda: {"q": Z(2, 3, 6, 47)}, "q", "d_qk 48, the length of a key", "47"),
    (lambda: {"kv_cache": Z(5, 4, 40)}, "kv_cache", "shape [n_pages, page_size, h_kv, d]", "3 dimensions"),
    (lambda: {"kv_cache": Z(5, 4, 2, 40, dtype=BF16)}, "kv_cache", "float32", "bfloat16"),
    (lambda: {"kv_cache": Z(5, 4, 2, 80)[..., ::2]}, "kv_cache", "a contiguous last dimension", "stride 2"),
    (lambda: {"kv_cache": Z(5, 0, 2, 40)}, "kv_cache", "page_size of at least 1", "0"),
    (lambda: {"kv_cache": Z(5, 4, 0, 40), "k_cache": Z(5, 4, 0, 8)}, "kv_cache", "at least 1 KV head (h_kv)", "0"),
    (lambda: {"k_cache": Z(4, 4, 2, 8)}, "k_cache", "size 5 in dimension 0, as kv_cache", "4"),
    (lambda: {"k_cache": Z(5, 4, 2, 8, dtype=BF16)}, "k_cache", "float32", "bfloat16"),
    (
        lambda: MODEL1 | {"kv_cache": BYTES, "k_cache": Z(5, 4, 1, 8)},
        "k_cache",
        "None with rows of fp8_model1",
        "a tensor",
    ),
    (lambda: MODEL1 | {"kv_cache": Z(5, 4, 1, 584)}, "kv_cache", "uint8 or float8_e4m3fn", "float32"),
    (lambda: MODEL1 | {"kv_cache": BYTES[..., :583]}, "kv_cache", "rows of 584 bytes", "583"),
    (
        lambda: MODEL1 | {"kv_cache": BYTES.expand(5, 4, 1, 584).repeat(1, 2, 1, 1)[:, ::2]},
        "kv_cache",
        "stride 584 between tokens: a page of fp8_model1 is one piece",
        "stride 1168",
    ),
    (
        lambda: MODEL1 | {"kv_cache": BYTES.repeat(1, 1, 2, 1)},
        "kv_cache",
        "1 KV head with rows of fp8_model1",
        "2",
    ),
    (lambda: {"d_v": 0}, "d_v", "a value in [1, 40]", "0"),
    (lambda: {"d_v": 41}, "d_v", "a value in [1, 40]", "41"),
    (lambda: {"qk_start": -1}, "qk_start", "a value in [0, 40]", "-1"),
    (lambda: {"indices": Z(2, 3, dtype=INT)}, "indices", "shape [b, s_q, topk]", "2 dimensions"),
    (lambda: {"indices": Z(2, 3, 3, dtype=LONG)}, "indices", "int32", "int64"),
    (lambda: {"indices": Z(1, 3, 3, dtype=INT)}, "indices", "2 sequences, as q", "1"),
    (lambda: {"indices": Z(2, 1, 3, dtype=INT)}, "indices", "3 query tokens, as q", "1"),
    (lambda: {"topk_length": Z(2, 1, dtype=INT)}, "topk_length", "shape [b]", "2 dimensions"),
    (lambda: {"topk_length": Z(2, dtype=LONG)}, "topk_length", "int32", "int64"),
    (lambda: {"topk_length": Z(3, dtype=INT)}, "topk_length", "2 sequences, as q", "3"),
    (lambda: {"attn_sink": Z(6, 1)}, "attn_sink", "shape [h_q]", "2 dimensions"),
    (lambda: {"attn_sink": Z(6, dtype=BF16)}, "attn_sink", "float32", "bfloat16"),
    (lambda: {"attn_sink": Z(5)}, "attn_sink", "6 heads, as q", "5"),
    (
        lambda: NO_EXTRA | {"extra_indices": Z(2, 3, 2, dtype=INT)},
        "extra_indices",
        "None without extra_kv_cache",
        "a tensor",
    ),
    (
        lambda: NO_EXTRA | {"extra_topk_length": Z(2, dtype=INT)},
        "extra_topk_length",
        "None without extra_kv_cache",
        "a tensor",
    ),
    (lambda: {"extra_indices": None}, "extra_indices", "a tensor with extra_kv_cache", "None"),
    (lambda: {"extra_kv_cache": Z(3, 2, 3, 48)}, "extra_kv_cache", "2 KV heads, as kv_cache", "3"),
    (lambda: {"extra_kv_cache": Z(3, 2, 2, 48, dtype=BF16)}, "extra_kv_cache", "float32", "bfloat16"),
    (lambda: {"extra_kv_cache": Z(3, 2, 2, 49)}, "q", "d_qk 49, the length of a key", "48"),
    (lambda: {"extra_kv_cache": Z(3, 0, 2, 48)}, "extra_kv_cache", "page_size of at least 1", "0"),
    (lambda: {"extra_indices": Z(2, 2, 3, dtype=INT)}, "extra_indices", "3 query tokens, as q", "2"),
    (lambda: {"extra_topk_length": Z(1, dtype=INT)}, "extra_topk_length", "2 sequences, as q", "1"),
]
PREFILL: list[tuple[Changes, str, str, str]] = [
    (lambda: {"row_format": "fp9"}, "row_format", FORMATS, "fp9"),
    (lambda: {"q": Z(1, 3, 6, 48)}, "q", "shape [s_q, h_q, d_qk]", "4 dimensions"),
    (lambda: {"q": Z(3, 6, 48, dtype=INT)}, "q", FLOATS, "int32"),
    (lambda: {"q": Z(3, 6, 49)}, "q", "d_qk 48, the length of a key", "49"),
    (lambda: {"kv": Z(9, 48)}, "kv", "shape [s_kv, h_kv, d]", "2 dimensions"),
    (lambda: {"kv": Z(9, 2, 48, dtype=BF16)}, "kv", "float32", "bfloat16"),
    (lambda: {"kv": Z(9, 2, 96)[..., ::2]}, "kv", "a contiguous last dimension", "stride 2"),
    (lambda: {"kv": Z(9, 2, 48), "row_format": "fp8_v41"}, "kv", "uint8 or float8_e4m3fn", "float32"),
    (lambda: {"kv": Z(9, 2, 527, dtype=torch.uint8), "row_format": "fp8_v41"}, "kv", "rows of 528 bytes", "527"),
    (lambda: {"d_v": 49}, "d_v", "a value in [1, 48]", "49"),
    (lambda: {"indices": Z(3, 3, dtype=INT)}, "indices", "shape [s_q, h_kv, topk]", "2 dimensions"),
    (lambda: {"indices": Z(3, 2, 3, dtype=LONG)}, "indices", "int32", "int64"),
    (lambda: {"indices": Z(2, 2, 3, dtype=INT)}, "indices", "3 query tokens, as q", "2"),
    (lambda: {"indices": Z(3, 1, 3, dtype=INT)}, "indices", "2 KV heads, as kv", "1"),
    (lambda: {"topk_length": Z(2, dtype=INT)}, "topk_length", "3 query tokens, as q", "2"),
    (lambda: {"attn_sink": Z(7)}, "attn_sink", "6 heads, as q", "7"),
]
CASES = [("sparse_decode", *case) for case in DECODE] + [("sparse_prefill", *case) for case in PREFILL]


@pytest.mark.parametrize(("op", "changes", "argument", "expected", "actual"), CASES)
def test_misuse(op: str, changes: Changes, argument: str, expected: str, actual: str) -> None:
    named = CALLS[op].arguments() | changes()
    function = getattr(torch.ops.flashmla, op)
    with pytest.raises(RuntimeError) as caught:
        function(**named)
    error = from_message(str(caught.value))
    assert (error.op, error.argument, error.expected, error.actual) == (op, argument, expected, actual)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError) as faked:
        function(**{name: mode.from_tensor(x) if torch.is_tensor(x) else x for name, x in named.items()})
    assert str(faked.value) == str(caught.value)


@pytest.mark.parametrize("op", ["sparse_decode", "sparse_prefill"])
def test_tensors_of_another_device(op: str) -> None:
    named = CALLS[op].arguments()
    for name, tensor in named.items():
        if not torch.is_tensor(tensor) or name == "q":
            continue
        others = {key: x.to("meta") if torch.is_tensor(x) else x for key, x in named.items()} | {name: tensor}
        with pytest.raises(RuntimeError, match=f"argument '{name}': expected device meta, got cpu"):
            getattr(torch.ops.flashmla, op)(**others)
