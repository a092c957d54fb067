"""The kernels' reads and writes of caches under the address sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from flashmla_build import compiler
from flashmla_ops.cpu import build
from flashmla_ops.errors import BuildError
from flashmla_ops.formats import header

SOURCES = ("isas", "dispatch", "decode", "sparse", "append", "append_quantized")
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@pytest.mark.slow
def test_no_byte_outside_a_cache(tmp_path: Path) -> None:
    for name, text in header.generated().items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    sources = [Path(__file__).parent / "sanitize_rows.cpp", *(build.CSRC / f"{name}.cpp" for name in SOURCES)]
    program = tmp_path / "rows"
    includes = (f"-I{build.CSRC}", f"-I{tmp_path}")
    command = [*compiler(BuildError), *build.COMMON_FLAGS, *FLAGS, *includes, *map(str, sources), "-o", str(program)]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode and "sanitize" in made.stderr:
        pytest.skip("this compiler has no address sanitizer")
    assert made.returncode == 0, made.stderr[-3000:]
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr[-3000:]
