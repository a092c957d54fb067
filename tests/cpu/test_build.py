"""Building and loading the kernels: the cache, the lock, and what happens where something is missing."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flashmla_ops import cpu
from flashmla_ops.cpu import build
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


def test_no_compiler_means_the_reference_and_one_warning(tmp_path: Path) -> None:
    done = run(ATTEND, CXX="no-such-compiler", FLASHMLA_CACHE=str(tmp_path))
    assert done.stdout.startswith("reference none")
    assert done.stderr.count("the float64 reference runs instead of C++ kernels: no C++ compiler found") == 1


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
    before = build.key("c++")
    for path in build.CSRC.rglob("*"):
        if path.is_file():
            copy = tmp_path / path.relative_to(build.CSRC)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    monkeypatch.setattr(build, "CSRC", tmp_path)
    assert build.key("c++") == before
    (tmp_path / "decode.cpp").write_text("// another\n")
    assert build.key("c++") != before


def test_a_cache_that_cannot_be_written_falls_back_to_a_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv("FLASHMLA_CACHE", str(occupied / "below"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert build.cache_root() == tmp_path / f"flashmla-{os.getuid()}"


def small_build(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Only the smallest unit, without torch: what is tested is the bookkeeping."""
    monkeypatch.setenv("FLASHMLA_CACHE", str(cache))
    monkeypatch.setattr(build, "KERNEL_UNITS", ())
    monkeypatch.setattr(build, "CORE_UNITS", (build.Unit("append.cpp"),))


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_builds_at_once_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_build(monkeypatch, tmp_path)
    compiled: list[object] = []
    compile_units = build._compile

    def counting(cxx: str, units: tuple[build.Unit, ...], scratch: Path, *, verbose: bool) -> list[Path]:
        compiled.append(units)
        return compile_units(cxx, units, scratch, verbose=verbose)

    monkeypatch.setattr(build, "_compile", counting)
    with ThreadPoolExecutor(4) as pool:
        paths = {built.path for built in pool.map(lambda _: build.find_or_build("ctypes"), range(4))}
    assert len(paths) == len(compiled) == 1
    assert [path.name for path in paths.pop().parent.glob("*.so")] == [build.LIBRARIES["ctypes"]]


@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_without_torch_headers_the_ctypes_library_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_build(monkeypatch, tmp_path)
    monkeypatch.setattr(build, "_torch_flags", list)
    built = build.find_or_build()
    assert built.binding == "ctypes"
    assert "binding through ctypes" in capsys.readouterr().err
    assert build.find_or_build() == built


def test_a_failed_build_leaves_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "CORE_UNITS", (build.Unit("append.cpp", ("-include", "no-such-header.h")),))
    monkeypatch.setattr(build, "KERNEL_UNITS", ())
    with pytest.raises(BuildError, match=r"no-such-header\.h|no C\+\+ compiler"):
        build.find_or_build()
    assert not list(tmp_path.rglob("*.so"))
