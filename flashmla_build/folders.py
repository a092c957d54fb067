"""The folders that compiled libraries are kept in: the user's own, or a private temporary one where there is none."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import platformdirs


class NoFolder(Exception):
    """No folder can be written. The message says why, and what to do."""


def writable(name: str) -> Path:
    """The folder ``name`` in $FLASHMLA_CACHE or the user's cache folder, or else in a private temporary one.

    It exists, and a file could be written to it just now. Raises `NoFolder` where there is none.
    """
    override = _override()
    if override and _can_write(override / name):
        return override / name
    if not override and (users := _users()) and _can_write(users) and _is_trusted(users) and _can_write(users / name):
        return users / name
    try:
        temporary = _temporary()
        with contextlib.suppress(FileExistsError):
            temporary.mkdir(mode=0o700)
        if _is_private(temporary) and _can_write(temporary / name):
            return temporary / name
        reason = f"{temporary} is not a private folder of this user's"
    except OSError as error:
        reason = f"nor a temporary one: {error}"
    raise NoFolder(f"no cache folder can be written, {reason}; set FLASHMLA_CACHE to a folder that can")


def readable(name: str) -> Iterator[Path]:
    """The same folders, for what is there already: a cache that somebody else filled need not be writable."""
    override = _override()
    if override:
        yield override / name
    elif (users := _users()) and _is_trusted(users):
        yield users / name
    with contextlib.suppress(OSError):
        if _is_private(temporary := _temporary()):
            yield temporary / name


def _override() -> Path | None:
    found = os.environ.get("FLASHMLA_CACHE")
    return Path(found).absolute() if found else None


def _users() -> Path | None:
    """None where the user has no home: a container's uid, say, without an entry in passwd and without $HOME."""
    try:
        found = platformdirs.user_cache_path("flashmla")
    except RuntimeError:  # older versions give a path that begins with "~"
        return None
    return found if found.is_absolute() else None


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
