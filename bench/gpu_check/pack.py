"""A folder that holds what `bench.gpu_check` needs on a machine without a network: at most 60 MB.

It has the packages, and by kernel either the library that was built here or its source with CUTLASS's headers, which
nvcc builds there. ``FOLDER/run`` starts the check.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from bench.gpu_check import caches
from bench.gpu_check.attention import checked
from bench.runner import ROOT, commit
from cutlass_kernels.attention import libraries as attention_libraries
from cutlass_kernels.attention.config import Config
from cutlass_kernels.build import libraries
from cutlass_kernels.errors import MissingToolError
from cutlass_kernels.gemm.catalogue import kernels
from flashmla_ops.cuda.catalogue import shipped

MOST_BYTES = 60 << 20
PACKAGES = ("flashmla_build", "flashmla_ops", "cutlass_kernels", "lowering", "bench")
#: Dependencies that an environment with torch may lack. They are pure Python, and fit any version of it.
CARRIED = ("platformdirs", "tabulate")
DEFAULT_ARCHS = ("sm_80", "sm_90a")
#: Neither kernels nor what tells them apart: the demo's model, and results of other machines.
LEAVE_OUT = shutil.ignore_patterns("fixtures", "results", "__pycache__", "*.so")
SOURCES = "FLASHMLA_CARRIED_SOURCES"
RUN = """#!/bin/sh
# Check the CUDA kernels of this machine's device; the report is written to $1, or beside this file. More arguments, as
# "--seconds 300", go to the check. None of the CPU's kernels is compiled.
here=$(cd "$(dirname "$0")" && pwd)
out="${{1:-$here}}"
[ $# -gt 0 ] && shift
export PYTHONPATH="$here" FLASHMLA_CACHE="$here/cache" {sources}="$here/sources" FLASHMLA_COMMIT={commit}
export FLASHMLA_CPU="${{FLASHMLA_CPU:-reference}}"
exec "${{PYTHON:-python3}}" -m bench.gpu_check --out "$out" "$@"
"""


def carried_sources() -> Path | None:
    """The folder of sources that this process was started with, if any."""
    found = os.environ.get(SOURCES)
    return Path(found) if found and Path(found).is_dir() else None


def _carry_dependency(name: str, folder: Path) -> None:
    spec = find_spec(name)
    assert spec is not None  # a dependency of this package
    for place in spec.submodule_search_locations or []:
        shutil.copytree(place, folder / name, ignore=LEAVE_OUT, dirs_exist_ok=True)
    if not spec.submodule_search_locations:
        assert spec.origin is not None
        shutil.copy(spec.origin, folder)


def attention(arch: str) -> list[Config]:
    """The attention kernels that the check needs, and those of DeepSeek's models."""
    return list(dict.fromkeys([*shipped(arch), *checked(arch), *caches.checked()]))


def _carry_attention(archs: Sequence[str], cache: Path) -> None:
    """Kernels of the DSL, compiled here: the machine that they are for needs no compiler."""
    if not attention_libraries.can_build():
        print(f"left out the attention kernels: {attention_libraries.DSL} is not installed", file=sys.stderr)
        return
    for arch in archs:
        for built in attention_libraries.build_all([(config, arch) for config in attention(arch)], 2):
            # Only the PTX of sm_80 is ever loaded: by devices that are newer than every cubin.
            unused = shutil.ignore_patterns(*([] if arch == "sm_80" else ["*.ptx"]))
            shutil.copytree(built.folder, cache / built.folder.name, ignore=unused, dirs_exist_ok=True)


def pack(folder: Path, archs: Sequence[str] | None) -> int:
    """Fill the folder; 1 if it would be too large."""
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=LEAVE_OUT, dirs_exist_ok=True)
    for name in CARRIED:
        _carry_dependency(name, folder)
    for file in ("flashmla.py", "pyproject.toml"):
        shutil.copy(ROOT / file, folder / file)
    wanted = [config for config in kernels() if not archs or config.arch in archs]
    built = {config: found for config in wanted if (found := libraries.find(config))}
    cache = folder / "cache" / "cutlass"
    (cache / "index").mkdir(parents=True, exist_ok=True)
    for found in built.values():
        shutil.copytree(found.folder, cache / found.folder.name, dirs_exist_ok=True)
        shutil.copy(found.folder.parent / "index" / f"{found.config.name}.json", cache / "index")
    missing = [config for config in wanted if config not in built]
    if missing:
        try:
            libraries.Sources.generated().carry(missing, folder / "sources")
        except MissingToolError as error:
            print(f"left out {len(missing)} kernels that are not built here: {error}", file=sys.stderr)
    _carry_attention(archs or DEFAULT_ARCHS, cache)
    starter = folder / "run"
    starter.write_text(RUN.format(sources=SOURCES, commit=commit()))
    starter.chmod(0o755)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, {len(built)} kernels built, {len(missing)} as source; start {starter}")
    if size > MOST_BYTES:
        print(f"expected at most {MOST_BYTES / 1e6:.0f} MB", file=sys.stderr)
        return 1
    return 0
