"""The folder that compiled libraries are kept in: below the one of flashmla_ops, and chosen by the same rules.

This package imports nothing of that one, so the rules of ``flashmla_ops/cpu/cache.py`` stand here again.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cutlass_kernels.errors import BuildError


def cache_root(what: str) -> Path:
    """The folder ``what`` in $FLASHMLA_CACHE or the user's cache folder, or else in a private temporary one.

    Raises `BuildError` where none of them can be written.
    """
    for base in _bases():
        root = base / what
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=root):
                return root
    raise BuildError("no cache folder can be written; set FLASHMLA_CACHE to a folder that can")


def _bases() -> Iterator[Path]:
    override, configured = os.environ.get("FLASHMLA_CACHE"), Path(os.environ.get("XDG_CACHE_HOME", ""))
    home = Path(os.path.expanduser("~"))  # stays "~" where a uid has no home
    users = configured if configured.is_absolute() else home / ".cache"
    if override:
        yield Path(override).absolute()
    elif users.is_absolute() and _is_safe(users / "flashmla", {0, os.getuid()}, closed_to=stat.S_IWOTH):
        yield users / "flashmla"
    with contextlib.suppress(OSError):
        temporary = Path(tempfile.gettempdir()) / f"flashmla-{os.getuid()}"
        if _is_safe(temporary, {os.getuid()}, closed_to=stat.S_IRWXG | stat.S_IRWXO):
            yield temporary


def _is_safe(folder: Path, owners: set[int], *, closed_to: int) -> bool:
    """Whether nobody else can have put libraries into a folder, which is made if it is not there."""
    try:
        folder.mkdir(mode=0o777 & ~closed_to, parents=True, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & closed_to
