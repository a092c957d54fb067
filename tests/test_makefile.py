"""`make verify` without nvcc: it installs it, or says why nothing is verified."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).parent.parent / "Makefile"
#: Stands for the Python of the venv: notes how it is called, and finds nvcc once that is installed.
PYTHON = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
*toolchain*) test -e {found} ;;
*"pip install"*) {install} ;;
esac
"""


def verify(folder: Path, *, has_nvcc: bool, install: str) -> tuple[str, str]:
    """The output of make, which must succeed, and how Python was called."""
    python, log, found = folder / ".venv/bin/python", folder / "log", folder / "found"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON.format(log=log, found=found, install=install.format(found=found)))
    python.chmod(0o755)
    if has_nvcc:
        found.touch()
    shutil.copy(MAKEFILE, folder)
    for name in ("pyproject.toml", "setup.py", "constraints.txt", ".venv/.installed"):
        (folder / name).touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "verify"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text()


@pytest.mark.parametrize("has_nvcc", [True, False])
def test_nvcc_is_installed_where_there_is_none(has_nvcc: bool, tmp_path: Path) -> None:
    said, calls = verify(tmp_path, has_nvcc=has_nvcc, install="touch {found}")
    assert "-m flashmla_ops verify --list representatives --jobs 2" in calls.splitlines()
    assert calls.splitlines()[-1] == "-m cutlass_kernels verify --list representatives"
    assert ("pip install" in calls) == ("no nvcc here" in said) == (not has_nvcc)
    assert ("nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.*" in calls) == (not has_nvcc)


def test_without_a_network_nothing_is_verified_and_that_is_said(tmp_path: Path) -> None:
    said, calls = verify(tmp_path, has_nvcc=False, install="false")
    assert said.splitlines()[-1].startswith("verify: skipped: there is no nvcc, and pip could not install it")
    assert "cutlass_kernels verify" not in calls
