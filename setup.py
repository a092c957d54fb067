"""Which kind of wheel is built; everything else is in pyproject.toml.

FLASHMLA_BUILD_AT_INSTALL=1 puts compiled kernels into it: the wheel is for this platform, any Python and any torch that
the package supports. Otherwise it is pure Python, and kernels are compiled at the first import, into the user's cache;
already now where the building Python has torch, unless FLASHMLA_BUILD_AT_INSTALL=0. An install never fails on those.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

NEEDED = 77  # the first that knows the licence fields of pyproject.toml, as build-system.requires has it
if int(setuptools.__version__.split(".")[0]) < NEEDED:
    found = f"setuptools {setuptools.__version__} is installed"
    sys.exit(f"flashmla-ops: {found}, building needs {NEEDED} or newer: pip install -U setuptools")

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402 (an old setuptools has none)

BUILD = os.environ.get("FLASHMLA_BUILD_AT_INSTALL", "")
if BUILD not in ("", "0", "1"):
    sys.exit(f"flashmla-ops: FLASHMLA_BUILD_AT_INSTALL={BUILD}: expected 0, 1 or nothing")


def python(*arguments: str, environment: dict[str, str]) -> bool:
    """Run this Python in the source tree, where `flashmla_ops` can be imported; whether it succeeded."""
    return subprocess.run([sys.executable, *arguments], cwd=Path(__file__).parent, env=environment).returncode == 0


def with_torch(*, outside: bool) -> dict[str, str] | None:
    """An environment in which this Python finds torch, and what our build needs beside it.

    It is this one, or the one outside of pip's isolated build. The latter has torch; what the build needs lies in the
    folder into which pip installed it for the build.
    """
    here = dict(os.environ)
    beyond = {name: here[name] for name in here if name != "PYTHONPATH"}
    spec = importlib.util.find_spec("platformdirs")
    folder = Path(spec.origin).parents[1] if spec and spec.origin else None
    if folder and not (folder / "torch").exists():
        beyond["PYTHONPATH"] = str(folder)
    candidates = [here, beyond]
    needed = "('torch', 'filelock', 'platformdirs')"
    look = f"import importlib.util, sys; sys.exit(not all(map(importlib.util.find_spec, {needed})))"
    return next((each for each in candidates[: 1 + outside] if python("-c", look, environment=each)), None)


class BuildKernels(build_py):
    """``build_py``, and then the kernels."""

    def run(self) -> None:
        super().run()
        into = Path(self.build_lib).absolute() / "flashmla_ops" / "cpu" / "lib"
        shutil.rmtree(into, ignore_errors=True)  # of an earlier build
        if BUILD == "1" and not self.editable_mode:
            environment = with_torch(outside=True)
            if environment is None:
                sys.exit(
                    "flashmla-ops: FLASHMLA_BUILD_AT_INSTALL=1 needs torch, filelock and platformdirs:"
                    " install them, add --no-build-isolation"
                )
            environment |= {"FLASHMLA_CPU": "reference"}  # nothing is compiled by the import itself
            if not python("-m", "flashmla_ops", "build", "--into", str(into), environment=environment):
                sys.exit("flashmla-ops: FLASHMLA_BUILD_AT_INSTALL=1, and the kernels could not be compiled")
            print(
                "flashmla-ops: this wheel holds the CPU kernels, for this platform, any Python and torch 2.11 or newer"
            )
            return
        print("flashmla-ops: this wheel is pure Python; the CPU kernels are compiled when it is first imported")
        print("flashmla-ops: FLASHMLA_BUILD_AT_INSTALL=1 makes a wheel for this platform that holds them")
        if BUILD != "0" and (environment := with_torch(outside=False)):
            python("-c", "import flashmla_ops", environment=environment)


class Wheel(bdist_wheel):
    """A wheel with kernels is for one platform, and for any Python: they know none."""

    def get_tag(self) -> tuple[str, str, str]:
        python_tag, abi, platform = super().get_tag()
        return (python_tag, abi, platform) if self.root_is_pure else ("py3", "none", platform)


class Distribution(setuptools.Distribution):
    """Decides whether a wheel is pure."""

    def has_ext_modules(self) -> bool:
        return BUILD == "1"


setuptools.setup(cmdclass={"build_py": BuildKernels, "bdist_wheel": Wheel}, distclass=Distribution)
