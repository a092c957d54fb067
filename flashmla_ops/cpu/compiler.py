"""The machine's own C++ compiler on many files at once."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flashmla_build import Progress, compiler, run
from flashmla_ops.errors import BuildError


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source compiled with flags of its own."""

    source: str
    flags: tuple[str, ...] = ("-O2",)
    name: str = field(default="")

    @property
    def object_name(self) -> str:
        return f"{self.name or Path(self.source).stem}.o"


class Compilation:
    """Units that are being compiled into a folder, as many at once as there are cores.

    ``arguments`` gives the compiler's for a unit, its own flags and the source among them.
    """

    def __init__(
        self, units: Sequence[Unit], scratch: Path, arguments: Callable[[Unit], list[str]], *, verbose: bool
    ) -> None:
        self._command = compiler(BuildError)
        self._scratch, self._arguments, self._verbose = scratch, arguments, verbose
        self._progress = Progress(len(units))
        self._pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        self._objects: dict[Unit, Future[Path]] = {unit: self._pool.submit(self._compile, unit) for unit in units}

    def __enter__(self) -> Compilation:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def link(self, target: Path, units: Sequence[Unit], flags: Sequence[str]) -> None:
        """Wait for units and put them into a shared library, which appears whole. Raises `BuildError`."""
        objects = [str(self._objects[unit].result()) for unit in units]
        finished = self._scratch / target.name
        self._run([*self._command, "-shared", "-pthread", "-o", str(finished), *objects, *flags])
        finished.replace(target)

    def _compile(self, unit: Unit) -> Path:
        target = self._scratch / unit.object_name
        self._run([*self._command, *self._arguments(unit), "-c", "-o", str(target)])
        self._progress.step(unit.object_name)
        return target

    def _run(self, command: list[str]) -> None:
        if self._verbose:
            print(shlex.join(command), file=sys.stderr)
        try:
            done = run(command, self._scratch)
        except OSError as error:
            raise BuildError(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")
