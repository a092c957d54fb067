"""Sequences moved out of the pool, to host memory or to a file, and back.

A file appears whole under its name, or not at all: it is written beside, synced and renamed, and what was there before
stays until then. A checksum covers all of it. The pool frees pages only once their rows are safe.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashmla_ops.errors import SwapError
from flashmla_ops.kv_cache.storage import Storage

_MAGIC = b"flashmla kv 1\n"
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Swapped:
    """Where the rows of a swapped sequence are: in ``pages`` or in a file."""

    length: int
    tokens: array[int]
    layout: str  # of the pool that it came from
    checksum: bytes
    pages: tuple[bytes, ...] = ()
    path: Path | None = None

    def read(self) -> Iterator[bytes]:
        """Its pages. Raises `SwapError` if they are not what was written."""
        if self.path is not None:
            if (found := load(self.path)).checksum != self.checksum:
                raise SwapError(f"{self.path} is another sequence's by now")
            yield from found.pages
            return
        if _checksum(self.length, self.tokens, self.layout, self.pages) != self.checksum:
            raise SwapError("the rows of a swapped sequence have changed in memory")
        yield from self.pages


def layout_of(storage: Storage) -> str:
    """Two pools read the pages of each other if they have this in common."""
    return repr((storage.page_size, storage.layers))


def take(storage: Storage, pages: list[int], length: int, tokens: array[int]) -> Swapped:
    """A copy of a sequence's rows in host memory."""
    data, layout = tuple(storage.read(page) for page in pages), layout_of(storage)
    return Swapped(length, tokens, layout, _checksum(length, tokens, layout, data), data)


def save(swapped: Swapped, path: Path) -> Swapped:
    """Write it to a file; where it is then. Raises OSError, and leaves what was there, if that fails."""
    path = path.absolute()
    facts = {"length": swapped.length, "tokens": swapped.tokens.tolist(), "layout": swapped.layout}
    facts["page_bytes"] = [len(page) for page in swapped.pages]
    header = json.dumps(facts).encode()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_MAGIC + swapped.checksum + len(header).to_bytes(8, "little") + header)
            for page in swapped.pages:
                file.write(page)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)
    return Swapped(swapped.length, swapped.tokens, swapped.layout, swapped.checksum, path=path)


def load(path: Path) -> Swapped:
    """Read a file of `save`. Raises `SwapError` unless it is whole."""
    try:
        data = path.read_bytes()
        start = len(_MAGIC) + _DIGEST_BYTES
        if not data.startswith(_MAGIC):
            raise ValueError("it does not begin as one")
        checksum = data[len(_MAGIC) : start]
        end = start + 8 + int.from_bytes(data[start : start + 8], "little")
        facts = json.loads(data[start + 8 : end])
        pages = []
        for size in facts["page_bytes"]:
            pages.append(data[end : end + size])
            end += size
        length, tokens, layout = facts["length"], array("q", facts["tokens"]), facts["layout"]
        if end != len(data) or _checksum(length, tokens, layout, tuple(pages)) != checksum:
            raise ValueError("its checksum is another")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SwapError(f"{path} does not hold a swapped sequence: {error}") from error
    return Swapped(length, tokens, layout, checksum, tuple(pages))


def _checksum(length: int, tokens: array[int], layout: str, pages: tuple[bytes, ...]) -> bytes:
    digest = hashlib.blake2b(repr((length, tokens.tolist(), layout)).encode(), digest_size=_DIGEST_BYTES)
    for page in pages:
        digest.update(page)
    return digest.digest()


def _sync_folder(folder: Path) -> None:
    """So that the new name outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
