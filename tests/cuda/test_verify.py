"""`python -m flashmla_ops verify`: it finds what is wrong, and its page is that of the committed results."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cutlass_kernels import emulator
from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.around_config import AppendConfig
from cutlass_kernels.attention.config import CallConfig, Config, DecodeConfig
from flashmla_ops.__main__ import main
from flashmla_ops.cuda import verify
from flashmla_ops.cuda.catalogue import shipped
from flashmla_ops.cuda.verify import report
from flashmla_ops.cuda.verify.trials import Trial, trials_of, written

needs_dsl = pytest.mark.skipif(not libraries.can_build(), reason=f"{libraries.DSL} is not installed")
ROOT = Path(__file__).parents[2]
COPY = AppendConfig(16)


@needs_dsl
def test_the_command_verifies_writes_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, document = tmp_path / "results.json", tmp_path / "page.md"
    words = ["verify", "--arch", "sm_80", "--only", "append_native", "--mutations"]
    assert main([*words, "--results", str(results), "--document", str(document)]) == 0
    assert "append_native_w16 sm_80: verified, 4 runs" in capsys.readouterr().out
    (row,) = report.load(results)["kernels"]
    assert (row["state"], row["mutants"], row["detected"]) == ("verified", 3, 3)
    assert "`append_native_w16` | sm_80 | verified" in document.read_text()
    assert main(["verify", "--only", "nothing has this name"]) == 1


def failing(error: float, of: Config = COPY) -> report.KernelResult:
    def check(*, engine: Any) -> float:
        return written(COPY, 20, engine=engine) + error

    return verify.verify(of, "sm_80", trials=[Trial("a trial", 2, check)])


@needs_dsl
def test_what_is_wrong_is_a_result() -> None:
    assert failing(0.5).state == "verified"
    for error in (1.01, math.inf, math.nan):
        assert failing(error).state == "wrong"
    assert failing(0.0, of=AppendConfig(8)).state == "not run"


@needs_dsl
def test_a_dropped_barrier_is_a_hazard(monkeypatch: pytest.MonkeyPatch) -> None:
    (trial, *_) = trials_of(COPY)
    _, emulated = verify.run("sm_80", trial, emulator.Options())
    site = emulated.machine.launches[0].sites[-1]
    plain = emulator.Options
    monkeypatch.setattr(emulator, "Options", partial(plain, drop=frozenset({site})))
    assert verify.verify(COPY, "sm_80", trials=[trial]).state == "hazards"


@needs_dsl
def test_cost_is_counted() -> None:
    """Every row once, and no product more than the tile needs."""
    config = next(each for each in shipped("sm_80") if isinstance(each, DecodeConfig))
    result = verify.verify(config, "sm_80", trials=trials_of(config)[2:])
    assert (result.state, result.ratios["products"]) == ("verified", 1.0)
    assert 1 <= result.ratios["bytes"] <= result.ratios["sectors"] < 1.1
    assert {name: bound["binds"] for name, bound in result.bounds.items()} == {"A100": "memory"}


def test_results_of_earlier_runs_stay(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    one = report.KernelResult("one", "sm_80", "append", "verified", mutants=3, detected=2, undetected=["line 1: x;"])
    report.write(path, [one], "dsl")
    again = dataclasses.replace(one, mutants=None, detected=None, undetected=[], runs=7)
    report.write(path, [again, dataclasses.replace(one, arch="sm_90a", state="wrong", why="a | b")], "dsl")
    first, second = json.loads(path.read_text())["kernels"]
    assert (first["runs"], first["mutants"], first["undetected"]) == (7, 3, ["line 1: x;"])
    assert second["state"] == "wrong"
    assert "wrong: a \\| b" in report.page(report.load(path))


def test_trials_of_every_kernel() -> None:
    for arch in libraries.ARCHS:
        for config in shipped(arch):
            assert trials_of(config)
        kinds = {(each.kind, getattr(each, "source", "")) for each in verify.representatives(arch)}
        assert ("decode_sm90" if arch == "sm_90a" else "decode", "indices") in kinds


@pytest.fixture(scope="module")
def committed() -> dict[str, Any]:
    return report.load(ROOT / report.RESULTS)


def test_the_page_is_that_of_the_committed_results(committed: dict[str, Any]) -> None:
    assert (ROOT / report.PAGE).read_text() == report.page(committed)


def test_every_kernel_has_a_committed_result(committed: dict[str, Any]) -> None:
    rows = {(row["arch"], row["name"]): row for row in committed["kernels"]}
    assert set(rows) == {(arch, config.name) for arch in ("sm_80", "sm_90a") for config in shipped(arch)}
    for (arch, name), row in rows.items():
        assert (row["state"], row["error"] <= 1, row["registers"] <= 255) == ("verified", True, True), (arch, name)


def test_most_mutants_are_noticed_and_the_others_argued(committed: dict[str, Any]) -> None:
    surveyed = [row for row in committed["kernels"] if row["mutants"] is not None]
    kinds = {(row["arch"], row["kind"]) for row in surveyed}
    assert kinds >= {("sm_90a", "decode_sm90")} | {
        ("sm_80", kind) for kind in ("decode", "combine", "append", "merge", "schedule")
    }
    for row in surveyed:
        assert len(row["undetected"]) == row["mutants"] - row["detected"]
        assert all(report.reason(each) for each in row["undetected"]), row["name"]


@pytest.mark.slow
@needs_dsl
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_kernel_of_each_kind_is_verified(arch: str) -> None:
    for config in verify.representatives(arch):
        result = verify.verify(config, arch)
        assert (result.state, result.why) == ("verified", "")
        assert bool(result.ratios) == isinstance(config, CallConfig)
