"""The allocator's core, without torch, under the compiler's sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmla_ops.cpu import build

SOURCE = Path(__file__).with_name("arena_stress.cpp")
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
QUICK, LONG = 4_000, 60_000


def stress(cxx: list[str], folder: Path, sanitizer: str, operations: int, threads: int) -> None:
    """Compile and run arena_stress.cpp; it must end well, and the sanitizer must have nothing to say."""
    program = folder / "stress"
    flags = ["-std=c++20", "-O1", "-g", "-pthread", f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all"]
    flags += ["-D_GLIBCXX_ASSERTIONS"]
    probe = subprocess.run(
        [*cxx, *flags, "-x", "c++", "-", "-o", str(program)], input=b"int main() {}", capture_output=True, check=False
    )
    if probe.returncode or subprocess.run([program], check=False).returncode:
        pytest.skip(f"this compiler has no {sanitizer} sanitizer that runs here")
    subprocess.run([*cxx, *flags, f"-I{build.CSRC}", "-o", str(program), str(SOURCE)], check=True)
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
