"""One misuse for each documented precondition: the message names argument, expectation and what came, and is the same
from the kernels and from the fakes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_ops.errors import ArgumentError, FlashMLAError, NotDifferentiableError, from_message, typed
from flashmla_ops.formats import NAMES
from flashmla_ops.ops.decode import DECODE

INT, LONG, BF16 = torch.int32, torch.int64, torch.bfloat16

Arguments = dict[str, Any]


def decode_arguments() -> Arguments:
    return {
        "q": torch.zeros(2, 3, 6, 48),  # [b, s_q, h_q, d_qk]
        "kv_cache": torch.zeros(5, 4, 2, 40),  # [n_pages, page_size, h_kv, d]
        "k_cache": torch.zeros(5, 4, 2, 8),  # [n_pages, page_size, h_kv, d_k]
        "block_table": torch.zeros(2, 3, dtype=INT),
        "cache_seqlens": torch.ones(2, dtype=INT),
        "d_v": 32,
        "attn_sink": torch.zeros(6),
    }


def ragged() -> Arguments:
    """Queries of two sequences that lie one after another."""
    return {"q": torch.zeros(3, 6, 48), "cu_seqlens_q": torch.tensor([0, 1, 3], dtype=INT)}


def out_arguments() -> Arguments:
    return decode_arguments() | {"out": torch.zeros(2, 3, 6, 32), "lse": torch.zeros(2, 6, 3)}


def schedule_arguments() -> Arguments:
    return {"cache_seqlens": torch.ones(2, dtype=INT), "s_q": 1, "h_q": 6, "h_kv": 2, "num_parts": 2}


def append_arguments() -> Arguments:
    return {
        "kv_cache": torch.zeros(5, 4, 2, 40),
        "rows": torch.zeros(3, 2, 40),
        "slot_mapping": torch.zeros(3, dtype=LONG),
    }


def append_two_arguments() -> Arguments:
    return append_arguments() | {"k_cache": torch.zeros(5, 4, 2, 8), "k_rows": torch.zeros(3, 2, 8)}


def merge_arguments() -> Arguments:
    return {"outs": [torch.zeros(2, 3, 6, 32)] * 2, "lses": [torch.zeros(2, 6, 3)] * 2}


OPS: dict[str, tuple[Callable[..., Any], Callable[[], Arguments]]] = {
    "decode": (torch.ops.flashmla.decode.default, decode_arguments),
    "decode.out": (torch.ops.flashmla.decode.out, out_arguments),
    "decode_schedule": (torch.ops.flashmla.decode_schedule.default, schedule_arguments),
    "append_": (torch.ops.flashmla.append_.default, append_arguments),
    "append_.two": (torch.ops.flashmla.append_.two, append_two_arguments),
    "merge_states": (torch.ops.flashmla.merge_states.default, merge_arguments),
}

FLOATS = "float32, bfloat16 or float16"
Z = torch.zeros
UNIFORM = "None with window, cu_seqlens_q or batch_invariant"

# (operator, changed arguments made when run, argument of the error, expected, actual)
MISUSES: list[tuple[str, Callable[[], Arguments], str, str, str]] = [
    ("decode", lambda: {"row_format": "fp8"}, "row_format", f"one of {', '.join(NAMES)}", "fp8"),
    ("decode", lambda: {"q": Z(2, 6, 48)}, "q", "shape [b, s_q, h_q, d_qk]", "3 dimensions"),
    ("decode", lambda: {"q": Z(2, 3, 6, 48).double()}, "q", FLOATS, "float64"),
    ("decode", lambda: {"q": Z(2, 0, 6, 48)}, "q", "at least 1 query token (s_q)", "0"),
    ("decode", lambda: {"q": Z(2, 3, 5, 48)}, "q", "query heads in multiples of the 2 KV heads", "5"),
    ("decode", lambda: {"q": Z(2, 3, 6, 47)}, "q", "d_qk 48, the length of a key", "47"),
    ("decode", lambda: {"qk_start": 40, "k_cache": None, "q": Z(2, 3, 6, 0)}, "q", "d_qk 0, the length of a key", "0"),
    ("decode", lambda: {"kv_cache": Z(5, 4, 40)}, "kv_cache", "shape [n_pages, page_size, h_kv, d]", "3 dimensions"),
    ("decode", lambda: {"kv_cache": Z(5, 4, 2, 40, dtype=BF16)}, "kv_cache", "float32", "bfloat16"),
    ("decode", lambda: {"kv_cache": Z(5, 4, 2, 80)[..., ::2]}, "kv_cache", "a contiguous last dimension", "stride 2"),
    ("decode", lambda: {"kv_cache": Z(5, 0, 2, 40)}, "kv_cache", "page_size of at least 1", "0"),
    ("decode", lambda: {"kv_cache": Z(5, 4, 0, 40)}, "kv_cache", "at least 1 KV head (h_kv)", "0"),
    ("decode", lambda: {"d_v": 0}, "d_v", "a value in [1, 40]", "0"),
    ("decode", lambda: {"d_v": 41}, "d_v", "a value in [1, 40]", "41"),
    ("decode", lambda: {"qk_start": -1}, "qk_start", "a value in [0, 40]", "-1"),
    ("decode", lambda: {"qk_start": 41}, "qk_start", "a value in [0, 40]", "41"),
    ("decode", lambda: {"k_cache": Z(5, 4, 8)}, "k_cache", "shape [n_pages, page_size, h_kv, d_k]", "3 dimensions"),
    ("decode", lambda: {"k_cache": Z(5, 4, 2, 8, dtype=BF16)}, "k_cache", "float32", "bfloat16"),
    ("decode", lambda: {"k_cache": Z(5, 4, 2, 16)[..., ::2]}, "k_cache", "a contiguous last dimension", "stride 2"),
    ("decode", lambda: {"k_cache": Z(6, 4, 2, 8)}, "k_cache", "size 5 in dimension 0, as kv_cache", "6"),
    ("decode", lambda: {"k_cache": Z(5, 3, 2, 8)}, "k_cache", "size 4 in dimension 1, as kv_cache", "3"),
    ("decode", lambda: {"k_cache": Z(5, 4, 1, 8)}, "k_cache", "size 2 in dimension 2, as kv_cache", "1"),
    ("decode", lambda: {"block_table": Z(2, dtype=INT)}, "block_table", "shape [b, max_pages]", "1 dimensions"),
    ("decode", lambda: {"block_table": Z(2, 3, dtype=LONG)}, "block_table", "int32", "int64"),
    ("decode", lambda: {"block_table": Z(3, 3, dtype=INT)}, "block_table", "2 sequences, as q", "3"),
    ("decode", lambda: {"cache_seqlens": Z(2, 1, dtype=INT)}, "cache_seqlens", "shape [b]", "2 dimensions"),
    ("decode", lambda: {"cache_seqlens": Z(2, dtype=LONG)}, "cache_seqlens", "int32", "int64"),
    ("decode", lambda: {"cache_seqlens": Z(1, dtype=INT)}, "cache_seqlens", "2 sequences, as q", "1"),
    ("decode", lambda: {"attn_sink": Z(6, 1)}, "attn_sink", "shape [h_q]", "2 dimensions"),
    ("decode", lambda: {"attn_sink": Z(6, dtype=BF16)}, "attn_sink", "float32", "bfloat16"),
    ("decode", lambda: {"attn_sink": Z(5)}, "attn_sink", "6 heads, as q", "5"),
    ("decode", lambda: {"schedule": Z(2, 9, dtype=INT)}, "schedule", "shape [n]", "2 dimensions"),
    ("decode", lambda: {"schedule": Z(14, dtype=LONG)}, "schedule", "int32", "int64"),
    ("decode", lambda: {"schedule": Z(13, dtype=INT)}, "schedule", "at least 14 elements", "13"),
    ("decode", lambda: {"window": -1}, "window", "at least 1, or 0 for none", "-1"),
    ("decode", lambda: {"softcap": -0.5}, "softcap", "a positive number, or 0 for none", "-0.5"),
    ("decode", lambda: {"cu_seqlens_q": Z(3, dtype=INT)}, "q", "shape [t_q, h_q, d_qk]", "4 dimensions"),
    ("decode", lambda: ragged() | {"cu_seqlens_q": Z(3)}, "cu_seqlens_q", "int32 or int64", "float32"),
    (
        "decode",
        lambda: ragged() | {"cu_seqlens_q": Z(3, 1, dtype=INT)},
        "cu_seqlens_q",
        "shape [b + 1]",
        "2 dimensions",
    ),
    ("decode", lambda: ragged() | {"cu_seqlens_q": Z(0, dtype=INT)}, "cu_seqlens_q", "at least 1 element", "0"),
    ("decode", lambda: ragged() | {"cu_seqlens_q": Z(2, dtype=INT)}, "block_table", "1 sequences, as q", "2"),
    ("decode", lambda: {"schedule": Z(14, dtype=INT), "window": 5}, "schedule", UNIFORM, "a tensor"),
    ("decode", lambda: {"schedule": Z(14, dtype=INT), "batch_invariant": True}, "schedule", UNIFORM, "a tensor"),
    ("decode", lambda: ragged() | {"schedule": Z(14, dtype=INT)}, "schedule", UNIFORM, "a tensor"),
    ("decode.out", lambda: {"out": Z(2, 3, 6, 32, dtype=BF16)}, "out", "float32", "bfloat16"),
    ("decode.out", lambda: {"out": Z(2, 3, 6, 31)}, "out", "shape [2, 3, 6, 32]", "[2, 3, 6, 31]"),
    ("decode.out", lambda: {"out": Z(2, 3, 6, 64)[..., ::2]}, "out", "a contiguous last dimension", "stride 2"),
    ("decode.out", lambda: {"lse": Z(2, 6, 3, dtype=BF16)}, "lse", "float32", "bfloat16"),
    ("decode.out", lambda: {"lse": Z(2, 3, 6)}, "lse", "shape [2, 6, 3]", "[2, 3, 6]"),
    ("decode.out", lambda: {"q": Z(2, 3, 6, 47)}, "q", "d_qk 48, the length of a key", "47"),
    ("decode_schedule", lambda: {"cache_seqlens": Z(2, 1, dtype=INT)}, "cache_seqlens", "shape [b]", "2 dimensions"),
    ("decode_schedule", lambda: {"cache_seqlens": Z(2, dtype=LONG)}, "cache_seqlens", "int32", "int64"),
    ("decode_schedule", lambda: {"s_q": 0}, "s_q", "at least 1", "0"),
    ("decode_schedule", lambda: {"h_kv": 0}, "h_kv", "at least 1", "0"),
    ("decode_schedule", lambda: {"h_q": 5}, "h_q", "a multiple of h_kv 2", "5"),
    ("decode_schedule", lambda: {"h_q": -2}, "h_q", "a multiple of h_kv 2", "-2"),
    ("decode_schedule", lambda: {"num_parts": 0}, "num_parts", "a value in [1, 1024]", "0"),
    ("decode_schedule", lambda: {"num_parts": 1025}, "num_parts", "a value in [1, 1024]", "1025"),
    ("append_", lambda: {"kv_cache": Z(5, 4, 40)}, "kv_cache", "shape [n_pages, page_size, h_kv, d]", "3 dimensions"),
    ("append_", lambda: {"kv_cache": Z(5, 4, 2, 40, dtype=INT)}, "kv_cache", FLOATS, "int32"),
    ("append_", lambda: {"kv_cache": Z(5, 4, 2, 80)[..., ::2]}, "kv_cache", "a contiguous last dimension", "stride 2"),
    ("append_", lambda: {"kv_cache": Z(5, 0, 2, 40)}, "kv_cache", "page_size of at least 1", "0"),
    ("append_", lambda: {"rows": Z(3, 40)}, "rows", "shape [n, h_kv, d]", "2 dimensions"),
    ("append_", lambda: {"rows": Z(3, 2, 40, dtype=BF16)}, "rows", "float32", "bfloat16"),
    ("append_", lambda: {"rows": Z(3, 1, 40)}, "rows", "2 KV heads, as kv_cache", "1"),
    ("append_", lambda: {"rows": Z(3, 2, 41)}, "rows", "rows of 40 elements, as kv_cache", "41"),
    ("append_", lambda: {"rows": Z(4, 2, 40)}, "rows", "one row for each slot", "4"),
    ("append_", lambda: {"slot_mapping": Z(3, 1, dtype=LONG)}, "slot_mapping", "shape [n]", "2 dimensions"),
    ("append_", lambda: {"slot_mapping": Z(3, dtype=INT)}, "slot_mapping", "int64", "int32"),
    ("append_.two", lambda: {"k_cache": Z(4, 4, 2, 8)}, "k_cache", "size 5 in dimension 0, as kv_cache", "4"),
    ("append_.two", lambda: {"k_cache": Z(5, 2, 2, 8)}, "k_cache", "size 4 in dimension 1, as kv_cache", "2"),
    ("append_.two", lambda: {"k_rows": Z(3, 2, 7)}, "k_rows", "rows of 8 elements, as k_cache", "7"),
    ("append_.two", lambda: {"k_rows": Z(3, 1, 8)}, "k_rows", "2 KV heads, as k_cache", "1"),
    ("append_.two", lambda: {"k_rows": Z(2, 2, 8)}, "k_rows", "one row for each slot", "2"),
    ("merge_states", lambda: {"outs": [], "lses": []}, "outs", "at least one part", "0"),
    ("merge_states", lambda: {"lses": [Z(2, 6, 3)]}, "lses", "2 parts, as outs", "1"),
    ("merge_states", lambda: {"outs": [Z(2, 3, 6, 32).long()] * 2}, "outs[0]", FLOATS, "int64"),
    (
        "merge_states",
        lambda: {"outs": [Z(6, 32)] * 2},
        "outs[0]",
        "shape [b, s_q, h_q, d_v] or [s_q, h_q, d_v]",
        "2 dimensions",
    ),
    (
        "merge_states",
        lambda: {"outs": [Z(2, 3, 6, 32), Z(2, 3, 6, 32, dtype=BF16)]},
        "outs[1]",
        "float32",
        "bfloat16",
    ),
    (
        "merge_states",
        lambda: {"outs": [Z(2, 3, 6, 32), Z(2, 3, 6, 31)]},
        "outs[1]",
        "shape [2, 3, 6, 32]",
        "[2, 3, 6, 31]",
    ),
    ("merge_states", lambda: {"lses": [Z(2, 6, 3), Z(2, 6, 3).double()]}, "lses[1]", "float32", "float64"),
    ("merge_states", lambda: {"lses": [Z(2, 6, 3), Z(2, 3, 6)]}, "lses[1]", "shape [2, 6, 3]", "[2, 3, 6]"),
]


def message_of(op: str, changes: Callable[[], Arguments]) -> str:
    function, arguments = OPS[op]
    kwargs = arguments() | changes()
    with pytest.raises(RuntimeError, match=f"^flashmla::{op.split('.')[0]}: argument") as caught:
        function(**kwargs)
    return str(caught.value)


@pytest.mark.parametrize("op", OPS)
def test_the_arguments_that_are_changed_below_are_good(op: str) -> None:
    function, arguments = OPS[op]
    function(**arguments())
    with FakeTensorMode():
        function(**arguments())


@pytest.mark.parametrize(
    ("op", "changes", "argument", "expected", "actual"), MISUSES, ids=[f"{m[0]}-{m[2]}-{m[4]}" for m in MISUSES]
)
def test_misuse(op: str, changes: Callable[[], Arguments], argument: str, expected: str, actual: str) -> None:
    message = message_of(op, changes)
    error = from_message(message)
    assert isinstance(error, ArgumentError)
    assert (error.op, error.argument) == (op.split(".")[0], argument)
    assert (error.expected, error.actual) == (expected, actual)
    with FakeTensorMode():
        assert message_of(op, changes) == message


@pytest.mark.parametrize(
    ("lengths", "actual"), [([-1, 1], "-1 at [0]"), ([12, 13], "13 at [1]"), ([1, 2**31 - 1], "2147483647 at [1]")]
)
@pytest.mark.parametrize("op", ["decode", "decode.out"])
def test_lengths_that_the_block_table_cannot_hold(op: str, lengths: list[int], actual: str) -> None:
    message = message_of(op, lambda: {"cache_seqlens": torch.tensor(lengths, dtype=INT)})
    error = from_message(message)
    assert (error.argument, error.expected, error.actual) == ("cache_seqlens", "lengths in [0, 12]", actual)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize(
    ("bounds", "expected", "actual"),
    [
        ([1, 2, 3], "0 at [0]", "1"),
        ([0, 2, 1], "at least 2 at [2]", "1"),
        ([0, 2, 4], "3 at [2], the number of tokens", "4"),
        ([0, 2, 2**32 + 3], "values that int32 holds", f"{2**32 + 3} at [2]"),
    ],
)
def test_boundaries_of_ragged_queries(implementation: str, bounds: list[int], expected: str, actual: str) -> None:
    call = DECODE.reference if implementation == "reference" else torch.ops.flashmla.decode
    with pytest.raises((RuntimeError, ArgumentError)) as caught:
        call(**decode_arguments() | ragged() | {"cu_seqlens_q": torch.tensor(bounds)})
    error = from_message(str(caught.value))
    assert (error.argument, error.expected, error.actual) == ("cu_seqlens_q", expected, actual)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("decode", "kv_cache"),
        ("decode", "k_cache"),
        ("decode", "block_table"),
        ("decode", "cache_seqlens"),
        ("decode", "attn_sink"),
        ("append_", "rows"),
        ("append_", "slot_mapping"),
    ],
)
def test_tensors_of_another_device(op: str, name: str) -> None:
    function, arguments = OPS[op]
    kwargs = {key: x.to("meta") if torch.is_tensor(x) else x for key, x in arguments().items()}
    kwargs[name] = arguments()[name]
    with pytest.raises(RuntimeError) as caught:
        function(**kwargs)
    error = from_message(str(caught.value))
    assert (error.argument, error.expected, error.actual) == (name, "device meta", "cpu")


GRADIENTS = [
    ("append_", "rows"),
    ("append_.two", "k_rows"),
    ("merge_states", "outs[1]"),
    ("merge_states", "lses[0]"),
]


def with_gradient(op: str, name: str) -> Arguments:
    kwargs = OPS[op][1]()
    key, _, index = name.rstrip("]").partition("[")
    if index:
        kwargs[key] = [x.clone().requires_grad_(i == int(index)) for i, x in enumerate(kwargs[key])]
    else:
        kwargs[key].requires_grad_()
    return kwargs


@pytest.mark.parametrize(("op", "name"), GRADIENTS)
def test_a_required_gradient_is_refused_at_the_forward(op: str, name: str) -> None:
    kwargs = with_gradient(op, name)
    with pytest.raises(RuntimeError, match="but the operator has no backward") as caught:
        OPS[op][0](**kwargs)
    error = from_message(str(caught.value))
    assert isinstance(error, NotDifferentiableError)
    assert (error.op, error.argument) == (op.split(".")[0], name)
    with torch.no_grad():
        OPS[op][0](**kwargs)
    with torch.inference_mode():
        OPS[op][0](**kwargs)


@pytest.mark.parametrize(("op", "name"), GRADIENTS)
def test_a_required_gradient_is_refused_when_compiled(op: str, name: str) -> None:
    compiled = torch.compile(lambda kwargs: OPS[op][0](**kwargs), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"argument '{name.split('[')[0]}.*requires a gradient"):
        compiled(with_gradient(op, name))


def test_typed_restores_the_class_and_leaves_other_errors_alone() -> None:
    with pytest.raises(ArgumentError) as caught, typed():
        torch.ops.flashmla.decode(**decode_arguments() | {"d_v": 41})
    assert (caught.value.argument, caught.value.actual) == ("d_v", "41")
    assert isinstance(caught.value, ValueError)
    with pytest.raises(RuntimeError, match="another") as other, typed():
        raise RuntimeError("another")
    assert not isinstance(other.value, FlashMLAError)
    assert from_message("another") is None
