"""Verification: its oracle catches what is wrong, and built kernels pass it in the emulator."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cutlass_kernels import emulator, verify
from cutlass_kernels.build import libraries
from cutlass_kernels.build.libraries import Built
from cutlass_kernels.errors import CallError
from cutlass_kernels.gemm import abi
from cutlass_kernels.gemm.catalogue import by_name, kernels, representatives, smoke
from cutlass_kernels.gemm.config import GemmConfig
from cutlass_kernels.tables import marked
from cutlass_kernels.verify import problem as oracle
from cutlass_kernels.verify import report
from cutlass_kernels.verify.cases import Case, cases_of
from cutlass_kernels.verify.problem import FORMATS, Problem, decode, encode, ulp
from cutlass_kernels.verify.problem import build as build_problem
from cutlass_kernels.verify.run import execute
from tests.support.markdown import squeezed


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    config = draw(st.sampled_from(kernels()))
    case = draw(st.sampled_from([case for case in cases_of(config) if case.m * case.n * case.k < 1 << 20]))
    return build_problem(config, case)


@settings(max_examples=60)
@given(problems())
def test_the_rounded_result_passes_and_a_wrong_element_does_not(problem: Problem) -> None:
    stored = encode(problem.expected, problem.config.d)
    assert problem.mismatches(stored)[0] == 0
    finite = np.isfinite(problem.expected)
    largest = np.argmax(np.where(finite, np.abs(problem.expected), -1.0))
    places = [
        (largest, wrong) for wrong in (problem.expected.flat[largest] + 2.5 * problem.bound.flat[largest], np.nan)
    ]
    places += [(place, 0.0) for place in np.flatnonzero(~finite)[:3]]
    places += [(place, np.nan) for place in np.flatnonzero(np.isinf(problem.expected))[:1]]
    for place, wrong in places:
        changed = problem.expected.copy()
        changed.flat[place] = wrong
        count, ratio = problem.mismatches(encode(changed, problem.config.d))
        assert count == 1
        assert ratio > 1


@settings(max_examples=60)
@given(problems())
def test_integers_are_exact_in_the_output(problem: Problem) -> None:
    """So that 0 mismatches is a fair demand, whatever the order of the sums."""
    if problem.exact:
        assert np.abs(problem.expected).max() < 2 ** FORMATS[problem.config.d][0] or problem.case.splits == 1


def hopper_sums(a: NDArray[Any], weight: NDArray[Any]) -> NDArray[Any]:
    """a [m, k] weight [n, k]^T of e4m3, as an H100 gave them in every element outside the bound without `FP8_SUMS`."""

    def exponent(values: NDArray[Any]) -> NDArray[Any]:
        return np.frexp(values)[1] - 1.0

    def cut(values: NDArray[Any], largest: NDArray[Any]) -> NDArray[Any]:
        step = 2.0 ** (largest - 13)
        return np.asarray(np.trunc(values / step) * step)

    special = np.isnan(a @ weight.T)
    left, right = np.nan_to_num(a)[:, None], np.nan_to_num(weight)[None]
    sums = np.zeros(special.shape, np.float32)
    for start in range(0, a.shape[1], 128):
        part = np.zeros(special.shape)
        for k in range(start, min(start + 128, a.shape[1]), 32):
            x, y = left[..., k : k + 32], right[..., k : k + 32]
            powers = np.maximum(exponent(x), -6.0) + np.maximum(exponent(y), -6.0)  # subnormal numbers have -6
            powers = np.where(x * y != 0, powers, -np.inf).max(-1)
            largest = np.maximum(powers, np.where(part != 0, exponent(part), -np.inf))
            largest = np.where(np.isfinite(largest), largest, 0.0)
            part = cut(x * y, largest[..., None]).sum(-1) + cut(part, largest)
            part = cut(part, exponent(part))
        sums = sums + part.astype(np.float32)
    return np.where(special, np.nan, sums.astype(np.float64))


#: Elements that an H100 gave outside the bound without `FP8_SUMS`, by n of the tile: in the cases that had any.
OUTSIDE_ON_H100 = {64: [32, 36, 2], 128: [70, 59, 2]}


@pytest.mark.parametrize("config", [c for c in kernels() if c.a == "e4m3"], ids=lambda config: config.name)
def test_sums_of_a_hopper_device_are_within_the_bound_of_fp8(
    config: GemmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outside() -> list[int]:
        counts = []
        for case in cases_of(config):
            with monkeypatch.context() as patched:
                patched.setattr(oracle, "_products", lambda _, __, a, w: (hopper_sums(a[0], w[0])[None], np.zeros(1)))
                actual = encode(build_problem(config, case).expected, config.d)
            counts.append(build_problem(config, case).mismatches(actual)[0])
        return [count for count in counts if count]

    assert outside() == []
    monkeypatch.setattr(oracle, "FP8_SUMS", 0.0)
    assert outside() == OUTSIDE_ON_H100[config.tile[1]]


def test_every_kernel_has_every_kind_of_case() -> None:
    for config in kernels():
        cases = cases_of(config)
        assert {case.fill for case in cases} == {"integers", "normal", "special"}
        assert any(case.k >= 1024 for case in cases)
        assert any(case.m == 1 for case in cases)
        assert any(case.m % config.tile[0] and case.n % config.tile[1] and case.k % config.tile[2] for case in cases)
        assert any(case.batch > 1 for case in cases) == config.batches
        assert any(case.splits > 1 for case in cases) == config.splits
        assert any(case.groups for case in cases) == (config.family == "grouped")
        assert any(case.offsets for case in cases) == (config.family == "grouped")


@pytest.mark.parametrize("element", ["bf16", "fp16", "f32", "e4m3"])
def test_an_ulp_is_the_distance_to_the_next_number(element: str) -> None:
    values = decode(encode(np.array([1.0, 1.5, -3.0, 0.0625, 100.0]), element), element)
    step = ulp(values, element)
    away = values + np.sign(values) * step
    assert np.array_equal(decode(encode(away, element), element), away)
    half = values + np.sign(values) * step * 0.25
    assert np.array_equal(decode(encode(half, element), element), values)


@pytest.mark.parametrize("config", smoke(), ids=lambda config: config.name)
def test_a_built_kernel_is_verified(config: GemmConfig, built: dict[GemmConfig, Built]) -> None:
    result = verify.verify(built[config])
    assert (result.state, result.why) == ("verified", "")
    assert result.cases == 2 * len(cases_of(config))
    assert result.error_over_bound <= 1
    assert result.counters["mma"] > 0


def test_three_timings_give_one_result(built: dict[GemmConfig, Built]) -> None:
    config = smoke()[2]
    problem = build_problem(config, Case(70, 72, 136, strided=True))
    landings: tuple[emulator.Landing, ...] = ("late", "early", "reversed")
    found = {
        execute(built[config], problem, emulator.Options(landing=landing)).error_over_bound for landing in landings
    }
    assert len(found) == 1


REFUSED: dict[str, dict[str, Any]] = {
    "k": {"k": 63},
    "n": {"n": 63},
    "no rows": {"m": 0},
    "no columns": {"n": 0},
    "no sums": {"k": 0},
    "more than 32 bits": {"m": (1 << 32) + 64},
    "address of a": {"a": 8},
    "address of c": {"c": 8},
    "address of d": {"d": 2},
    "address of the bias": {"bias": 4},
    "row stride": {"weight_stride": (68, 0)},
    "batch": {"batch": 0},
    "splits": {"splits": 0},
    "more batches than a grid has": {"batch": 70000},
}


@pytest.mark.parametrize("config", smoke(), ids=lambda config: config.name)
@pytest.mark.parametrize("what", REFUSED)
def test_what_a_kernel_cannot_do_is_refused_before_it_runs(
    config: GemmConfig, what: str, built: dict[GemmConfig, Built]
) -> None:
    def call(device: emulator.Device, library: ctypes.CDLL) -> tuple[str | None, str | None]:
        kernel, place = abi.Kernel(config, library), device.empty((64, 64), np.uint16).pointer
        good = abi.GemmCall(64, 64, 64, 1, place, place, place, place, alpha=1.0, splits=1)
        for name in ("a", "weight", "c", "d"):
            getattr(good, f"{name}_stride")[:] = (64, 0)
        before = kernel.refuses(good)
        for name, value in REFUSED[what].items():
            if isinstance(value, tuple):
                getattr(good, name)[:] = value
            else:
                setattr(good, name, place + value if name in ("a", "c", "d", "bias") else value)
        with pytest.raises(CallError, match=config.name):
            kernel.run(good, 0)
        return before, kernel.refuses(good)

    before, after = emulator.run(built[config].library, call, arch=config.arch).result
    assert before is None
    assert after is not None


def test_a_small_workspace_is_refused(built: dict[GemmConfig, Built]) -> None:
    config = smoke()[0]

    def call(device: emulator.Device, library: ctypes.CDLL) -> tuple[int, str]:
        kernel, place = abi.Kernel(config, library), device.empty((64, 512), np.uint16).pointer
        split = abi.GemmCall(64, 64, 512, 1, place, place, place, place, alpha=1.0, splits=3)
        for name in ("a", "weight", "c", "d"):
            getattr(split, f"{name}_stride")[:] = (512, 0)
        with pytest.raises(CallError) as raised:
            kernel.run(split, 0)
        return kernel.workspace(split), str(raised.value)

    needed, message = emulator.run(built[config].library, call, arch=config.arch).result
    assert needed > 0
    assert "the workspace is smaller than flashmla_gemm_workspace says" in message


def test_without_a_device_it_says_so(built: dict[GemmConfig, Built]) -> None:
    """CUTLASS itself would answer 0 bytes, and end the process for want of a driver."""

    class Library:
        flashmla_gemm_abi = staticmethod(lambda: abi.ABI)
        flashmla_gemm_workspace = staticmethod(lambda call, size: abi.NO_DEVICE)
        flashmla_gemm_status = staticmethod(lambda code: b"no CUDA device" if code == abi.NO_DEVICE else b"?")

    kernel = abi.Kernel(smoke()[0], Library())  # type: ignore[arg-type]
    with pytest.raises(CallError, match="no CUDA device"):
        kernel.workspace(abi.GemmCall())


@pytest.mark.slow
def test_most_dropped_synchronisation_is_noticed(built: dict[GemmConfig, Built]) -> None:
    config = smoke()[0]
    result = verify.verify(built[config], cases_of(config), mutations=True)
    assert result.mutants is not None
    assert result.detected is not None
    assert result.mutants >= 15
    # Mutants that go unnoticed: every case passes without all at once: see docs/cuda_verify.md.
    assert result.detected >= 0.75 * result.mutants, result.undetected
    assert all(report.reason(each) for each in result.undetected)


@pytest.mark.slow
@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("config", kernels(), ids=lambda config: config.name)
def test_the_whole_catalogue_is_verified(config: GemmConfig) -> None:
    result = verify.verify(libraries.build([config], quiet=True)[0])
    assert (result.state, result.why) == ("verified", "")


def test_results_are_kept_and_shown(tmp_path: Path) -> None:
    facts = {"nvcc": "V13.0.88", "cutlass": "4.2.0"}
    path, document = tmp_path / "results.json", tmp_path / "cuda.md"
    one = report.KernelResult("sm80_linear_one", "sm_80", "verified", cases=4, error_over_bound=0.5, mutants=5)
    one = replace(one, detected=4, undetected=["line 7: bar.sync 0"], without_undetected=4)
    report.write(path, [one], facts)
    report.write(path, [report.KernelResult("sm80_linear_two", "sm_80", "wrong", why="3 | mismatches")], facts)
    assert [row["name"] for row in json.loads(path.read_text())["kernels"]] == ["sm80_linear_one", "sm80_linear_two"]
    document.write_text(f"before\n{marked(report.MARK, 'old')}\nafter\n")
    report.update(document, report.load(path))
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1 of 2 kernels verified **in the emulator, not on hardware**" in text
    assert "| sm_80 linear | 1 of 2 | 4 | 0 | 0.50 of the bound | 0 | 4/5 (1 kernels) |" in squeezed(text)
    page = (tmp_path / report.PAGE).read_text()
    assert "wrong: 3 \\| mismatches" in page
    assert f"| `bar.sync 0` | {report.REASONS['bar.sync 0']} | 1 | 4 |" in squeezed(page)
    with pytest.raises(ValueError, match="expected one"):
        report.update(path, report.load(path))


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return report.load(ROOT / "bench" / "results" / "cuda_verify.json")


def test_the_tables_are_those_of_the_committed_results(committed: dict[str, Any]) -> None:
    assert marked(report.MARK, report.summary(committed)) in (ROOT / "docs" / "cuda.md").read_text()
    assert (ROOT / "docs" / report.PAGE).read_text() == report.page(committed)


def test_every_kernel_of_the_catalogue_has_a_committed_result(committed: dict[str, Any]) -> None:
    assert {row["name"] for row in committed["kernels"]} == {config.name for config in kernels()}
    for row in committed["kernels"]:
        assert (row["state"], row["hazards"]) == ("verified", 0), row["name"]
        assert row["error_over_bound"] <= 1, row["name"]
        assert row["registers"] <= 255, row["name"]


def test_a_kernel_of_each_kind_has_mutants_and_most_are_noticed(committed: dict[str, Any]) -> None:
    rows = {row["name"]: row for row in committed["kernels"]}
    assert all(rows[config.name]["mutants"] for config in representatives())
    surveyed = [row for row in rows.values() if row["mutants"]]
    sm80 = [row for row in surveyed if row["arch"] == "sm_80"]
    assert sum(row["detected"] for row in sm80) >= 0.8 * sum(row["mutants"] for row in sm80)
    for row in surveyed:
        assert len(row["undetected"]) == row["mutants"] - row["detected"]
        assert all(report.reason(each) for each in row["undetected"]), row["name"]
        assert not row["undetected"] or row["without_undetected"] >= len(cases_of(by_name(row["name"])))
