"""Built attention kernels: found in the cache, or compiled into it where nvidia-cutlass-dsl is installed.

A kernel's folder is named by its configuration, its architecture and a hash of this package's sources, so what is found
there is what would be compiled. It appears by one rename, with the PTX that the emulator runs, the cubin that a device
loads, and a report.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from cutlass_kernels.attention.config import Config
from cutlass_kernels.build.store import STORE
from cutlass_kernels.errors import BuildError, MissingToolError
from flashmla_build import run

#: The release that kernels are written for and tested with; the extra "cuda" installs it.
DSL = "nvidia-cutlass-dsl==4.8.1"
#: Architectures that a cubin is made for. Newer devices translate the PTX of sm_80.
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90a")
#: The compilation's process finds this package where this process has found it.
_MAIN = """
import sys
sys.path.insert(0, sys.argv[1])
from cutlass_kernels.attention.compile import main
main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Built:
    """A compiled kernel."""

    config: Config
    arch: str
    folder: Path
    entry: str  # its name
    parameters: tuple[tuple[str, str], ...]  # names, and codes of `struct`
    registers: int
    stack_bytes: int

    @property
    def cubin(self) -> bytes:
        return (self.folder / "kernel.cubin").read_bytes()

    @property
    def ptx(self) -> str:
        return (self.folder / "kernel.ptx").read_text()


def arch_of(capability: tuple[int, int]) -> str | None:
    """What is built for a device: its own architecture, or sm_80, whose PTX newer ones translate. None below 8.0."""
    if capability < (8, 0):
        return None
    own = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    return own if own in ARCHS else "sm_80"


def can_build() -> bool:
    return find_spec("nvidia_cutlass_dsl") is not None


def find(config: Config, arch: str) -> Built | None:
    """The kernel, if it has been built."""
    for root in STORE.roots():
        if (folder := root / _folder(config, arch)).is_dir():
            return _read(config, arch, folder)
    return None


def build(config: Config, arch: str) -> Built:
    """The kernel, compiled now if it is not in the cache: seconds. Raises `MissingToolError` and `BuildError`."""
    if (found := find(config, arch)) is not None:
        return found
    if not can_build():
        raise MissingToolError(f"compiling {config.name} needs {DSL}: pip install 'flashmla-ops[cuda]'")
    folder = STORE.root() / _folder(config, arch)
    STORE.once(folder, lambda scratch: _compile(config, arch, scratch))
    return _read(config, arch, folder)


def build_all(wanted: Iterable[tuple[Config, str]], jobs: int = 1) -> list[Built]:
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        return list(pool.map(lambda each: build(*each), wanted))


@cache
def _sources() -> str:
    """A hash of what kernels are compiled from."""
    digest = hashlib.sha256(DSL.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _folder(config: Config, arch: str) -> str:
    return f"{config.name}-{arch}-{_sources()}"


def _compile(config: Config, arch: str, scratch: Path) -> Path:
    folder = scratch / "kernel"
    folder.mkdir()
    words = [arch, str(folder), config.kind, json.dumps(config.fields())]
    done = run([sys.executable, "-c", _MAIN, str(Path(__file__).parents[2]), *words], scratch)
    if done.returncode != 0 or not (folder / "report.json").is_file():
        raise BuildError(f"{config.name}: the DSL failed\n{done.stderr[-4000:] or done.stdout[-4000:]}")
    return folder


def _read(config: Config, arch: str, folder: Path) -> Built:
    facts = json.loads((folder / "report.json").read_text())
    parameters = tuple((str(name), str(code)) for name, code in facts["parameters"])
    return Built(config, arch, folder, facts["entry"], parameters, facts["registers"], facts["stack_bytes"])
