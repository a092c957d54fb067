"""Pictures: they are written, they are the same for the same results, and they show every case."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import report
from tests.support.bench_runs import small_run

pytest.importorskip("matplotlib")

from bench import plots


def test_pictures_are_reproducible_and_linked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = small_run(monkeypatch)
    written = plots.draw(results, tmp_path / "bench")
    assert {path.suffix for path in written} == {".svg", ".png"}
    assert {path.stem.rsplit("-", 1)[1] for path in written} == {"roofline", "bars"}
    first = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in plots.draw(results, tmp_path / "bench")] == first
    chapter = report.chapter(results, tmp_path, tmp_path / "bench")
    assert all((f"](bench/{path.name})" in chapter) == (path.suffix == ".svg") for path in written)


def test_each_group_has_its_bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = small_run(monkeypatch)
    (row,) = results["results"]
    results["results"] = [row | {"case": row["case"] | {"group": name}} for name in ("grid", "h_kv < h_q")]
    stems = {path.stem for path in plots.draw(results, tmp_path)}
    assert {stem.partition("-threads-")[2] for stem in stems} == {"roofline", "bars-grid", "bars-h-kv-h-q"}


def test_wrong_results_are_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = small_run(monkeypatch, wrong=True)["results"]
    assert plots.shown(row, "flashmla") is None
    assert plots.shown(row, "peer") is not None
    assert plots.shown(row, "broken") is None


def test_no_roofline_without_flops(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = small_run(monkeypatch)
    results["results"][0] |= {"flops": 0.0, "bytes": 0.0, "compute_limit": 0.0, "memory_limit": 0.0}
    assert {path.stem.rsplit("-", 1)[1] for path in plots.draw(results, tmp_path)} == {"bars"}


def test_bars_are_shares_of_the_limit_or_speeds_relative_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = small_run(monkeypatch)["results"]
    row["timings"]["flashmla"]["median"], row["timings"]["peer"]["median"] = 2.0, 4.0
    row["compute_limit"], row["memory_limit"] = 1.0, 0.5
    assert [plots.speed(row, name) for name in ("flashmla", "peer", "broken")] == [0.5, 0.25, None]
    row["compute_limit"], row["memory_limit"] = 0.0, 0.0
    assert [plots.speed(row, name) for name in ("flashmla", "peer")] == [1.0, 0.5]


def test_scaling_is_drawn_as_lines(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results = small_run(monkeypatch)
    (row,) = results["results"]
    rows = [
        row | {"case": {"operator": "x", "s_kv": s_kv, "threads": threads, "dtype": "bf16", "group": group}}
        for group, s_kv, threads in (("lengths", 4096, 2), ("lengths", 8192, 2), ("threads", 4096, 2))
    ]
    rows[-1]["timings"] = row["timings"] | {"on 1": row["timings"]["flashmla"]}
    drawn = {
        path.stem.rsplit("-threads-", 1)[1]
        for path in plots.draw(results | {"suite": "scaling", "results": rows}, tmp_path)
    }
    assert drawn == {"lines", "bars-lengths", "bars-threads"}


def test_labels_leave_out_what_follows() -> None:
    values = [(1, 64, 128, 8), (4, 64, 128, 8), (1, 9, 64, 3), (4, 9, 64, 3)]
    rows = [{"case": dict(zip(("b", "h_q", "d", "h_kv"), each, strict=True))} for each in values]
    assert plots.telling(["b", "h_q", "d", "h_kv"], rows) == ["b", "h_q"]
