"""The suites: their cases, and that every implementation of a small problem of each is right."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import blocks, dense, paged, programs, runner
from bench.paged import PagedCase
from bench.suite import Peer, clone_as_it_lies, copies_of, make_problem, rotating
from bench.suites import (
    SUITES,
    append,
    arena,
    backward,
    backward_rows,
    compile_time,
    decode,
    decode_shapes,
    decode_up,
    dist,
    gqa_decode,
    merge,
    op_overhead,
    pool,
    prefill,
    quant,
    scaling,
    select,
    small_gemm,
    sparse,
    sparsity,
    v41_block,
)
from flashmla_ops import reference
from flashmla_ops.sparsity import Cached
from flashmla_ops.sparsity import select as chosen_pages
from tests.support.markdown import squeezed

TINY = PagedCase(b=2, h_q=3, s_kv=11, dtype="fp32", page_size=4, d_qk=24, d_v=16)
TINY_CASES = [
    ("decode", TINY),
    ("decode", PagedCase(2, 3, 11, "fp32", page_size=4, d_qk=24, d_v=16, cache="two tensors")),
    ("decode", PagedCase(5, 3, 11, "fp32", s_q=3, page_size=4, d_qk=24, d_v=16, varying=True)),
    ("decode_up", decode_up.UpCase(2, 3, 11, "fp32", d_up=8)),
    ("decode_up", decode_up.UpCase(2, 3, 11, "fp32", s_q=2)),
    ("gqa_decode", PagedCase(2, 6, 11, "fp32", page_size=4, d_qk=16, d_v=8, h_kv=3, cache="[V, K] rows")),
    ("gqa_decode", PagedCase(2, 6, 11, "fp32", page_size=4, d_qk=16, d_v=8, h_kv=3, cache="V and K")),
    ("prefill", dense.PrefillCase((9,), 24, 16, True, "fp32", h_q=4, h_kv=2)),
    ("prefill", dense.PrefillCase((9, 4), 24, 24, False, "fp32", h_q=2, h_kv=2)),
    ("backward", backward.BackwardCase((9,), 24, 16, True, "fp32", h_q=4, h_kv=2)),
    ("backward", backward.BackwardCase((9, 4), 24, 24, False, "bf16", h_q=2, h_kv=2)),
    ("backward", backward_rows.RowsCase("decode", (1, 3, 2), 20, 3, "fp32")),
    ("backward", backward_rows.RowsCase("decode_up", (2, 2), 20, 3, "bf16")),
    ("backward", backward_rows.RowsCase("sparse_decode", (2, 2), 20, 3, "fp32")),
    ("sparse", sparse.SparseCase(2, 3, 20, "native", n_rows=128)),
    ("sparse", sparse.SparseCase(2, 16, 20, "fp8_v32", n_rows=128)),
    ("sparse", sparse.SparseCase(2, 16, 20, "fp8_v41", extra_topk=9, n_rows=128)),
    ("sparse", sparse.SparseCase(3, 5, 20, "fp8_model1", prefill=True, n_rows=128)),
    ("sparsity", sparsity.SparsityCase(2, 6, 3, 32, 32, 1500, 0.4)),
    ("sparsity", sparsity.SparsityCase(2, 6, 3, 32, 32, 1500, 0.4, mode="estimate")),
    ("sparsity", sparsity.SparsityCase(1, 4, 1, 48, 32, 1500, 0.4)),
    ("small_gemm", small_gemm.GemmCase(2, 32, 16, "bf16", "bf16")),
    ("small_gemm", small_gemm.GemmCase(2, 32, 16, "bf16", "int8")),
    ("small_gemm", small_gemm.GemmCase(2, 128, 512, "bf16", "W_UK", 3)),
    ("small_gemm", small_gemm.GemmCase(2, 512, 128, "bf16", "W_UV", 3)),
    *(("quant", quant.QuantCase(2, name, 64, 32)) for name in ("int8", "int4_g32")),
    ("quant", quant.QuantCase(2, "int4_g64", step="a small layer", group=quant.STEP)),
    ("append", append.AppendCase(3, "bf16", h_kv=2, d=8, n_pages=2)),
    ("merge", merge.MergeCase(3, 2, 4, "bf16", d_v=16)),
    ("arena", arena.ArenaCase("empty", 64, 3)),
    ("arena", arena.ArenaCase("zeros", 100_000)),
    ("pool", pool.PoolCase(pool.PAGES, 70)),
    ("pool", pool.PoolCase(pool.STEPS, 3)),
    *(("pool", pool.PoolCase(pool.TRACES, 30, 1 << 13, page_size=16, shared=shared)) for shared in (0.0, 0.5)),
    *(("op_overhead", case) for case in op_overhead.cases(True)),
]
#: They take seconds to compile.
COMPILED = {"torch.compile", "FlexAttention"}


@pytest.mark.parametrize(("name", "case"), TINY_CASES, ids=str)
def test_every_implementation_is_right(name: str, case: Any) -> None:
    suite = SUITES[name]
    peers = [peer for peer in suite.peers if peer.name not in COMPILED]
    (problem,) = suite.problems([case], peers, cold_bytes=0)
    assert set(problem.calls) | set(problem.skipped) == {runner.OURS, *(peer.name for peer in peers)}
    for implementation, call in problem.calls.items():
        assert problem.error(implementation, call()) <= problem.work.tolerance


@pytest.mark.parametrize(
    "change",
    [{}, {"varying": True}, {"cache": "two tensors"}],
    ids=str,
)
def test_a_shape_is_timed_beside_the_usual_one(change: dict[str, Any]) -> None:
    problem = decode_shapes.problem(replace(TINY, b=4, page_size=64, **change), (), cold_bytes=0)
    assert set(problem.calls) == {runner.OURS, decode_shapes.USUAL}
    for name, call in problem.calls.items():
        assert problem.error(name, call()) <= problem.work.tolerance
    assert problem.calls[decode_shapes.USUAL]().size(2) == 16


def test_usual_shapes_have_as_many_tokens_and_no_fewer_heads() -> None:
    for case in decode_shapes.cases(False):
        usual = decode_shapes.usual(case)
        assert usual != case
        assert case.h_q <= usual.h_q < case.h_q + 16
        assert sum(case.lengths) == sum(usual.lengths)


@pytest.mark.slow
@pytest.mark.parametrize("case", compile_time.cases(False), ids=str)
def test_a_compiled_first_step_is_right(case: compile_time.CompileCase) -> None:
    problem = compile_time.problem(case, compile_time.PEERS, 0)
    assert set(problem.calls) == {runner.OURS, compile_time.INDUCTOR}
    with torch.no_grad():
        for name, call in problem.calls.items():
            assert problem.error(name, call()) <= problem.work.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("case", dist.cases(False), ids=str)
def test_several_processes_are_right(case: dist.DistCase) -> None:
    problem = dist.problem(replace(case, times=1), (), 0)
    for name, call in problem.calls.items():
        assert problem.error(name, call()) <= problem.work.tolerance


@pytest.mark.slow
@pytest.mark.parametrize("norm", [False, True])
def test_a_compiled_block_is_right(norm: bool) -> None:
    case = blocks.BlockCase(2, 2, 3, topk=9, extra_topk=20, norm=norm, n_rows=128)
    with torch.no_grad():
        problem = v41_block.problem(case, v41_block.PEERS, 0)
        assert set(problem.calls) == {runner.OURS, *(peer.name for peer in v41_block.PEERS)}
        for name, call in problem.calls.items():
            assert problem.error(name, call()) <= problem.work.tolerance


@pytest.mark.parametrize("norm", [False, True])
def test_a_block_in_torch_alone_is_that_of_the_library(norm: bool) -> None:
    inputs = blocks.make_inputs(blocks.BlockCase(2, 2, 3, topk=9, extra_topk=20, norm=norm, n_rows=128))
    for sequence, (topk, extra) in enumerate([(3, 20), (0, 7)]):
        inputs.indices[sequence, :, topk:] = -1
        inputs.extra_indices[sequence, :, extra:] = 1 << 20
    for block in (inputs.block, inputs.plain):
        assert runner.row_error(blocks.read(block(*inputs.caches)), blocks.exact(inputs)) <= v41_block.TOLERANCE


@pytest.mark.slow
def test_programs_of_the_block_are_counted() -> None:
    rows = {row.pop("program"): row for row in programs.of_suite("v41_block")}
    assert rows[runner.OURS]["kernels"] <= 3
    assert rows[runner.OURS]["calls"] == 1
    assert rows[runner.OURS]["bytes"] < min(rows[name]["bytes"] for name in ("torch.compile", "flashmla eager"))
    assert programs.of_suite("decode") == []


def test_views_are_no_calls_of_a_program() -> None:
    x = torch.zeros(4, 8)
    with programs.Allocations() as counted:
        (x.view(8, 4).t() + 1).add_(2)
    assert (counted.calls, counted.bytes) == (1, x.nbytes)
    row = {"program": "one", "kernels": 2, "calls": counted.calls, "bytes": 16 * counted.bytes}
    assert "| one | 2 | 1 | 2 |" in squeezed(programs.table([row]))


@pytest.mark.parametrize("mode", ["certified", "estimate"])
def test_pages_that_do_not_matter_are_skipped(mode: str) -> None:
    case = sparsity.SparsityCase(2, 6, 3, 64, 64, 4096, 0.3, mode=mode)
    inputs, cache, summaries = sparsity.make_inputs(case)
    cached = Cached(cache, None, inputs.block_table, inputs.cache_seqlens, summaries)
    attended = chosen_pages(inputs.q, cached, inputs.sparsity, case.qk_start, None).lengths
    assert 0.2 < float(attended.double().mean()) / case.s_kv < 0.5


def test_exact_is_the_reference() -> None:
    for case in (case for _, case in TINY_CASES if isinstance(case, PagedCase)):
        inputs = paged.make_inputs(case, cold_bytes=0)
        kv_cache, k_cache = inputs.copies[0]
        lengths, start = inputs.cache_seqlens, inputs.qk_start
        expected, _ = reference.decode(
            inputs.q, kv_cache, k_cache, inputs.block_table, lengths, case.d_v, start, causal=case.s_q > 1
        )
        torch.testing.assert_close(paged.exact(inputs), expected)


@pytest.mark.parametrize("causal", [True, False])
def test_exact_prefill_in_blocks_is_the_reference(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "MOST_SCORES", 30)
    inputs = dense.make_inputs(dense.PrefillCase((9, 1, 14), 12, 8, causal, "fp32", h_q=4, h_kv=2))
    expected, _ = reference.prefill(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens, inputs.cu_seqlens, causal)
    torch.testing.assert_close(dense.exact(inputs), expected)


@pytest.mark.parametrize("copies", [1, 3])
def test_caches_are_rotated_to_be_cold(copies: int) -> None:
    inputs = paged.make_inputs(PagedCase(2, 3, 12, "fp32", page_size=4, d_qk=24, d_v=16), copies * 2 * 12 * 24 * 4)
    addresses = [kv_cache.data_ptr() for kv_cache, _ in inputs.copies]
    assert len(set(addresses)) == copies
    seen: list[int] = []
    call = rotating(lambda kv_cache, _: torch.tensor(seen.append(kv_cache.data_ptr()) or 0), inputs.copies)
    for _ in range(2 * copies):
        call()
    assert seen == addresses * 2


def test_copies_lie_as_the_original_does() -> None:
    view = torch.randn(3, 8, 4)[:, 2:5].transpose(1, 2)
    copy = clone_as_it_lies(view)
    assert copy.stride() == view.stride()
    assert copy.data_ptr() != view.data_ptr()
    assert copy.equal(view)
    assert copy.untyped_storage().nbytes() == view.untyped_storage().nbytes()
    assert len(copies_of((view, None), 5 * view.nbytes)) == 5


def test_peers_that_cannot_or_should_not_run_say_why() -> None:
    def bind(inputs: object) -> Any:
        raise AssertionError("a skipped peer is not bound")

    absent: Peer[Any] = Peer("absent", "", bind, missing=lambda: "it is not installed")
    unfair: Peer[Any] = Peer("unfair", "", bind, unfair=lambda inputs: "it has no mask")
    work = runner.Work("", {}, 0.0, 0.0, torch.float32, 0.0)
    problem = make_problem(work, None, [()], lambda _: torch.zeros, [absent, unfair], torch.zeros(1))
    assert problem.skipped == {"absent": "it is not installed", "unfair": "it has no mask"}
    assert set(problem.calls) == {runner.OURS}


def test_varying_lengths_keep_the_token_count() -> None:
    for b, s_kv in itertools.product((4, 5, 16), (11, 4096)):
        lengths = PagedCase(b, 1, s_kv, "bf16", varying=True).lengths
        assert len(lengths) == b
        assert sum(lengths) == b * s_kv
        assert lengths.count(0) == 2
        assert max(lengths) == 2 * s_kv


def test_pairs_under_the_causal_mask() -> None:
    inputs = paged.make_inputs(case := PagedCase(4, 1, 3, "fp32", s_q=4, varying=True), cold_bytes=0)
    seen = [max(0, int(length) - past) for length in inputs.cache_seqlens for past in range(4)]
    assert case.pairs == sum(seen)


def test_the_decode_grid_is_the_documented_one() -> None:
    grid = [case for case in decode.cases(False) if (case.group, case.dtype) == ("grid", "bf16")]
    assert {(c.b, c.h_q, c.s_kv) for c in grid} == {
        *itertools.product((1, 4, 16), (16, 64, 128), (1024, 4096)),
        *itertools.product((1, 4), (16, 64, 128), (16384,)),
    }
    assert {(c.page_size, c.d_qk, c.d_v) for c in grid} == {(64, 576, 512)}
    assert {case.s_q for case in decode.cases(False)} == {1, 2, 4}
    shapes = decode_shapes.cases(False)
    assert {1, 3, 9, 63, 126} <= {case.h_q for case in shapes}
    assert {1, 16, 61, 256, 4096} <= {case.page_size for case in shapes}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_cases_differ_and_quick_ones_are_few(suite: Any) -> None:
    cases = suite.cases(False)
    assert len(set(cases)) == len(cases)
    assert 0 < len(suite.cases(True)) <= len(cases)


def test_a_suite_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLASHMLA_VLLM_PYTHON", "/nowhere")
    monkeypatch.setattr("sys.argv", ["bench", "serve", "--quick"])
    assert command.run_suites(command.parse()) == 1
    assert "serve is left out: vLLM is not installed: make vllm" in capsys.readouterr().err


def test_gqa_pages_keep_a_heads_rows_together() -> None:
    inputs = paged.make_inputs(gqa_decode.cases(True)[0], cold_bytes=0)
    kv_cache, _ = inputs.copies[0]
    assert kv_cache.shape[1:] == (64, 8, 256)
    assert kv_cache.stride()[1:] == (256, 64 * 256, 1)


def test_a_causal_prefill_counts_half_the_pairs() -> None:
    full, causal = (dense.PrefillCase((100, 10), 4, 4, causal, "bf16") for causal in (False, True))
    assert causal.flops / full.flops == pytest.approx((5050 + 55) / (10000 + 100))
    assert prefill.NAME == "prefill"


def test_unknown_peers_and_conditions_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no peer is called nobody"):
        select(decode.SUITE, ["nobody"])
    assert select(decode.SUITE, None) == decode.SUITE.peers
    assert select(decode.SUITE, []) == ()
    assert select(decode.SUITE, ["aten::add"]) == ()  # a peer of another suite
    only = command.parse(["decode", "--only", "b=1,4", "h_q=16"]).only
    chosen = command.matching(decode.cases(False), only)
    assert {(case.b, case.h_q) for case in chosen} == {(1, 16), (4, 16)}
    assert command.matching(decode.cases(False), [("no_such_key", {"1"})]) == []
    with pytest.raises(SystemExit):
        command.parse(["decode", "--only", "b"])
    assert "invalid condition value" in capsys.readouterr().err


def test_conditions_that_no_case_meets_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("decode", "all"):
        assert command.run_suites(command.parse([action, "--only", "b=77"])) == 1
        assert "no case matches" in capsys.readouterr().err


@pytest.mark.parametrize("operator", scaling.OPERATORS)
def test_scaling_runs_on_its_threads(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    problem = scaling.problem(scaling.ScalingCase(operator, 70, 3, scaling.THREADS), (), cold_bytes=0)
    assert list(problem.calls) == ["on 1", "on 2", runner.OURS]
    for name, call in problem.calls.items():
        assert problem.error(name, call()) <= problem.work.tolerance
    assert chosen == [1, 2, 3]


def test_scaling_has_all_threads_and_both_ends_of_the_lengths() -> None:
    cases = scaling.cases(False)
    lengths = {case.s_kv for case in cases if case.group == scaling.LENGTHS}
    assert (min(lengths), max(lengths)) == (4096, 131072)
    assert {case.threads for case in cases} == {torch.get_num_threads()}
    assert {case.group for case in cases} == {scaling.LENGTHS, scaling.THREADS}
