"""Code of the README and the guides runs as it stands: Python in fresh interpreters, commands as they are typed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: Written by the bench and by `verify`: tables without examples.
GENERATED = {"docs/bench.md", "docs/cuda_attention.md", "docs/cuda_verify.md"}
PAGES = sorted(
    name
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))
    if (name := str(path.relative_to(ROOT))) not in GENERATED
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: A command in an indented block; a comment may follow it.
COMMAND = re.compile(r"^ {4,}(?:\w+=\S+ )*(?:make|pip|python|git) .*$", re.MULTILINE)


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and text."""
    return FENCED.findall(text(page))


def python_of(page: str) -> str:
    """The Python of a page, to be read in order: a later snippet may use what an earlier one defined."""
    return "\n".join(code for language, code in blocks(page) if language == "python")


def shown_by(page: str) -> str:
    """The output that a page says its Python has, in ``text`` blocks."""
    return "".join(code for language, code in blocks(page) if language == "text")


def commands() -> list[str]:
    found = [line for page in PAGES for line in COMMAND.findall(FENCED.sub("", text(page)))]
    return [re.split(r"\s+#\s", line.strip())[0] for line in found]


def run(*command: str, code: str = "") -> str:
    """Standard output of a command in the clone. It must succeed."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, input=code, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_examples_are_python_or_what_it_prints(page: str) -> None:
    assert {language for language, _ in blocks(page)} <= {"python", "text"}


def marks(page: str) -> list[pytest.MarkDecorator]:
    if "smollm2()" in python_of(page):
        fetches = pytest.mark.skipif(find_spec("gguf") is None, reason="fetches weights, and reads them with gguf")
        return [pytest.mark.slow, fetches]
    if "cutlass_kernels" not in python_of(page):
        return []
    return [pytest.mark.slow, pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")]


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=marks(page)) for page in PAGES if "python" in dict(blocks(page))]
)
def test_the_python_of_a_page_runs(page: str) -> None:
    pytest.importorskip("transformers")
    printed = run(sys.executable, "-", code=python_of(page))
    if expected := shown_by(page):
        assert printed == expected


#: Commands that a test cannot run as they are typed, and what runs instead. All others are run.
ELSEWHERE = {
    "pip install": "tests/test_packaging.py builds and installs wheels",
    "FLASHMLA_BUILD_AT_INSTALL=1 pip wheel": "tests/test_packaging.py builds and installs wheels",
    "python -m flashmla_ops build": "make test runs it first",
    "python -m cutlass_kernels build": "hours; tests/cutlass_kernels/test_build.py builds some",
    "python -m cutlass_kernels verify": "minutes; .ci/run verifies representatives",
    "python -m flashmla_ops verify": "minutes; tests/cuda/test_verify.py runs it on the smallest kernel",
    "python -m flashmla_ops serve": "until it is stopped; tests/integrations/test_serving.py talks to a server",
    "python -m bench": "minutes, on a quiet machine; tests/bench runs every suite at small sizes",
    "FLASHMLA_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 python -m bench": "as the others of the bench",
    "make": "its steps are looked at",
}


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_a_command_runs(command: str) -> None:
    if command.startswith("make "):
        run("make", "--dry-run", *shlex.split(command)[1:])
    elif not any(command.startswith(known) for known in ELSEWHERE):
        run("bash", "-c", command)


def test_commands_are_found() -> None:
    assert {"make test", "python -m flashmla_ops info", "python -m cutlass_kernels list"} <= set(commands())
