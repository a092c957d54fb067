"""The allocator's core and the books of the pool, without torch, under the compiler's sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmla_ops.cpu import build

HERE = Path(__file__).parent
ARENA = (HERE / "arena_stress.cpp",)
PAGES = (HERE / "pages_stress.cpp", build.CSRC / "pool" / "pages.cpp")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
QUICK, LONG = 4_000, 60_000


def stress(
    cxx: list[str], folder: Path, sanitizer: str, operations: int, threads: int, sources: tuple[Path, ...] = ARENA
) -> None:
    """Compile and run a program; it must end well, and the sanitizer must have nothing to say."""
    program = folder / "stress"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
    flags += ["-D_GLIBCXX_ASSERTIONS"]
    probe = subprocess.run(
        [*cxx, *flags, "-x", "c++", "-", "-o", str(program)], input=b"int main() {}", capture_output=True, check=False
    )
    if probe.returncode or subprocess.run([program], check=False).returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer that runs here")
    subprocess.run([*cxx, *flags, f"-I{build.CSRC}", "-o", str(program), *sources], check=True)
    command = [str(program), str(operations), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3000)
    assert (done.stdout, done.stderr) == ("good\n", "")


def test_a_quick_run_under_the_address_sanitizer(cxx: list[str], tmp_path: Path) -> None:
    stress(cxx, tmp_path, "address", QUICK, 4)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 32])
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_long_runs(cxx: list[str], tmp_path: Path, sanitizer: str, threads: int) -> None:
    stress(cxx, tmp_path, sanitizer, LONG, threads)


@pytest.mark.parametrize("operations", [8_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_the_books_of_a_pool(cxx: list[str], tmp_path: Path, operations: int) -> None:
    """They have one thread: the pool has a lock."""
    stress(cxx, tmp_path, "address", operations, 1, PAGES)
