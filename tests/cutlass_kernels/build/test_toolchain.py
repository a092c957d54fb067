"""nvcc as a toolkit has it, and as pip's packages do."""

from __future__ import annotations

from pathlib import Path

import pytest

from cutlass_kernels.build.toolchain import Nvcc


@pytest.mark.parametrize(
    ("files", "linked"),
    [
        ([], False),  # a toolkit, whose folder nvcc knows
        (["libcudart.so", "libcudart.so.13"], False),
        (["libcudart.so.13", "libcudadevrt.a"], True),  # pip's
    ],
)
def test_the_runtime_is_linked_under_its_short_name(files: list[str], linked: bool, tmp_path: Path) -> None:
    library, scratch = tmp_path / "cu13" / "lib", tmp_path / "scratch"
    for folder in (library, scratch):
        folder.mkdir(parents=True)
    for name in files:
        (library / name).touch()
    flags = Nvcc(str(tmp_path / "cu13" / "bin" / "nvcc"), "13.0", "V13.0.88").link_flags(scratch)
    assert flags == ((f"-L{scratch}", f"-L{library}") if linked else ())
    assert [path.resolve() for path in scratch.iterdir()] == ([library / "libcudart.so.13"] if linked else [])
