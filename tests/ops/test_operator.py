"""Operators as objects: what follows from arguments and a contract, and how many places an argument stands in."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmla_ops.cpu import contracts
from flashmla_ops.errors import ArgumentError
from flashmla_ops.ops._library import DEFINED, operator
from flashmla_ops.ops.check import Check, Result
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.ops.decode_up import DECODE_UP
from tests.support.calls import CALLS

ROOT = Path(__file__).parents[2]
#: A line that gives an argument its type: in Python, in a C++ struct, or in the ctypes copy of one.
DECLARED = re.compile(r"attn_sink(:| = |;)|\*\s*attn_sink\b|\(\"attn_sink\", c_")


def test_an_argument_of_attention_is_declared_in_few_places() -> None:
    """In dense attention, that is: `decode`, `decode_up` and `prefill`, from the schema to the kernel."""
    folders = ("flashmla_ops", "lowering", "cutlass_kernels")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".h", ".cpp")]
    files = [path for path in files if "backward" not in path.name]
    dense = [path for path in files if not {"api.py", "sparse.py", "v41.py", "integrations"} & {*path.parts}]
    code = ((path.name, line.partition("//")[0]) for path in dense for line in path.read_text().splitlines())
    lines = [f"{name}: {line.strip()}" for name, line in code]
    declared = [line for line in lines if DECLARED.search(line) and "call.attn_sink" not in line]
    assert 4 <= len(declared) <= 10, declared


def test_a_schema_follows_from_the_arguments() -> None:
    schema = str(torch.ops.flashmla.append_.two._schema)
    assert schema == (
        "flashmla::append_.two(Tensor(a!) kv_cache, Tensor(b!) k_cache, Tensor rows, Tensor k_rows,"
        " Tensor slot_mapping) -> ()"
    )
    assert [a.name for a in torch.ops.flashmla.decode_up.default._schema.arguments] == list(DECODE_UP.fields)
    assert DECODE_UP.fields[5] == "weight"
    assert tuple(name for name in DECODE_UP.fields if name != "weight") == DECODE.fields


@pytest.mark.parametrize("name", sorted(CALLS))
def test_kernel_reference_and_fake_return_the_same_kinds_of_tensors(name: str) -> None:
    if CALLS[name].mutated:
        pytest.skip("writes, and returns nothing")

    def kinds(results: Any) -> list[tuple[Any, ...]]:
        tensors = [results] if isinstance(results, Tensor) else results
        return [(x.shape, x.dtype, x.stride()) for x in tensors]

    arguments = CALLS[name].arguments()
    expected = kinds(DEFINED[name].fake(**arguments))
    assert kinds(operator(name)(**arguments)) == expected
    assert kinds(DEFINED[name].reference(**arguments)) == expected


def test_the_checks_of_c_plus_plus_are_those_of_every_contract() -> None:
    text = contracts.text()
    assert text == contracts.text.__wrapped__()
    for each in contracts.OPERATORS:
        assert f"struct {each.arguments.__name__}Arguments" in text
    assert 'check.size("attn_sink", (*attn_sink), int64_t{0}, q.size(-int64_t{2}), " heads, as q");' in text


def _loops(check: Check, x: Tensor) -> Result:
    while x.dim() > 1:
        x = x[0]
    return Result([x.size(0)], x.dtype)


def _calls_torch(check: Check, x: Tensor) -> Result:
    check.require("x", bool(torch.all(x > 0)), "positive numbers", "others")
    return Result([x.size(0)], x.dtype)


@pytest.mark.parametrize("contract", [_loops, _calls_torch])
def test_a_contract_without_a_translation_is_an_error_that_shows_it(contract: Any) -> None:
    with pytest.raises(TypeError, match=f"no translation to C.*{contract.__name__}"):
        contracts.translated(contract)


def test_a_failed_check_names_the_element_of_a_list() -> None:
    with pytest.raises(ArgumentError, match=r"argument 'outs\[3\]': expected float32, got float64"):
        Check("merge_states").at(3).dtype("outs", torch.zeros(1).double(), torch.float32)


def test_a_schedule_is_believed_once_made_and_still_refused_when_changed() -> None:
    arguments = CALLS["decode"].arguments()
    q, lengths = arguments["q"], arguments["cache_seqlens"]
    schedule = torch.ops.flashmla.decode_schedule(lengths, q.size(1), q.size(2), arguments["kv_cache"].size(2), 4)
    expected = torch.ops.flashmla.decode(**arguments)
    for _ in range(2):
        for result, wanted in zip(torch.ops.flashmla.decode(**arguments, schedule=schedule), expected, strict=True):
            torch.testing.assert_close(result, wanted)
    schedule[-1] += 32
    with pytest.raises(RuntimeError, match="expected the tensor that decode_schedule returned, got other cuts"):
        torch.ops.flashmla.decode(**arguments, schedule=schedule)
    lengths[0] -= 1
    with pytest.raises(RuntimeError, match=r"a schedule made for length 6 at \[0\], got one made for length 7"):
        torch.ops.flashmla.decode(**arguments, schedule=schedule)
