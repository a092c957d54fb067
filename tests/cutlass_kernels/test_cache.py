"""Where built kernels are kept: the rules of `flashmla_ops.cpu.cache`, for a uid without a home too."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from cutlass_kernels.build import libraries
from cutlass_kernels.cache import cache_root
from cutlass_kernels.errors import BuildError
from cutlass_kernels.gemm.catalogue import smoke


@pytest.fixture(autouse=True)
def no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("FLASHMLA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_without_a_home_a_private_temporary_folder(tmp_path: Path) -> None:
    private = tmp_path / f"flashmla-{os.getuid()}"
    assert cache_root("cutlass") == private / "cutlass"
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["FLASHMLA_CACHE", "XDG_CACHE_HOME"])
def test_a_folder_that_is_named_comes_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, str(tmp_path / "named"))
    assert cache_root("cutlass").is_relative_to(tmp_path / "named")
    (tmp_path / "file").touch()
    monkeypatch.setenv(name, str(tmp_path / "file"))
    assert cache_root("cutlass") == tmp_path / f"flashmla-{os.getuid()}" / "cutlass"


def test_a_temporary_folder_that_others_may_have_filled_is_refused(tmp_path: Path) -> None:
    planted = tmp_path / f"flashmla-{os.getuid()}"
    planted.mkdir()
    planted.chmod(0o777)
    with pytest.raises(BuildError, match="set FLASHMLA_CACHE"):
        cache_root("cutlass")
    assert libraries.find(smoke()[0]) is None
