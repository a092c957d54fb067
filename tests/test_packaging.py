"""The files that are shipped, what a build needs, and which way imports point."""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from flashmla_ops import cpu
from flashmla_ops.cpu import build
from flashmla_ops.versions import TESTED, warn_if_untested

ROOT = Path(__file__).parent.parent
PACKAGES = ("flashmla_build", "flashmla_ops", "cutlass_kernels", "lowering")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
WHEEL = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def is_clutter(path: Path) -> bool:
    return "__pycache__" in path.parts or path.suffix in {".pyc", ".so"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build needs, and of what it must leave out."""
    copy = tmp_path_factory.mktemp("tree")
    for name in (*PACKAGES, "bench", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "flashmla.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def built(what: str, tree: Path, into: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a build of setuptools in the tree. It must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", what, into], cwd=tree, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def shipped(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The file names in the sdist and in the pure wheel."""
    dist = tmp_path_factory.mktemp("dist")
    built(SDIST, tree, dist)
    built(WHEEL, tree, dist, FLASHMLA_BUILD_AT_INSTALL="0")
    with tarfile.open(next(dist.glob("*.tar.gz"))) as sdist, zipfile.ZipFile(next(dist.glob("*any.whl"))) as wheel:
        return {
            "sdist": {name.partition("/")[2] for name in sdist.getnames()},
            "wheel": set(wheel.namelist()),
        }


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
@pytest.mark.parametrize("package", PACKAGES)
def test_every_source_is_shipped(shipped: dict[str, set[str]], kind: str, package: str) -> None:
    wanted = (path for path in (ROOT / package).rglob("*") if path.is_file() and not is_clutter(path))
    missing = {str(path.relative_to(ROOT)) for path in wanted} - shipped[kind]
    assert not missing


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_kernels_fixture_and_type_marker_are_shipped(shipped: dict[str, set[str]], kind: str) -> None:
    names = shipped[kind]
    assert any(re.fullmatch(r"flashmla_ops/cpu/csrc/.*\.cpp", name) for name in names)
    assert any(re.fullmatch(r"flashmla_ops/cpu/csrc/.*\.h", name) for name in names)
    assert any(re.fullmatch(r"flashmla_ops/fixtures/.*\.safetensors", name) for name in names)
    assert {"flashmla_ops/py.typed", "flashmla.py", "cutlass_kernels/gemm/csrc/flashmla_gemm.h"} <= names


def test_tests_and_bench_are_not_installed(shipped: dict[str, set[str]]) -> None:
    assert not [name for name in shipped["wheel"] if name.split("/")[0] in {"tests", "bench", "setup.py"}]


needs_kernels = pytest.mark.skipif(
    cpu.STATE.binding != "stable ABI" or not all(map(build.find, build.in_wheels())),
    reason="no kernels for all instruction sets: python -m flashmla_ops build",
)
ATTEND = """
import torch, flashmla_ops
from flashmla_ops import cpu
q, kv = torch.randn(1, 1, 16, 24), torch.randn(2, 8, 1, 24)
table, lengths = torch.arange(2, dtype=torch.int32).view(1, 2), torch.tensor([13], dtype=torch.int32)
out, _ = torch.ops.flashmla.decode(q, kv, None, table, lengths, 16)
expected, _ = flashmla_ops.reference.decode(q, kv, None, table, lengths, 16)
torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
print(cpu.STATE.active, cpu.STATE.path)
"""


@needs_kernels
def test_a_wheel_with_kernels_runs_where_there_is_no_compiler_and_no_cache(tree: Path, tmp_path: Path) -> None:
    done = built(WHEEL, tree, tmp_path, FLASHMLA_BUILD_AT_INSTALL="1")
    assert "this wheel holds the CPU kernels" in done.stdout
    (path,) = tmp_path.glob("*.whl")
    *_, interpreter, abi, platform = path.stem.split("-")
    assert (interpreter, abi, platform) == ("py3", "none", sysconfig.get_platform().replace("-", "_").replace(".", "_"))
    installed = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", installed, path]
    subprocess.run(install, check=True)
    environment = {"CXX": "no-such-compiler", "FLASHMLA_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", ATTEND], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    isa, library = done.stdout.split()
    assert isa == cpu.STATE.active
    assert Path(library).is_relative_to(installed)
    # The next wheel from this tree is as pure as it says, whatever setuptools left in its folders.
    done = built(WHEEL, tree, tmp_path, FLASHMLA_BUILD_AT_INSTALL="0")
    assert "this wheel is pure Python" in done.stdout
    with zipfile.ZipFile(next(tmp_path.glob("*-none-any.whl"))) as wheel:
        assert not [name for name in wheel.namelist() if name.endswith(".so")]


@pytest.mark.parametrize(
    ("code", "environment", "sentence"),
    [
        ("", {"FLASHMLA_BUILD_AT_INSTALL": "yes"}, "FLASHMLA_BUILD_AT_INSTALL=yes: expected 0, 1 or nothing"),
        ("", {"FLASHMLA_BUILD_AT_INSTALL": "1", "CXX": "no"}, "=1, and the kernels could not be compiled"),
        (
            "sys.executable = '{}'; ",
            {"FLASHMLA_BUILD_AT_INSTALL": "1"},
            "needs torch, filelock and platformdirs",
        ),
    ],
)
def test_a_wheel_with_kernels_that_cannot_be_made_is_an_error(
    code: str, environment: dict[str, str], sentence: str, tree: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "python"  # a Python without torch
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    what = WHEEL.replace("build_meta.", code.format(bare) + "build_meta.", 1)
    environment = {"FLASHMLA_CACHE": str(tmp_path)} | environment
    done = subprocess.run(
        [sys.executable, "-c", what, tmp_path], cwd=tree, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert sentence in done.stderr.splitlines()[-1]


def test_an_old_setuptools_is_told_in_one_sentence() -> None:
    """Its own words, about the licence fields that it does not know, are a page long."""
    code = "import runpy, setuptools; setuptools.__version__ = '65.5.0'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    requirement, *_ = map(Requirement, PYPROJECT["build-system"]["requires"])
    needed = str(requirement.specifier).removeprefix(">=")
    assert done.stderr.strip() == (
        f"flashmla-ops: setuptools 65.5.0 is installed, building needs {needed} or newer: pip install -U setuptools"
    )


def test_the_command_is_the_module() -> None:
    (target,) = PYPROJECT["project"]["scripts"].values()
    module, _, function = target.partition(":")
    main = getattr(importlib.import_module(module), function)
    assert main(["info"]) == 0
    with pytest.raises(SystemExit):
        main(["no-such-command"])


def test_torch_is_a_dependency_but_no_build_requirement() -> None:
    assert not [r for r in PYPROJECT["build-system"]["requires"] if "torch" in r]
    assert [r for r in PYPROJECT["project"]["dependencies"] if r.startswith("torch")] == ["torch>=2.11"]
    extras = PYPROJECT["project"]["optional-dependencies"]
    assert set(extras) == {"transformers", "cutlass", "cuda", "demo", "smollm2", "serve", "bench", "dev"}


def test_no_newer_torch_or_transformers_is_refused() -> None:
    """A bound would make pip replace what is installed by something older."""
    project = PYPROJECT["project"]
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    bounded = [Requirement(r) for r in wanted if r.startswith(("torch", "transformers"))]
    assert bounded
    assert all(str(r.specifier) == f">={TESTED[r.name][0]}" for r in bounded)


def untested_warnings(package: str, version: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            warn_if_untested(package, version)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.15.1", "2.15.0a0+git1234"])
def test_a_tested_version_is_not_warned_about(version: str) -> None:
    assert untested_warnings("torch", version) == []


@pytest.mark.parametrize(
    ("package", "version"),
    [("torch", "2.16.0+cpu"), ("torch", "3.0.0"), ("torch", "2.10.1"), ("torch", "main"), ("transformers", "6.0.0")],
)
def test_another_version_is_warned_about_once(package: str, version: str) -> None:
    (message,) = untested_warnings(package, version)
    assert message.startswith(f"flashmla: {package} {version} has not been tested")


def test_a_newer_torch_imports_with_one_warning() -> None:
    code = "import torch; torch.__version__ = '9.1.0'; import flashmla_ops, flashmla_ops.cpu"
    environment = os.environ | {"FLASHMLA_CPU": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("torch 9.1.0 has not been tested") == 1


def test_development_pins_are_inside_the_supported_ranges() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert (pins["torch"], pins["transformers"]) == ("2.13.0", "5.17.0")
    assert "torchvision" not in pins


def steps(*variables: str) -> str:
    """The commands that ``make test`` would run in a fresh clone."""
    command = ["make", "--dry-run", "--no-print-directory", "-f", str(ROOT / "Makefile"), "test", *variables]
    ours = {
        "MAKEFLAGS",
        "MAKEOVERRIDES",
        "MFLAGS",
        "MAKELEVEL",
        "TORCH",
        "TRANSFORMERS",
    }  # of a make that runs this test
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("variables", "venv"),
    [
        ((), ".venv"),
        (("TORCH=2.15.0",), ".venv-torch2.15.0"),
        (("TORCH=2.15.0", "TRANSFORMERS=5.24.0"), ".venv-torch2.15.0-transformers5.24.0"),
    ],
)
def test_other_versions_are_tested_in_a_venv_of_their_own(variables: tuple[str, ...], venv: str) -> None:
    run = steps(*variables)
    assert set(re.findall(r"\.venv[\w.-]*", run)) == {venv}
    assert f"{venv}/bin/python -m pytest" in run


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_only_the_pins_that_are_asked_for_change() -> None:
    (repin,) = re.findall(
        r"^sed .*(?= > )", steps("--always-make", "TORCH=2.15.0", "TRANSFORMERS=5.24.0"), re.MULTILINE
    )
    changed = subprocess.run(
        repin, shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    before = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(changed) - set(before) == {"torch==2.15.0", "transformers==5.24.0"}
    assert len(changed) == len(before)


def imports(path: Path) -> Iterator[str]:
    """The absolute names of the modules that a Python file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def importers(folder: str, *targets: str) -> list[str]:
    """``file imports module`` for each import of a target package in a folder."""
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imports(path)
        if name.split(".")[0] in targets
    ]


def test_imports_point_one_way() -> None:
    assert not importers("flashmla_build", "tests", "bench", "lowering", "flashmla", "flashmla_ops", "cutlass_kernels")
    assert not importers("flashmla_ops", "tests", "bench", "lowering", "flashmla", "setup")
    assert not importers("cutlass_kernels", "tests", "bench", "lowering", "flashmla", "flashmla_ops")
    assert not importers("lowering", "tests", "bench", "flashmla")
    assert not importers("bench", "tests")
    outside_cuda = [use for use in importers("flashmla_ops", "cutlass_kernels") if "flashmla_ops/cuda/" not in use]
    assert not outside_cuda


def test_the_short_name_only_re_exports() -> None:
    tree = ast.parse((ROOT / "flashmla.py").read_text())
    allowed = (ast.Import, ast.ImportFrom, ast.Assign, ast.Expr)  # imports, __all__, the docstring
    statements = [each for node in tree.body for each in (node.body if isinstance(node, ast.If) else [node])]
    assert all(isinstance(statement, allowed) for statement in statements)
    assert {name.split(".")[0] for name in imports(ROOT / "flashmla.py")} <= {"flashmla_ops", "typing"}


def test_kernels_know_no_python() -> None:
    python = re.compile(r'#\s*include\s*[<"](Python\.h|pybind11/|torch/extension\.h|torch/csrc/utils/pybind\.h)')
    sources = [p for p in (ROOT / "flashmla_ops" / "cpu" / "csrc").rglob("*") if p.is_file()]
    assert sources
    assert not [str(path.relative_to(ROOT)) for path in sources if python.search(path.read_text())]
