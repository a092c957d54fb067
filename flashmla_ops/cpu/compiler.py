"""The machine's own C++ compiler: finding it, and running it on many files at once."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from flashmla_ops.errors import BuildError

NAMES = ("g++", "c++", "clang++")


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source compiled with flags of its own."""

    source: str
    flags: tuple[str, ...] = ("-O2",)
    name: str = field(default="")

    @property
    def object_name(self) -> str:
        return f"{self.name or Path(self.source).stem}.o"


def compiler() -> list[str]:
    """The C++ compiler as a command: $CXX, or the first of `NAMES` on PATH. Raises `BuildError` if there is none."""
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        if found := next(filter(None, map(shutil.which, NAMES)), None):
            return [found]
        raise BuildError(f"no C++ compiler found: none of {', '.join(NAMES)} is on PATH; install g++ or set CXX")
    try:
        command = shlex.split(wanted)  # with arguments: "ccache g++"
    except ValueError:
        command = [wanted]
    if shutil.which(command[0]) is None:
        raise BuildError(f"CXX={wanted} names nothing that runs: set it to a C++ compiler, or unset it to use PATH's")
    return command


class Compilation:
    """Units that are being compiled into a folder, as many at once as there are cores.

    ``arguments`` gives the compiler's for a unit, its own flags and the source among them.
    """

    def __init__(
        self, units: Sequence[Unit], scratch: Path, arguments: Callable[[Unit], list[str]], *, verbose: bool
    ) -> None:
        self._command = compiler()
        self._scratch, self._arguments, self._verbose = scratch, arguments, verbose
        self._started, self._done, self._units = time.monotonic(), 0, len(units)
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
        self._done += 1
        seconds = time.monotonic() - self._started
        progress(f"flashmla: compiled {self._done}/{self._units} ({unit.object_name}, {seconds:.0f} s)")
        return target

    def _run(self, command: list[str]) -> None:
        if self._verbose:
            print(shlex.join(command), file=sys.stderr)
        environment = {**os.environ, "TMPDIR": str(self._scratch)}  # the folder that is known to be writable
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        except OSError as error:
            raise BuildError(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode != 0:
            raise BuildError(f"{shlex.join(command)}\n{done.stderr[-4000:]}")


def progress(text: str, *, lasting: bool = False) -> None:
    """A line on stderr. On a terminal the next one takes its place; elsewhere only lasting ones are printed."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\n" if lasting else "", file=sys.stderr, flush=True)
    elif lasting:
        print(text, file=sys.stderr, flush=True)
