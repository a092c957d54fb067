"""The bench itself: its statistics, its limits, its problems and its tables, on made-up or tiny numbers."""

from __future__ import annotations

import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import __main__ as command
from bench import decode, limits, peers, report, runner, timing
from flashmla_ops import reference

CPUINFO = """processor\t: 0
model name\t: Some CPU @ 3 GHz
flags\t\t: fpu avx avx2 fma avx512f avx512_bf16

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""


def block(wall: float, *, cpu: float = 1.0, delay: float = 0.0) -> timing.Block:
    return timing.Block(wall, cpu, 2 * cpu, delay)


# --- timing


def test_only_clean_blocks_count() -> None:
    blocks = [block(w) for w in (1.0, 2.0, 3.0, 4.0, 5.0)] + [block(100.0, delay=0.5)] * 9
    summary = timing.summarize(blocks, max_delay=0.03)
    assert (summary.q1, summary.median, summary.q3) == (2.0, 3.0, 4.0)
    assert summary.clean
    assert (summary.clean_blocks, summary.blocks) == (5, 14)


def test_cpu_time_stands_in_where_too_few_blocks_are_clean() -> None:
    blocks = [block(50.0, cpu=7.0)] * 3 + [block(100.0, cpu=7.0, delay=0.5)] * 4
    summary = timing.summarize(blocks, max_delay=0.03)
    assert not summary.clean
    assert summary.median == summary.cpu_max == 7.0
    assert summary.cpu_sum == 14.0


@given(st.lists(st.floats(1e-9, 1e3), min_size=1, max_size=50))
def test_quartiles_are_ordered_and_inside(values: list[float]) -> None:
    q1, median, q3 = timing.quartiles(values)
    assert min(values) <= q1 <= median <= q3 <= max(values)


def test_turns_are_interleaved_and_every_block_is_checked() -> None:
    calls: list[str] = []
    checked: list[tuple[str, int]] = []
    counter = itertools.count()

    def call(name: str) -> int:
        calls.append(name)
        return next(counter)

    budget = timing.Budget(block_seconds=0.0, clean_blocks=3, seconds=0.0, min_blocks=3, max_delay=float("inf"))
    result = timing.interleave(
        {"a": lambda: call("a"), "b": lambda: call("b")}, budget, lambda name, value: checked.append((name, value))
    )
    assert calls == ["a", "a", "b", "b"] * 3  # a warm call and a block of one call each turn
    assert [name for name, _ in checked] == ["a", "b"] * 3
    assert [value for _, value in checked] == [1, 3, 5, 7, 9, 11]  # what the timed call returned, not the warm one
    assert result["a"].blocks == 3


def test_a_block_counts_the_cpu_time_of_this_thread() -> None:
    measured, value = timing.run_block(lambda: sum(range(20_000)), seconds=0.01)
    assert value == sum(range(20_000))
    assert 0 < measured.cpu_max <= measured.cpu_sum
    assert measured.cpu_max <= measured.wall * 1.5


# --- limits


def test_cpuinfo() -> None:
    model, flags = limits.parse_cpuinfo(CPUINFO)
    assert model == "Some CPU @ 3 GHz"
    assert limits.Cpu(model, flags, 0).instruction_set[0] == "AVX-512 BF16"


@pytest.mark.parametrize(
    ("flags", "name"),
    [("avx512f avx2 fma", "AVX-512"), ("avx2 fma", "AVX2 + FMA"), ("avx2", limits.BASELINE), ("", limits.BASELINE)],
)
def test_instruction_set_by_flags(flags: str, name: str) -> None:
    assert limits.Cpu("", frozenset(flags.split()), 0).instruction_set[0] == name


def output(**samples: list[float]) -> str:
    """What the measuring program prints on a 3 GHz machine with 32-byte vectors: at most 192 GFLOP/s on two threads."""
    usual = {
        "hz": [3e9],
        "fp32_flops": [190e9],
        "l2_read": [200e9],
        "dram_read": [40e9],
        "dram_read_prefetched": [38e9],
    }
    return json.dumps({"vector_bytes": 32, "threads": 2, "dram_bytes": 1, "samples": usual | samples})


def test_limits_are_medians_and_dram_is_the_better_of_two_ways() -> None:
    text = output(fp32_flops=[180e9, 190e9, 170e9], dram_read_prefetched=[45e9])
    found = limits.limits_of(limits.parse_output(text, 2), "AVX2 + FMA", 2)
    assert found.fp32_flops == 180e9
    assert found.dram_read == 45e9
    assert found.peak(torch.bfloat16) == found.peak(torch.float32) == 180e9
    assert found.peak_name(torch.bfloat16) == "fp32 multiply-add, AVX2 + FMA"


def test_bf16_peak_where_the_cpu_has_the_instruction() -> None:
    found = limits.limits_of(limits.parse_output(output(bf16_flops=[380e9]), 2), "AVX-512 BF16", 2)
    assert found.peak(torch.bfloat16) == 380e9
    assert found.peak(torch.float16) == found.peak(torch.float32) == 190e9


def test_impossible_samples_are_dropped() -> None:
    kept = limits.parse_output(output(fp32_flops=[190e9, 1e15, 185e9], dram_read=[40e9, 41e9, 900e9]), 2)
    assert kept["fp32_flops"] == [190e9, 185e9]
    assert kept["dram_read"] == [40e9, 41e9]  # no DRAM is faster than the L2 caches


@pytest.mark.parametrize("name", ["hz", "fp32_flops", "l2_read", "dram_read"])
@pytest.mark.parametrize("values", [[1e15, 1e15, 1e9], [0.0], []])
def test_mostly_impossible_samples_are_an_error(name: str, values: list[float]) -> None:
    with pytest.raises(limits.LimitsError, match=name):
        limits.parse_output(output(**{name: values}), 2)


# --- problems and results


CASE = decode.DecodeCase(b=2, h_q=3, s_kv=11, dtype="fp32", page_size=4, d_qk=24, d_v=16)


def test_exact_is_the_reference() -> None:
    inputs = decode.make_inputs(CASE, cold_bytes=0)
    expected, _ = reference.decode(inputs.q, inputs.caches[0], None, inputs.block_table, inputs.cache_seqlens, CASE.d_v)
    torch.testing.assert_close(decode.exact(inputs), expected)


@pytest.mark.parametrize("copies", [1, 3])
def test_caches_are_rotated_to_be_cold(copies: int) -> None:
    inputs = decode.make_inputs(CASE, cold_bytes=copies * CASE.cache_bytes)
    assert len({cache.data_ptr() for cache in inputs.caches}) == copies
    seen: list[int] = []
    call = decode.rotating(lambda cache: torch.tensor(seen.append(cache.data_ptr()) or 0), inputs.caches)
    for _ in range(2 * copies):
        call()
    assert seen == [cache.data_ptr() for cache in inputs.caches] * 2


def test_every_implementation_is_correct_and_absent_peers_say_why() -> None:
    whole_pages = decode.DecodeCase(b=2, h_q=3, s_kv=12, dtype="fp32", page_size=4, d_qk=24, d_v=16)
    absent = peers.Peer("absent", "never there", lambda inputs: lambda cache: cache, lambda: "it is not installed")
    used = [peer for peer in peers.PEERS if peer.name != "torch.compile"]
    (problem,) = decode.problems([whole_pages], [*used, absent], cold_bytes=0)
    assert problem.skipped == {"absent": "it is not installed"}
    assert set(problem.calls) == {runner.OURS, "torch eager", "torch SDPA"}
    for call in problem.calls.values():
        assert runner.row_error(call(), problem.expected) < problem.work.tolerance


def test_solved_cases_hold_no_tensors() -> None:
    (problem,) = decode.problems([CASE], [], cold_bytes=0)
    solved = runner.solve(problem, timing.Budget(block_seconds=0.0, seconds=0.0))
    expected = weakref.ref(problem.expected)
    del problem
    assert expected() is None
    assert solved.correct(runner.OURS)


def test_the_suite_is_the_documented_grid() -> None:
    grid = decode.cases(quick=False, dtypes=["bf16"])
    assert {(c.b, c.h_q, c.s_kv) for c in grid} == set(itertools.product((1, 4, 16), (16, 128), (1024, 4096)))
    assert {(c.page_size, c.d_qk, c.d_v) for c in grid} == {(64, 576, 512)}
    assert set(decode.cases(quick=True, dtypes=["bf16"])) < set(grid)


def test_row_error_finds_one_wrong_row_and_nan() -> None:
    expected = torch.ones(5, 8, dtype=torch.float64)
    result = expected.clone()
    assert runner.row_error(result, expected) == 0
    result[3] *= 1.5
    assert runner.row_error(result, expected) == pytest.approx(0.5)
    result[3, 0] = float("nan")
    assert runner.row_error(result, expected) == float("inf")
    assert runner.row_error(result[1:], expected) == float("inf")


def test_unknown_peers_and_cases_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no peer is called nobody"):
        peers.select(["nobody"])
    assert peers.select(None) == peers.PEERS
    assert peers.select([]) == ()
    assert command.parse(["decode", "--case", "1,16,128"]).case == [(1, 16, 128)]
    with pytest.raises(SystemExit):
        command.parse(["decode", "--case", "1,16"])
    assert "invalid shape value" in capsys.readouterr().err


# --- a whole run and its table


def fail() -> torch.Tensor:
    raise RuntimeError("this build has no such kernel\nand a long story")


def small_run(monkeypatch: pytest.MonkeyPatch, wrong: bool = False) -> dict[str, Any]:
    expected = torch.ones(2, 4, dtype=torch.float64)
    ours = expected * (2 if wrong else 1)
    work = runner.Work(
        title="tiny",
        case={"b": 1, "h_q": 2, "s_kv": 3, "dtype": "fp32"},
        flops=1e3,
        bytes=1e3,
        dtype=torch.float32,
        tolerance=1e-3,
    )
    calls = {runner.OURS: lambda: ours, "peer": lambda: expected, "broken": fail}
    problem = runner.Problem(work, calls, {"other": "not installed"}, expected)
    monkeypatch.setattr(
        limits.LimitMeter, "measure", lambda self: self.samples.update(limits.parse_output(output(), 2))
    )
    budget = timing.Budget(block_seconds=0.0, clean_blocks=2, seconds=0.0, min_blocks=2)
    with limits.LimitMeter(threads=2) as meter:
        return runner.run("decode", [problem], budget, meter)


def test_a_run_is_json_with_its_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    results = json.loads(json.dumps(small_run(monkeypatch)))
    assert {"schema", "suite", "command", "date", "commit", "versions", "host", "explain", "limits"} <= set(results)
    assert results["explain"]
    assert runner.wrong(results) == []
    (row,) = results["results"]
    ours = row["timings"][runner.OURS]
    assert ours["fraction_of_peak"] == pytest.approx(1e3 / ours["median"] / 190e9)
    assert row["skipped"] == {"other": "not installed", "broken": "RuntimeError: this build has no such kernel"}
    assert set(row["timings"]) == {runner.OURS, "peer"}
    assert row["memory_limit"] == pytest.approx(1e3 / 40e9)


def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    results = small_run(monkeypatch, wrong=True)
    assert runner.wrong(results) == [results["results"][0]["case"]]
    assert runner.wrong(results, "peer") == []
    assert "| wrong |" in report.table(results)


def test_tables_replace_what_stands_between_the_markers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "results"
    folder.mkdir()
    begin, end = report.markers("decode")
    readme.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    report.write_tables(readme, folder)
    assert readme.read_text() == f"before\n{begin}\n{report.NO_RESULTS}\n{end}\nafter\n"

    results = json.dumps(small_run(monkeypatch))
    (folder / "decode-some-cpu.json").write_text(results)
    (folder / "decode-some-cpu-quick.json").write_text(results)
    report.write_tables(readme, folder)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert text.count("| b | h_q | s_kv |") == 1  # quick results are not shown
    assert "absent" in text

    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench:decode"):
        report.write_tables(readme, folder)


def test_the_readme_has_the_markers() -> None:
    for marker in report.markers("decode"):
        assert marker in report.README.read_text()
