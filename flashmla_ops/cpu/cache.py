"""The folders that compiled libraries are kept in: the user's own, or a private temporary one where there is none."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flashmla_ops.errors import BuildError


def cache_root() -> Path:
    """$FLASHMLA_CACHE or the user's cache folder; a private temporary one if that cannot be written.

    Raises `BuildError` where neither can be.
    """
    override = _override()
    if override and _can_write(override):
        return override
    if not override and (users := _users()) and _can_write(users) and _is_trusted(users):
        return users
    try:
        temporary = _temporary()
        with contextlib.suppress(FileExistsError):
            temporary.mkdir(mode=0o700)
        if _is_private(temporary) and _can_write(temporary):
            return temporary
        reason = f"{temporary} is not a private folder of this user's"
    except OSError as error:
        reason = f"nor a temporary one: {error}"
    raise BuildError(f"no cache folder can be written, {reason}; set FLASHMLA_CACHE to a folder that can")


def readable_roots() -> Iterator[Path]:
    """The same folders, for what is there already: a cache that somebody else filled need not be writable."""
    override = _override()
    if override:
        yield override
    elif (users := _users()) and _is_trusted(users):
        yield users
    with contextlib.suppress(OSError):
        if _is_private(temporary := _temporary()):
            yield temporary


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock among processes, and say so if another has to be waited for."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("flashmla: waiting for a process that is compiling the CPU kernels", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _override() -> Path | None:
    found = os.environ.get("FLASHMLA_CACHE")
    return Path(found).absolute() if found else None


def _users() -> Path | None:
    """None where the user has no home: a container's uid, say, without an entry in passwd and without $HOME."""
    if (configured := Path(os.environ.get("XDG_CACHE_HOME", ""))).is_absolute():
        return configured / "flashmla"
    home = Path(os.path.expanduser("~"))
    return home / ".cache" / "flashmla" if home.is_absolute() else None


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"flashmla-{os.getuid()}"


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _is_trusted(folder: Path) -> bool:
    """Whether only this user and root can have put libraries there; with HOME=/tmp it may be anybody's."""
    return _owned(folder, by=(0, os.getuid()), closed_to=stat.S_IWOTH)


def _is_private(folder: Path) -> bool:
    return _owned(folder, by=(os.getuid(),), closed_to=stat.S_IRWXG | stat.S_IRWXO)


def _owned(folder: Path, *, by: tuple[int, ...], closed_to: int) -> bool:
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid in by and not found.st_mode & closed_to
