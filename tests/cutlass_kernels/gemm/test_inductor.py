"""The folder of links that Inductor's CUTLASS backend takes for a clone of CUTLASS."""

from __future__ import annotations

import os
import subprocess
import sys
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


TAKEN = """
import sys
import torch._inductor.config as config
from torch._inductor.codegen.cutlass import utils
config.cutlass.cutlass_dir = sys.argv[1]
assert utils.try_import_cutlass()
"""


def test_inductor_takes_it(tmp_path: Path) -> None:
    """In a process of its own: Inductor keeps links to the folder in its cache, and changes sys.path."""
    pytest.importorskip("torch._inductor.codegen.cutlass.utils", reason="this torch has it elsewhere")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    folder = inductor_cutlass_dir(tmp_path / "cutlass")
    command = [sys.executable, "-c", TAKEN, folder]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
