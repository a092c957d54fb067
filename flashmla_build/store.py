"""Things that are made once, whichever of the machine's processes comes first, and that appear whole."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from flashmla_build import folders
from flashmla_build.progress import say


@dataclass(frozen=True)
class Store:
    """The folder ``name`` of the cache; "" is the cache's own. ``holds`` says what is in it, ``error`` what it raises.

    >>> Store("emulator", "the emulator's runtime", RuntimeError).root()  # doctest: +SKIP
    PosixPath('/home/user/.cache/flashmla/emulator')
    """

    name: str
    holds: str
    error: type[Exception]

    def root(self) -> Path:
        """The folder, which can be written. Raises ``error`` where there is none."""
        try:
            return folders.writable(self.name)
        except folders.NoFolder as none:
            raise self.error(str(none)) from None

    def roots(self) -> Iterator[Path]:
        """Every folder that may hold something already, the best first; they need neither exist nor be writable."""
        return folders.readable(self.name)

    @contextlib.contextmanager
    def locked(self, file: Path) -> Iterator[None]:
        """Hold a lock among processes and threads, and say so if another has to be waited for."""
        lock = filelock.FileLock(file)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"flashmla: waiting for a process that is making {self.holds}", lasting=True)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def scratch(self, folder: Path) -> Iterator[Path]:
        """A new folder inside another; what is finished moves out of it by a rename, the rest goes with it."""
        with tempfile.TemporaryDirectory(dir=folder, prefix="making-") as name:
            yield Path(name)

    def once(self, target: Path, make: Callable[[Path], Path]) -> Path:
        """``target``, made now if it is not there: ``make(scratch)`` gives a file or folder, which is renamed to it."""
        if not target.exists():
            with self.locked(target.with_name(f"{target.name}.lock")):
                if not target.exists():
                    with self.scratch(target.parent) as scratch:
                        make(scratch).replace(target)
        return target
