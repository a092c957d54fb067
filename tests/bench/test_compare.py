"""Comparing two results: noise is no change, a slower median is, and so is a result that became wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as command
from bench import compare, runner
from tests.support.bench_runs import small_run
from tests.support.markdown import squeezed


@pytest.fixture
def old(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    results = small_run(monkeypatch)
    for timing in results["results"][0]["timings"].values():
        timing.update(median=1.0, q1=0.98, q3=1.03, correct=True, clean=True)
    return results


def changed(old: dict[str, Any], name: str = runner.OURS, **values: object) -> dict[str, Any]:
    new = copy.deepcopy(old)
    new["results"][0]["timings"][name].update(values)
    return new


@pytest.mark.parametrize(
    ("median", "q1", "q3", "verdict"),
    [
        (1.05, 1.02, 1.08, "same"),  # the ranges overlap
        (1.05, 1.04, 1.06, "slower"),
        (0.90, 0.89, 0.97, "faster"),
        (0.90, 0.70, 0.99, "same"),
    ],
)
def test_changes_beyond_the_quartiles_count(
    old: dict[str, Any], median: float, q1: float, q3: float, verdict: str
) -> None:
    changes = compare.compare(old, changed(old, median=median, q1=q1, q3=q3))
    assert {change.name: change.verdict for change in changes} == {runner.OURS: verdict, "peer": "same"}
    assert bool(compare.regressions(changes)) == (verdict == "slower")


def test_tiny_changes_do_not_count_however_quiet(old: dict[str, Any]) -> None:
    old = changed(old, q1=1.0, q3=1.0)
    assert not compare.regressions(compare.compare(old, changed(old, median=1.019, q1=1.019, q3=1.019)))


def test_a_result_that_became_wrong_is_a_regression(old: dict[str, Any]) -> None:
    (change,) = compare.regressions(compare.compare(old, changed(old, correct=False)))
    assert change.verdict == "wrong now"


def test_slower_peers_are_shown_but_are_not_our_regressions(old: dict[str, Any]) -> None:
    changes = compare.compare(old, changed(old, "peer", median=3.0, q1=2.9, q3=3.1))
    assert not compare.regressions(changes)
    assert "| peer | 1000 | 3000 | 3.00 | slower |" in squeezed(compare.table(changes))


def test_new_cases_and_other_machines(old: dict[str, Any]) -> None:
    new = copy.deepcopy(old)
    new["results"][0]["case"]["b"] = 99
    assert compare.compare(old, new) == []
    for key in ("microarchitecture", "threads"):
        with pytest.raises(ValueError, match=f"different {key}"):
            compare.compare(old, old | {"host": old["host"] | {key: "another"}})


def test_the_command_fails_on_a_regression(
    old: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = tmp_path / "old.json", tmp_path / "new.json"
    before.write_text(json.dumps(old))
    after.write_text(json.dumps(changed(old, median=2.0, q1=1.9, q3=2.1)))
    monkeypatch.setattr("sys.argv", ["bench", "compare", str(before), str(after)])
    assert command.main() == 1
    assert "| 2.00 | slower |" in squeezed(capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", ["bench", "compare", str(before), str(before)])
    assert command.main() == 0
