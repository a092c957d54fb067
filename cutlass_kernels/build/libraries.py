"""Compile generated kernels with nvcc, once each, into a cache that every process shares.

A kernel's folder is named by a hash of its source, our headers, CUTLASS's version, nvcc and its flags, so what is
found there is what would be compiled. It holds the source, the library, ptxas's report and ``report.json``, and appears
by one rename. Beside the folders, ``index/NAME.json`` says which one is current, so that running a kernel needs neither
cutlass_cppgen nor nvcc.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cutlass_kernels.build import ptxas
from cutlass_kernels.build.store import STORE
from cutlass_kernels.build.toolchain import Nvcc, nvcc
from cutlass_kernels.errors import BuildError
from cutlass_kernels.gemm import cppgen, generate
from cutlass_kernels.gemm.config import GemmConfig
from flashmla_build import Progress, run

LIBRARY = "kernel.so"
FLAGS = (
    "-std=c++17",
    "-O3",
    "--expt-relaxed-constexpr",
    # Off: asserts. In wgmma code they make ptxas serialise the instructions (C7510), and in host code a missing driver
    # would end the process instead of giving an error code.
    "-DNDEBUG",
    # Shared: a process has one CUDA runtime, torch's, whose streams and devices these are.
    "-cudart=shared",
    "-shared",
    # Hidden: CUTLASS's static members must not be merged between two loaded kernels.
    "-Xcompiler=-fPIC,-fvisibility=hidden",
    "-Xptxas=-v",
    # Names of internal symbols come from this instead of the clock.
    "-frandom-seed=flashmla",
    # Uncompressed: the PTX that ships can be read, and executed by `cutlass_kernels.emulator`.
    "--compress-mode=none",
)


@dataclass(frozen=True)
class Built:
    """A compiled kernel and what ptxas said of it."""

    config: GemmConfig
    folder: Path
    seconds: float  # of the compilation that made it
    report: ptxas.Report

    @property
    def library(self) -> Path:
        return self.folder / LIBRARY


def target_flags(arch: str) -> tuple[str, ...]:
    """Machine code, and PTX: newer devices translate that of sm_80, and the emulator runs it."""
    number = arch.removeprefix("sm_")
    return (
        f"-gencode=arch=compute_{number},code=sm_{number}",
        f"-gencode=arch=compute_{number},code=compute_{number}",
    )


@dataclass(frozen=True)
class Sources:
    """Where the source of a kernel comes from, and the CUTLASS that it is for: its headers and its version."""

    text: Callable[[GemmConfig], str]
    include: str
    version: str

    @classmethod
    def generated(cls) -> Sources:
        """Those of the installed nvidia-cutlass. Raises `MissingToolError` without it."""
        return cls(generate.source, cppgen.include_folder(), cppgen.version())

    @classmethod
    def carried(cls, folder: Path) -> Sources:
        """Those that `carry` put into a folder, for a machine without nvidia-cutlass."""
        return cls(
            lambda config: (folder / f"{config.name}.cu").read_text(),
            str(folder / "include"),
            (folder / "VERSION").read_text().strip(),
        )

    def carry(self, configs: Iterable[GemmConfig], folder: Path) -> None:
        """Write the sources of kernels into a folder, with the headers that they include."""
        folder.mkdir(parents=True, exist_ok=True)
        for config in configs:
            (folder / f"{config.name}.cu").write_text(self.text(config))
        shutil.copytree(self.include, folder / "include", dirs_exist_ok=True)
        (folder / "VERSION").write_text(self.version + "\n")


def key(source: str, config: GemmConfig, compiler: Nvcc, version: str) -> str:
    """A hash of all that a library depends on. ``version``: CUTLASS's."""
    digest = hashlib.sha256()
    for text in (source, *(path.read_text() for path in generate.glue_files(source))):
        digest.update(text.encode() + b"\0")
    digest.update(repr((compiler.release, version, FLAGS, target_flags(config.arch))).encode())
    return digest.hexdigest()[:16]


def build(
    configs: Iterable[GemmConfig],
    *,
    jobs: int | None = None,
    quiet: bool = False,
    sources: Sources | None = None,
    enough: Callable[[], bool] = lambda: False,
) -> list[Built]:
    """Every kernel, compiled now if it is not in the cache; ``jobs`` at once (None: one a core).

    ``sources``: where to take them from; None: generate them. Once ``enough()`` holds, no further one is begun.

    Raises `MissingToolError` without nvcc or cutlass_cppgen, and `BuildError` after the rest has been built if any
    kernel failed: the message has them all.
    """
    wanted, compiler = list(configs), nvcc()
    sources = sources or Sources.generated()
    progress = None if quiet else Progress(len(wanted), log=True)
    built: dict[str, Built] = {}
    failures: list[str] = []
    with ThreadPoolExecutor(max_workers=jobs or len(os.sched_getaffinity(0))) as pool:
        tasks = {pool.submit(_find_or_build, config, sources, compiler, enough): config for config in wanted}
        for task in as_completed(tasks):
            config = tasks[task]
            try:
                if (made := task.result()) is not None:
                    built[config.name] = made
            except BuildError as error:
                failures.append(str(error))
            if progress is not None:
                progress.step(config.name, failed=len(failures))
    if failures:
        raise BuildError("\n".join(failures))
    return [built[config.name] for config in wanted if config.name in built]


def find(config: GemmConfig) -> Built | None:
    """The current library of a kernel, if it has been built. Needs neither nvcc nor cutlass_cppgen."""
    for root in STORE.roots():
        with contextlib.suppress(OSError, ValueError, KeyError):
            return _read(config, root / json.loads((root / "index" / f"{config.name}.json").read_text())["folder"])
    return None


def _find_or_build(config: GemmConfig, sources: Sources, compiler: Nvcc, enough: Callable[[], bool]) -> Built | None:
    root, source = STORE.root(), sources.text(config)
    folder = root / f"{config.name}-{key(source, config, compiler, sources.version)}"
    if not folder.exists() and enough():
        return None
    STORE.once(folder, lambda scratch: _compile(config, source, sources.include, compiler, scratch))
    try:
        return _indexed(_read(config, folder))
    except (OSError, ValueError, KeyError) as error:
        raise BuildError(f"{config.name}: {folder} is not whole, remove it: {error}") from error


def _read(config: GemmConfig, folder: Path) -> Built:
    facts: dict[str, Any] = json.loads((folder / "report.json").read_text())
    if not (folder / LIBRARY).is_file():
        raise FileNotFoundError(folder / LIBRARY)
    entries = tuple(ptxas.EntryReport(**entry) for entry in facts["entries"])
    return Built(config, folder, facts["seconds"], ptxas.Report(entries, facts["serialised_wgmma"]))


def _indexed(built: Built) -> Built:
    root, entry = built.folder.parent, f"{built.config.name}.json"
    (root / "index").mkdir(exist_ok=True)
    with STORE.scratch(root) as scratch:
        text = json.dumps({"folder": built.folder.name})  # a name: the cache may be carried elsewhere
        (scratch / entry).write_text(text)
        (scratch / entry).replace(root / "index" / entry)
    return built


def _compile(config: GemmConfig, source: str, include: str, compiler: Nvcc, scratch: Path) -> Path:
    """The kernel's folder, made in another one."""
    folder = scratch / config.name
    folder.mkdir()
    file = folder / f"{config.name}.cu"
    file.write_text(source)
    includes = (f"-I{include}", f"-I{generate.CSRC}")
    output = ("-o", str(folder / LIBRARY), str(file))
    command = [compiler.path, *FLAGS, *target_flags(config.arch), *includes, *compiler.link_flags(scratch), *output]
    started = time.monotonic()
    done = run(command, scratch)
    seconds = time.monotonic() - started
    if done.returncode != 0:
        raise BuildError(f"{config.name}: nvcc failed\n{' '.join(command)}\n{_errors(done.stderr)}")
    (folder / "ptxas.txt").write_text(done.stderr)
    report = ptxas.parse(done.stderr)
    if faults := report.faults():
        raise BuildError(f"{config.name}: may not ship: {'; '.join(faults)}")
    facts = {"name": config.name, "nvcc": compiler.release, "seconds": round(seconds, 1), **asdict(report)}
    (folder / "report.json").write_text(json.dumps(facts, indent=1) + "\n")
    return folder


def _errors(text: str) -> str:
    """The lines that say what is wrong; all of the end if none does."""
    found = [line[:400] for line in text.splitlines() if "error" in line]
    return "\n".join(found[:10]) or text[-4000:]
