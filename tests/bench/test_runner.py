"""A whole run, on made-up limits: what is in its JSON, and that a wrong result cannot hide."""

from __future__ import annotations

import json
import weakref

import pytest
import torch

from bench import limits, runner, timing
from bench.suites import append, decode
from tests.support.bench_runs import USUAL, dram, small_run

HURRY = timing.Budget(block_seconds=0.0, seconds=0.0)


def solve(problem: runner.Problem) -> runner.Solved:
    return runner.solve(problem, HURRY, lambda: dram(40e9))


def test_row_error_finds_one_wrong_row_and_nan() -> None:
    expected = torch.ones(5, 8, dtype=torch.float64)
    result = expected.clone()
    assert runner.row_error(result, expected) == 0
    result[3] *= 1.5
    assert runner.row_error(result, expected) == pytest.approx(0.5)
    result[3, 0] = float("nan")
    assert runner.row_error(result, expected) == float("inf")
    assert runner.row_error(result[1:], expected) == float("inf")


def test_solved_cases_hold_no_tensors() -> None:
    (problem,) = decode.SUITE.problems([decode.PagedCase(2, 3, 11, "fp32", d_qk=24, d_v=16)], [], cold_bytes=0)
    solved = solve(problem)
    expected = weakref.ref(problem.expected)
    del problem
    assert expected() is None
    assert solved.correct(runner.OURS)


def test_an_append_that_writes_nothing_is_wrong() -> None:
    case = append.AppendCase(rows=3, dtype="bf16", d=8, n_pages=2)
    problem = append.problem(case, [], cold_bytes=0)
    assert solve(problem).correct(runner.OURS)
    cache = problem.calls[runner.OURS]()
    problem.read(cache)  # as the runner does after a block
    idle = runner.Problem(problem.work, {runner.OURS: lambda: cache}, {}, problem.expected, problem.read)
    assert not solve(idle).correct(runner.OURS)


def test_a_run_is_json_with_its_circumstances(monkeypatch: pytest.MonkeyPatch) -> None:
    results = json.loads(json.dumps(small_run(monkeypatch)))
    assert {"schema", "suite", "command", "date", "commit", "versions", "host", "explain", "limits"} <= set(results)
    assert results["explain"]
    assert runner.wrong(results) == []
    (row,) = results["results"]
    ours = row["timings"][runner.OURS]
    assert ours["fraction_of_peak"] == pytest.approx(1e3 / ours["median"] / 190e9)
    assert ours["fraction_of_dram"] == pytest.approx(1e3 / ours["median"] / 40e9)
    assert row["skipped"] == {"other": "not installed", "broken": "RuntimeError: this build has no such kernel"}
    assert set(row["timings"]) == {runner.OURS, "peer"}
    assert row["memory_limit"] == pytest.approx(1e3 / 40e9)


def test_the_memory_limit_of_a_case_is_what_was_measured_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = [20e9, 50e9, 30e9]
    results = small_run(monkeypatch, dram_reads=speeds)
    assert [row["dram_read"] for row in results["results"]] == speeds
    for row, speed in zip(results["results"], speeds, strict=True):
        assert row["memory_limit"] == pytest.approx(1e3 / speed)
        for timed in row["timings"].values():
            assert timed["fraction_of_dram"] == pytest.approx(1e3 / timed["median"] / speed)
    assert results["limits"]["dram_read"] == 40e9  # the median of all: one before each case, one at the end, and these


def test_the_progress_line_has_the_dram_of_the_case() -> None:
    summary = timing.summarize([timing.Block(wall=1.0, cpu_max=1.0, cpu_sum=2.0, delay=0.0)], max_delay=0.03)
    work = runner.Work("tiny", {}, flops=95e9, bytes=10e9, dtype=torch.float32, tolerance=0.0)
    solved = runner.Solved(work, {runner.OURS: summary}, {runner.OURS: 0.0}, {}, dram_read=20e9)
    of_run = limits.limits_of(USUAL, "AVX2 + FMA", 2)
    assert runner.one_line(solved, of_run).startswith("tiny (50% of peak, 50% of DRAM): ")


def test_a_wrong_result_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    results = small_run(monkeypatch, wrong=True)
    assert runner.wrong(results) == [results["results"][0]["case"]]
    assert runner.wrong(results, "peer") == []
