"""The folder of links that Inductor's CUTLASS backend takes for a clone of CUTLASS."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlass_kernels import inductor_cutlass_dir

pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")


def test_what_inductor_looks_for_is_there(tmp_path: Path) -> None:
    folder = Path(inductor_cutlass_dir(tmp_path))
    for place in ("python/cutlass_library/generator.py", "python/cutlass_cppgen/__init__.py", "python/pycute"):
        assert (folder / place).exists(), place
    assert (folder / "include/cutlass/cutlass.h").is_file()
    assert (folder / "tools/util/include").is_dir()


def test_links_that_are_right_stay_and_wrong_ones_are_replaced(tmp_path: Path) -> None:
    folder = Path(inductor_cutlass_dir(tmp_path))
    (folder / "include").unlink()
    (folder / "include").symlink_to(tmp_path)
    before = (folder / "tools").lstat().st_mtime_ns
    inductor_cutlass_dir(tmp_path)
    assert (folder / "include/cutlass/cutlass.h").is_file()
    assert (folder / "tools").lstat().st_mtime_ns == before


def test_inductor_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache folder of its own: Inductor keeps links there, and insists on those it finds."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    config = pytest.importorskip("torch._inductor.config")
    utils = pytest.importorskip("torch._inductor.codegen.cutlass.utils", reason="this torch has it elsewhere")
    with config.patch({"cutlass.cutlass_dir": inductor_cutlass_dir(tmp_path)}):
        assert utils.try_import_cutlass()
