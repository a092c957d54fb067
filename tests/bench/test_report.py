"""Tables: what stands in them, and that they replace what stood between the markers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bench import footprints, report, runner, summary
from cutlass_kernels.tables import marked, place
from flashmla_ops import cpu
from tests.support.bench_runs import small_run
from tests.support.markdown import squeezed


def test_a_wrong_result_is_shown_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| wrong |" in squeezed(report.chapter(small_run(monkeypatch, wrong=True), Path(".")))


def test_columns_are_what_differs_and_the_rest_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    results = small_run(monkeypatch)
    (row,) = results["results"]
    other = row | {"case": row["case"] | {"h_q": 7}}
    text = squeezed(report.table([row, other]))
    assert "In all cases: b 1, s_kv 3, dtype fp32." in text
    assert "| h_q | limit |" in text
    assert "broken: RuntimeError: this build has no such kernel." in text
    assert text.count("other: not installed.") == 1


def test_the_binding_limit_is_named() -> None:
    assert report.limited_by({"compute_limit": 2.0, "memory_limit": 1.0}) == "compute"
    assert report.limited_by({"compute_limit": 1.0, "memory_limit": 2.0}) == "memory"


def test_cases_without_a_limit_show_none(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = small_run(monkeypatch)["results"]
    unlimited = row | {"flops": 0.0, "bytes": 0.0, "compute_limit": 0.0, "memory_limit": 0.0}
    text = report.table([unlimited])
    assert "limit" not in text
    assert "of peak" not in text


def test_dram_is_that_of_the_case_or_in_older_results_that_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    results = small_run(monkeypatch, dram_reads=[20e9, 50e9])
    for row in results["results"]:
        row["timings"][runner.OURS] |= {"median": row["bytes"] / 10e9, "clean": True}
    lines = squeezed(report.table(results["results"])).splitlines()[-2:]
    assert [line.split(" | ")[4] for line in lines] == ["50%", "20%"]
    assert "DRAM bandwidth measured beside the case" in report.heading(results)

    for row in results["results"]:
        del row["dram_read"]
        row["memory_limit"] = row["bytes"] / results["limits"]["dram_read"]
    text = squeezed(report.chapter(results, Path(".")))
    assert text.count(" | 25% | ") == 2
    assert "beside the case" not in text
    (line,) = summary.lines_of(results)
    assert line.shares == [0.25, 0.25]


@pytest.mark.parametrize(("seconds", "shown"), [(2e-3, "2 ± 0.5"), (2e-6, "2 ± 0.5")])
def test_short_calls_are_shown_in_microseconds(seconds: float, shown: str) -> None:
    timing = {"median": seconds, "q1": seconds * 0.75, "q3": seconds * 1.25, "clean": True, "correct": True}
    rows = [{"timings": {runner.OURS: timing}}]
    assert report.duration(timing, report.unit_of(rows)) == shown


def test_durations_have_no_exponent_for_being_large() -> None:
    unit = report.Unit("ms", 1e-3)
    assert [unit.show(seconds) for seconds in (12.34567, 0.1234, 0.01234)] == ["12346", "123", "12.3"]
    assert [unit.show(seconds, 1) for seconds in (0.0213, 0.0013)] == ["21", "1"]


def test_tables_replace_what_stands_between_the_markers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    readme, document, folder = tmp_path / "README.md", tmp_path / "bench.md", tmp_path / "results"
    folder.mkdir()
    readme.write_text(f"before\n{marked(report.MARK, 'old')}\nafter\n")
    report.write_tables(readme, document, folder)
    assert readme.read_text() == f"before\n{marked(report.MARK, report.NO_RESULTS)}\nafter\n"
    assert report.NO_RESULTS in document.read_text()

    results = json.dumps(with_groups(small_run(monkeypatch)))
    (folder / "decode-some-cpu.json").write_text(results)
    (folder / "decode-some-cpu-quick.json").write_text(results)
    report.write_tables(readme, document, folder)
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert (
        squeezed(text).count("| decode, fp32 | 1 |") == 1
    )  # a headline; groups are in the document, quick results nowhere
    assert "decode, shapes, fp32" not in text
    assert squeezed(document.read_text()).count("| decode, shapes, fp32 | 1 |") == 1
    assert text.count("In all cases") == 0
    assert document.read_text().count("In all cases: b 1") == 2
    assert "**shapes**" in document.read_text()
    if cpu.STATE.path:
        assert document.read_text().count("less than level 1") == 1

    readme.write_text("no markers")
    with pytest.raises(ValueError, match="bench begin"):
        report.write_tables(readme, document, folder)


def with_groups(results: dict[str, Any]) -> dict[str, Any]:
    (row,) = results["results"]
    return results | {"results": [row | {"case": row["case"] | {"group": name}} for name in ("grid", "shapes")]}


def test_the_readme_has_the_marks(tmp_path: Path) -> None:
    copy = Path(shutil.copy(report.README, tmp_path))
    place(copy, report.MARK, "new")
    assert marked(report.MARK, "new") in copy.read_text()


def test_a_summary_is_the_median_and_the_range_of_the_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    results = small_run(monkeypatch)
    (row,) = results["results"]
    row |= {"compute_limit": 1.0, "memory_limit": 0.5}
    rows = []
    for ours, peer in ((2.0, 4.0), (1.25, 5.0), (4.0, 4.4)):
        timings = {runner.OURS: ours, "peer": peer}
        rows.append(
            row | {"timings": {n: row["timings"][n] | {"median": t, "correct": True} for n, t in timings.items()}}
        )
    (line,) = summary.lines_of(results | {"results": rows})
    assert (line.shares, line.peers, line.gains) == ([0.5, 0.8, 0.25], [0.25, 0.2, 1 / 4.4], [2.0, 4.0, 1.1])
    table = squeezed(summary.table([results | {"results": rows}]))
    assert "| decode, fp32 | 3 | 50% (25% to 80%) | 23% (20% to 25%) | 2.0x (1.1x to 4.0x) |" in table


def test_a_wrong_result_is_not_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    assert summary.lines_of(small_run(monkeypatch, wrong=True)) == []


def test_machines_are_told_apart_the_one_with_most_suites_first(monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(monkeypatch)
    other = run | {"host": run["host"] | {"microarchitecture": "another"}}
    assert [len(runs) for runs in summary.by_machine([other, run, run]).values()] == [2, 1]


@pytest.mark.skipif(not cpu.STATE.path, reason="no C++ kernels run here")
def test_levels_save_what_the_article_saves() -> None:
    rows = footprints.of_suite("prefill")
    whole, blocks, parts = (footprints.total(row) for row in rows[:3])  # of 2048 tokens
    assert blocks <= 0.4 * whole
    assert parts <= 0.4 * whole
    assert "| 2048 tokens, 16 heads, causal | 2: blocks |" in squeezed(footprints.table(rows))
    assert footprints.of_suite("merge") == []
