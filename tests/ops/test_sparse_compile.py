"""The sparse operators under torch.compile and torch.export, and torch's own checks of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.library import opcheck

from flashmla_ops.formats import QUANTIZED
from tests.strategies import DTYPES
from tests.support.calls import CALLS
from tests.support.poison import same_bits
from tests.support.sparse import Rows, SparseCase, build

CASE = SparseCase(Rows(topk=20, lengths=True), Rows(topk=9, page_size=3, lengths=True), h_q=6, d=40, d_v=32, b=3)
INT = torch.int32


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(named: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """With pointwise work around it."""
    out, lse = torch.ops.flashmla.sparse_decode(**named | {"q": named["q"] * 2})
    return out + 1, lse


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_other_indices_and_lengths_compile_nothing(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    named = build(replace(CASE, strided=False))
    for seed in range(6):
        other = build(replace(CASE, strided=False, seed=seed))
        changed = {name: other[name] for name in named if name.startswith("extra_") or "indices" in name}
        arguments = named | changed | {"topk_length": other["topk_length"], "kv_cache": other["kv_cache"]}
        assert all(map(same_bits, compiled(arguments), step(arguments)))
    assert counter.frame_count == 1


def test_sizes_compile_at_most_twice() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for b in range(2, 8):
        arguments = build(replace(CASE, b=b, s_q=b, rows=Rows(topk=5 * b), strided=False))
        assert all(map(same_bits, compiled(arguments), step(arguments)))
    assert counter.frame_count <= 2


class Sparse(torch.nn.Module):
    def forward(self, q: Tensor, kv: Tensor, indices: Tensor, topk_length: Tensor) -> tuple[Tensor, ...]:
        out, max_logits, lse = torch.ops.flashmla.sparse_prefill(q, kv, indices, 32, topk_length=topk_length)
        again, _ = torch.ops.flashmla.sparse_decode(q[None], kv[None], None, indices[None, :, 0], 32)
        return out, max_logits, lse, again


def sparse_arguments(s_q: int, s_kv: int, topk: int) -> tuple[Tensor, ...]:
    indices = torch.randint(-2, s_kv + 2, (s_q, 1, topk), dtype=INT)
    lengths = torch.randint(0, topk + 1, (s_q,), dtype=INT)
    return torch.randn(s_q, 6, 40), torch.randn(s_kv, 1, 40), indices, lengths


def exported() -> torch.export.ExportedProgram:
    s_q, s_kv, topk = (torch.export.Dim(name, min=2, max=4096) for name in ("s_q", "s_kv", "topk"))
    shapes = {"q": {0: s_q}, "kv": {0: s_kv}, "indices": {0: s_q, 2: topk}, "topk_length": {0: s_q}}
    return torch.export.export(Sparse(), sparse_arguments(3, 20, 5), dynamic_shapes=shapes)


SIZES = ((3, 20, 5), (7, 2, 90), (2, 300, 2))


def test_exported_for_any_size() -> None:
    module = exported().module()
    for sizes in SIZES:
        inputs = sparse_arguments(*sizes)
        assert all(map(same_bits, module(*inputs), Sparse()(*inputs)))


@pytest.mark.slow
def test_a_package_calls_the_library(tmp_path: Path) -> None:
    path = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "sparse.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for sizes in SIZES:
        inputs = sparse_arguments(*sizes)
        assert all(map(same_bits, run(*inputs), Sparse()(*inputs)))


@pytest.mark.parametrize("lay_out", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck_of_decode(dtype: str, lay_out: bool) -> None:
    opcheck(torch.ops.flashmla.sparse_decode.default, (), build(replace(CASE, dtype=dtype, strided=lay_out, sink=True)))


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_opcheck_of_every_format(name: str) -> None:
    case = SparseCase(Rows(topk=5, row_format=name, page_size=3), h_q=3, d=QUANTIZED[name].elements)
    named = build(case)
    opcheck(torch.ops.flashmla.sparse_decode.default, (), named)
    prefill = (named["q"][0], named["kv_cache"][0], named["indices"][0, :, None], 512, None, name)
    opcheck(torch.ops.flashmla.sparse_prefill.default, prefill)


def test_opcheck_of_prefill() -> None:
    opcheck(torch.ops.flashmla.sparse_prefill.default, (), CALLS["sparse_prefill"].arguments())


@pytest.mark.parametrize("name", sorted(QUANTIZED))
def test_appended_and_attended_to_in_one_graph(name: str) -> None:
    """A step that writes its row and reads it; with the backend of this library, which generates the quantisation."""
    row = QUANTIZED[name]

    def decode_step(q: Tensor, rows: Tensor, slots: Tensor, cache: Tensor, indices: Tensor) -> Tensor:
        torch.ops.flashmla.append_(cache, rows * 0.5, slots, name)
        return torch.ops.flashmla.sparse_decode(q, cache, None, indices, 512, row_format=name)[0] + 1

    indices = torch.tensor([[[9, 3, 7, -1]], [[1, 9, 11, 12]]], dtype=INT)
    slots = torch.tensor([9, 3, 7, -1, 1, 11])
    inputs = (torch.randn(2, 1, 8, row.elements), torch.randn(6, 1, row.elements), slots)
    caches = [torch.full((3, 4, 1, row.bytes), 0xFF, dtype=torch.uint8) for _ in range(2)]
    expected = decode_step(*inputs, caches[0], indices)
    compiled = torch.compile(decode_step, fullgraph=True, backend="flashmla")
    assert torch.equal(compiled(*inputs, caches[1], indices), expected)
    assert torch.equal(*caches)
    assert expected.isfinite().all()
