"""Compiles the CPU kernels ahead of time where the installing Python can already import torch.

Everything else is in pyproject.toml. Without torch (an isolated build), without a compiler, or with
FLASHMLA_BUILD_AT_INSTALL=0 the kernels are compiled when the package is first imported; an install never fails on them.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

NEEDED = 77  # the first that knows the licence fields of pyproject.toml, as build-system.requires has it
if int(setuptools.__version__.split(".")[0]) < NEEDED:
    found = f"setuptools {setuptools.__version__} is installed"
    sys.exit(f"flashmla-ops: {found}, building needs {NEEDED} or newer: pip install -U setuptools")


class BuildKernels(build_py):
    """``build_py``, then ``python -m flashmla_ops build`` on the source tree, best effort."""

    def run(self) -> None:
        super().run()
        wanted = os.environ.get("FLASHMLA_BUILD_AT_INSTALL", "1") != "0"
        if wanted and importlib.util.find_spec("torch") is not None:
            subprocess.run([sys.executable, "-m", "flashmla_ops", "build"], cwd=Path(__file__).parent, check=False)


setuptools.setup(cmdclass={"build_py": BuildKernels})
