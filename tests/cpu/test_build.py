"""Building and loading the kernels: the cache, the lock, and what happens where something is missing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from flashmla_build.compiler import NAMES
from flashmla_build.compiler import compiler as find_compiler
from flashmla_ops import cpu
from flashmla_ops.cpu import build, compiler
from flashmla_ops.cpu.build import Library
from flashmla_ops.cpu.compiler import Unit
from flashmla_ops.errors import BuildError

needs_kernels = pytest.mark.skipif(not cpu.STATE.isas, reason=f"no C++ kernels: {cpu.STATE.reason}")

ATTEND = """
import torch, flashmla_ops
from flashmla_ops import cpu
q, kv = torch.randn(2, 1, 16, 24), torch.randn(4, 8, 1, 24)
table, lengths = torch.arange(4, dtype=torch.int32).view(2, 2), torch.tensor([3, 16], dtype=torch.int32)
out, lse = torch.ops.flashmla.decode(q, kv, None, table, lengths, 16)
expected, _ = flashmla_ops.reference.decode(q, kv, None, table, lengths, 16)
torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
print(cpu.STATE.active, cpu.STATE.binding.replace(" ", "-"), cpu.STATE.reason)
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CXX": "no-such-compiler -O9"}, "CXX=no-such-compiler -O9 names nothing that runs"),
        ({"CXX": "", "PATH": "/nowhere"}, "no C++ compiler found: none of g++, c++, clang++ is on PATH"),
    ],
)
def test_no_compiler_means_the_reference_and_one_warning(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    done = run(ATTEND, **environment, FLASHMLA_CACHE=str(tmp_path))
    assert done.stdout.startswith("reference none")
    assert done.stderr.count(f"the float64 reference runs instead of C++ kernels: {reason}") == 1


@needs_kernels
def test_what_is_compiled_needs_no_compiler() -> None:
    """An image is like this whose earlier stage compiled, and had the compiler."""
    done = run(ATTEND, CXX="no-such-compiler", FLASHMLA_CACHE=str(Path(cpu.STATE.path).parents[1]))
    assert done.stdout.split()[0] == cpu.STATE.active
    assert done.stderr == ""


@needs_kernels
def test_without_a_compiler_the_fastest_that_is_compiled_runs(tmp_path: Path) -> None:
    """An image is like this that was made on a processor of another kind."""
    folder = tmp_path / build.key()
    folder.mkdir()
    for path in build.find_or_build([build.ISAS, build.STABLE_ABI, build.KERNELS["generic"]]):
        shutil.copy(path, folder)
    done = run(ATTEND, CXX="no-such-compiler", FLASHMLA_CACHE=str(tmp_path))
    assert done.stdout.split()[0] == "generic"
    if cpu.STATE.active != "generic":
        assert f"but for {cpu.STATE.active}: CXX=no-such-compiler names nothing that runs" in done.stdout


def test_a_compiler_that_fails_means_the_reference_and_its_message(tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'no room for objects' >&2\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    done = run(ATTEND, CXX=str(broken), FLASHMLA_CACHE=str(tmp_path / "cache"))
    assert done.stdout.startswith("reference none")
    assert "no room for objects" in done.stderr


@needs_kernels
@pytest.mark.parametrize("wanted", ["generic", "reference", "avx1024"])
def test_the_environment_chooses_the_implementation(wanted: str) -> None:
    done = run(ATTEND, FLASHMLA_CPU=wanted)
    if wanted == "avx1024":
        assert "FLASHMLA_CPU=avx1024 ignored: unknown; known are" in done.stderr
        assert done.stdout.split()[0] in cpu.STATE.isas
    else:
        assert done.stdout.split()[0] == wanted
        assert f"FLASHMLA_CPU={wanted}" in done.stdout


@needs_kernels
def test_ctypes_runs_the_same_kernels_and_names_the_same_errors() -> None:
    code = ATTEND + (
        "from flashmla_ops.errors import ArgumentError\n"
        "cache, rows = kv.clone(), torch.randn(3, 1, 24)\n"
        "torch.ops.flashmla.append_(cache, rows, torch.tensor([0, -1, 9]))\n"
        "assert torch.equal(cache[0, 0], rows[0]) and torch.equal(cache[1, 1], rows[2])\n"
        "two = torch.ops.flashmla.merge_states([out, out], [lse, lse])\n"
        "torch.testing.assert_close(two[0], out); torch.testing.assert_close(two[1], lse + 2**0.5 * 0 + 0.6931472)\n"
        "plan = torch.ops.flashmla.decode_schedule(lengths, 1, 16, 1, 3)\n"
        "assert torch.equal(plan, flashmla_ops.reference.decode_schedule(lengths, 1, 16, 1, 3))\n"
        "same = torch.ops.flashmla.decode(q, kv, None, table, lengths, 16, schedule=plan)\n"
        "torch.testing.assert_close(same[0], out)\n"
        "try: torch.ops.flashmla.append_(cache, rows, torch.tensor([0, 1, 32]))\n"
        "except ArgumentError as error: print(error.argument, error.actual)\n"
    )
    done = run(code, FLASHMLA_BINDING="ctypes")
    assert done.stdout.split()[1] == "ctypes"
    assert done.stdout.splitlines()[1] == "slot_mapping 32 at [2]"


def test_the_cache_key_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.key()
    for path in build.CSRC.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(build.CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.key() == before
    (tmp_path / "decode.cpp").write_text("// another\n")
    assert build.key() != before


SMALL = Library("flashmla_small", (Unit("append.cpp"),))
has_compiler = pytest.mark.skipif(all(shutil.which(name) is None for name in NAMES), reason="no C++ compiler")


@has_compiler
def test_builds_at_once_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    compiled: list[object] = []
    build_libraries = build._build

    def counting(libraries: Sequence[Library], folder: Path, *, verbose: bool) -> dict[Library, Path]:
        compiled.extend(libraries)
        return build_libraries(libraries, folder, verbose=verbose)

    monkeypatch.setattr(build, "_build", counting)
    with ThreadPoolExecutor(4) as pool:
        paths = {path for found in pool.map(lambda _: build.find_or_build([SMALL]), range(4)) for path in found}
    assert compiled == [SMALL]
    assert paths == set(tmp_path.rglob("*.so"))


@has_compiler
def test_without_torch_headers_the_ctypes_library_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_torch_flags", list)
    core = Library("flashmla_core", (build.BINDING_UNITS[0], *SMALL.units), otherwise=SMALL)
    (built,) = build.find_or_build([core])
    assert built.name == SMALL.file
    assert "binding through ctypes" in capsys.readouterr().err
    assert build.find_or_build([core]) == [built]


def test_a_failed_build_leaves_what_could_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    broken = Library("flashmla_broken", (Unit("append.cpp", ("-include", "no-such-header.h"), "broken"),))
    with pytest.raises(BuildError, match=r"no-such-header\.h|no C\+\+ compiler"):
        build.find_or_build([broken, SMALL])
    assert [path.name for path in tmp_path.rglob("*.so")] in ([SMALL.file], [])
    assert build.find(broken) is None


@has_compiler
def test_a_build_says_at_once_what_it_does_where_there_is_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    said_before_compiling: list[str] = []

    class Watched(compiler.Compilation):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            said_before_compiling.append(capsys.readouterr().err)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(build, "Compilation", Watched)
    two = Library("flashmla_two", (Unit("append.cpp"), Unit("isas.cpp")))
    build.find_or_build([two])
    assert said_before_compiling == [
        f"flashmla: compiling flashmla_two into {tmp_path / build.key()}, once; this may take a minute\n"
    ]


def test_a_compiler_with_arguments_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -m 'a module'")
    assert find_compiler(BuildError) == [sys.executable, "-m", "a module"]
    monkeypatch.setenv("CXX", "'c++")
    with pytest.raises(BuildError, match="CXX='c\\+\\+ names nothing that runs"):
        find_compiler(BuildError)


@needs_kernels
def test_a_library_that_does_not_load_is_compiled_again(tmp_path: Path) -> None:
    """It was made on another system. Without a compiler the reference runs, and the reason names both."""
    folder = tmp_path / build.key()
    folder.mkdir()
    for library in (build.ISAS, build.STABLE_ABI, *build.KERNELS.values()):
        (folder / library.file).write_bytes(b"of another system")
    done = run(ATTEND, CXX="no-such-compiler", FLASHMLA_CACHE=str(tmp_path))
    assert done.stdout.startswith("reference none CXX=no-such-compiler names nothing")
