"""Building with nvcc: the cache, the index, what fails, and the C ABI of what comes out."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cutlass_kernels.build import libraries, toolchain
from cutlass_kernels.build.toolchain import Nvcc
from cutlass_kernels.errors import BuildError, MissingToolError
from cutlass_kernels.gemm import abi
from cutlass_kernels.gemm.catalogue import smoke

pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")
SMALL = smoke()[0]

CLEAN = """\
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    toolchain.nvcc.cache_clear()
    yield
    toolchain.nvcc.cache_clear()


def pretend(folder: Path, report: str = CLEAN, code: int = 0) -> Path:
    """A compiler that writes an empty library and a report, and counts its calls."""
    folder.mkdir(exist_ok=True)
    path = folder / "nvcc"
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = --version ]; then echo "release 13.0, V13.0.0"; exit 0; fi\n'
        f"echo run >> {folder}/calls\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f': > "$2"\ncat >&2 <<END\n{report}END\nexit {code}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path / "cache"))
    return tmp_path


def calls(folder: Path) -> int:
    path = folder / "calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_a_kernel_is_compiled_once_and_found_again(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", str(pretend(cached / "tools")))
    assert libraries.find(SMALL) is None
    first = libraries.build([SMALL, SMALL], quiet=True)
    assert calls(cached / "tools") == 1
    assert libraries.build([SMALL], quiet=True) == first[:1]
    assert calls(cached / "tools") == 1
    assert libraries.find(SMALL) == first[0]
    assert first[0].report.entries[0].registers == 40
    assert (first[0].folder / "ptxas.txt").read_text().startswith("ptxas info")
    assert (first[0].folder / f"{SMALL.name}.cu").is_file()
    assert json.loads((first[0].folder / "report.json").read_text())["name"] == SMALL.name


@pytest.mark.parametrize(
    ("report", "code", "message"),
    [
        (CLEAN.replace("0 bytes spill stores", "20 bytes spill stores"), 0, "may not ship: spills 20 bytes out"),
        (CLEAN.replace("0 bytes stack", "8 bytes stack"), 0, "may not ship: 8 bytes of local memory"),
        (CLEAN + "ptxas info : (C7510) Potential Performance Loss\n", 0, r"may not ship: serialised wgmma \(C7510\)"),
        ("kernel.cu(3): error: no such type\n", 2, "nvcc failed"),
    ],
)
def test_what_may_not_ship_is_not_kept(
    cached: Path, monkeypatch: pytest.MonkeyPatch, report: str, code: int, message: str
) -> None:
    monkeypatch.setenv("NVCC", str(pretend(cached / "tools", report, code)))
    with pytest.raises(BuildError, match=message):
        libraries.build([SMALL], quiet=True)
    assert libraries.find(SMALL) is None
    assert not list((cached / "cache").rglob("*.so"))


def test_a_failure_does_not_keep_the_others_from_being_built(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = pretend(cached / "tools")
    compiler.write_text(compiler.read_text().replace("echo run", 'case "$*" in *sm_90a*) exit 1;; esac; echo run'))
    monkeypatch.setenv("NVCC", str(compiler))
    with pytest.raises(BuildError, match="sm90a_linear"):
        libraries.build(smoke(), quiet=True)
    assert [libraries.find(config) is not None for config in smoke()] == [True, True, False]


def test_the_key_follows_source_headers_and_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Nvcc("nvcc", "13.0", "V13.0.88")
    before = libraries.key("source", SMALL, compiler, "4.2")
    assert libraries.key("source", SMALL, compiler, "4.2") == before
    other = [
        libraries.key("another", SMALL, compiler, "4.2"),
        libraries.key("source", SMALL, Nvcc("nvcc", "13.0", "V13.0.89"), "4.2"),
        libraries.key("source", SMALL, compiler, "4.3"),
    ]
    header = tmp_path / "header.h"
    header.write_text("// another\n")
    monkeypatch.setattr(libraries.generate, "glue_files", lambda text: [header])
    assert len({before, *other, libraries.key("source", SMALL, compiler, "4.2")}) == 5


def test_carried_sources_need_no_generator_and_a_carried_cache_no_compiler(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVCC", str(pretend(cached / "tools")))
    libraries.Sources.generated().carry([SMALL], cached / "carried")
    sources = libraries.Sources.carried(cached / "carried")
    assert (Path(sources.include) / "cutlass" / "cutlass.h").is_file()
    with monkeypatch.context() as without:
        without.setattr(libraries.cppgen, "load", lambda: pytest.fail("it generates"))
        (built,) = libraries.build([SMALL], quiet=True, sources=sources)
    # The key is that of a library which was generated here.
    assert libraries.build([SMALL], quiet=True) == [built]
    shutil.move(cached / "cache", cached / "elsewhere")
    monkeypatch.setenv("FLASHMLA_CACHE", str(cached / "elsewhere"))
    found = libraries.find(SMALL)
    assert found is not None
    assert found.library.is_file()


def test_without_nvcc_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    with pytest.raises(MissingToolError, match="building kernels needs nvcc: install the CUDA toolkit"):
        libraries.build([SMALL])


def test_import_and_list_need_neither_cutlass_nor_nvcc() -> None:
    code = (
        "import sys; sys.modules['cutlass_cppgen'] = sys.modules['cutlass_library'] = None\n"
        "from cutlass_kernels import __main__\n"
        "assert __main__.main(['list', '--arch', 'sm_80']) == 0\n"
        "assert __main__.main(['generate', '--only', 'no such kernel']) == 0\n"
        "assert __main__.main(['generate', '--list', 'smoke']) == 1\n"
    )
    environment = os.environ | {"NVCC": "no-such-nvcc"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sm80_linear_bf16_64x64x64_w2x2_s3_plain" in done.stdout
    assert "sm90a" not in done.stdout
    assert "generating kernels needs cutlass_cppgen" in done.stderr
    assert "pip install 'nvidia-cutlass==" in done.stderr


STRUCTS = """
#include <stddef.h>
#include <stdio.h>
#include "flashmla_gemm.h"
#define F(T, name) printf("%s %s %zu\\n", #T, #name, offsetof(T, name));
int main() {
"""


def test_python_and_c_agree_on_the_layout_of_calls(tmp_path: Path) -> None:
    kinds = {"FlashmlaGemm": abi.GemmCall, "FlashmlaGroupedGemm": abi.GroupedGemmCall}
    lines = [f"F({name}, {field[0]})" for name, kind in kinds.items() for field in kind._fields_]
    lines += [f'printf("{name} size %zu\\n", sizeof({name}));' for name in kinds]
    (tmp_path / "layout.c").write_text(STRUCTS + "\n".join(lines) + "\n}\n")
    command = ["cc", f"-I{libraries.generate.CSRC}", "-o", str(tmp_path / "layout"), str(tmp_path / "layout.c")]
    if subprocess.run(command, check=False).returncode != 0:
        pytest.skip("no C compiler")
    printed = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout
    for name, field, value in (line.split() for line in printed.splitlines()):
        kind = kinds[name]
        assert int(value) == (ctypes.sizeof(kind) if field == "size" else getattr(kind, field).offset), (name, field)


def test_nvcc_builds_the_smoke_list_clean() -> None:
    try:
        toolchain.nvcc()
    except MissingToolError as error:
        pytest.skip(str(error))
    for built in libraries.build(smoke(), quiet=True):
        assert built.library.stat().st_size > 0
        assert not built.report.faults()
        assert max(entry.registers for entry in built.report.entries) <= 255
