"""The books of a pool in C++ (``cpu/csrc/pool/pages.h`` says what each method does), reached through ctypes.

The interpreter's lock is held during a call; a step of any batch is one call.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int32, c_int64, c_uint64, c_void_p
from typing import Any

import numpy as np

from flashmla_ops.cpu import build
from flashmla_ops.errors import ArgumentError, BuildError
from flashmla_ops.kv_cache.tables import (
    BAD_LENGTH,
    FINE,
    OUT_OF_PAGES,
    UNKNOWN,
    BatchTables,
    PageCopy,
    PageCounts,
    refuse,
)


class Found(ctypes.Structure):
    """The answer of a call, beside its status."""

    _fields_ = tuple((name, c_int64) for name in ("index", "needed", "copies", "behind"))


_SEQUENCE = _COUNT = c_int64
_PAGE = _STATUS = c_int32
_PAGES = _TABLES = _ARRAY = _FOUND = c_void_p
#: The C functions, without ``flashmla_``: what they return and take.
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pages_new": (c_void_p, c_int64, c_int64),
    "pages_copy": (c_void_p, _PAGES),
    "pages_delete": (None, _PAGES),
    "pages_allocate": (_STATUS, _PAGES, _COUNT, _ARRAY, _FOUND),
    "pages_allocate_one": (_PAGE, _PAGES),
    "pages_release_one": (_STATUS, _PAGES, _PAGE),
    "pages_retain": (_STATUS, _PAGES, _ARRAY, _COUNT, _FOUND),
    "pages_release": (_STATUS, _PAGES, _ARRAY, _COUNT, _FOUND),
    "pages_open_sequence": (_SEQUENCE, _PAGES),
    "pages_fork": (_STATUS, _PAGES, _SEQUENCE, POINTER(c_int64)),
    "pages_adopt": (_SEQUENCE, _PAGES, _ARRAY, _ARRAY, POINTER(c_int64), c_int64),
    "pages_truncate": (_STATUS, _PAGES, _SEQUENCE, c_int64),
    "pages_close_sequence": (_STATUS, _PAGES, _SEQUENCE),
    "pages_reserve": (_STATUS, _PAGES, _SEQUENCE, c_int64, _FOUND),
    "pages_step": (_STATUS, _PAGES, _TABLES, _COUNT, c_int32, _FOUND),
    "pages_commit": (c_int64, _PAGES, _TABLES, _COUNT),
    "pages_roll_back": (None, _PAGES, _TABLES, _COUNT),
    "pages_can_take": (c_int32, _PAGES, _COUNT),
    "pages_open_step": (c_int64, _PAGES),
    "pages_close_step": (None, _PAGES, c_int64),
    "pages_remember": (c_uint64, _PAGES, _PAGE),
    "pages_remembers": (c_int32, _PAGES, _PAGE, c_uint64),
    "pages_forget": (None, _PAGES, _PAGE),
    "pages_plan_moves": (c_int64, _PAGES, _ARRAY),
    "pages_move": (None, _PAGES, _ARRAY, _COUNT),
    "pages_length": (c_int64, _PAGES, _SEQUENCE),
    "pages_written": (c_int64, _PAGES, _SEQUENCE),
    "pages_copies_tail": (c_int32, _PAGES, _SEQUENCE),
    "pages_of": (c_int64, _PAGES, _SEQUENCE, _ARRAY, _COUNT),
    "pages_references": (c_int64, _PAGES, _PAGE),
    "pages_counts": (None, _PAGES, _ARRAY),
    "pages_n_free": (c_int64, _PAGES),
    "pages_states": (None, _PAGES, _ARRAY),
    "pages_deferred": (c_int64, _PAGES, _ARRAY, _ARRAY),
    "pages_watch": (None, _PAGES),
    "pages_n_freed": (c_int64, _PAGES),
    "pages_freed": (None, _PAGES, _ARRAY),
    "tables_new": (c_void_p, _COUNT, c_int64, *[_ARRAY] * 5),
    "tables_add": (None, _TABLES, _ARRAY, c_int64, c_int64),
    "tables_delete": (None, _TABLES),
}


@functools.cache
def _library_or_why_not() -> Any:
    """The library, compiled now if it has not been, or the error: it is not tried again for every pool."""
    functions = {f"flashmla_{name}": (returned, taken) for name, (returned, *taken) in _SIGNATURES.items()}
    try:
        return build.opened(build.PAGES, functions, ctypes.PyDLL)
    except (BuildError, OSError) as error:
        return error


def library() -> Any:
    """The library. Raises `BuildError` or OSError."""
    found = _library_or_why_not()
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found


class _Handle:
    """Something of the library's, deleted with the object."""

    def __init__(self, kind: str, address: int) -> None:
        self.address = address
        self._delete = getattr(library(), f"flashmla_{kind}_delete")

    def __del__(self) -> None:
        self._delete(self.address)


def _as_pages(pages: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.asarray(pages, np.int32)


class NativePages:
    """The pages ``0 .. n_pages - 1`` and the sequences in them."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        """Raises `BuildError` or OSError where there is no library."""
        self.n_pages, self.page_size = n_pages, page_size
        self._bind(library().flashmla_pages_new(n_pages, page_size))

    def _bind(self, address: int) -> None:
        self._library, self._handle, self._found = library(), _Handle("pages", address), Found()
        self._at, self._found_at = address, ctypes.addressof(self._found)
        # Looked up once, for callers that keep no sequences.
        self._allocate_one = self._library.flashmla_pages_allocate_one
        self._release_one = self._library.flashmla_pages_release_one

    def __deepcopy__(self, memo: dict[int, Any]) -> NativePages:
        copy = NativePages.__new__(NativePages)
        copy.n_pages, copy.page_size = self.n_pages, self.page_size
        copy._bind(self._library.flashmla_pages_copy(self._at))
        return copy

    def allocate(self, count: int) -> list[int]:
        """``count`` pages, each with one holder. Raises `OutOfPages`."""
        pages = np.empty(max(0, min(count, self.n_pages)), np.int32)
        self._check(self._library.flashmla_pages_allocate(self._at, count, pages.ctypes.data, self._found_at))
        taken: list[int] = pages.tolist()
        return taken

    def allocate_one(self) -> int:
        page: int = self._allocate_one(self._at)
        if page < 0:
            raise refuse(OUT_OF_PAGES, 0, 1)
        return page

    def release_one(self, page: int) -> None:
        if self._release_one(self._at, page):
            raise refuse(UNKNOWN, 0, 0, (page,))

    def retain(self, pages: Sequence[int]) -> None:
        """Another holder for each page. Raises `ArgumentError` if one has none."""
        which = _as_pages(pages)
        address = which.ctypes.data
        self._check(self._library.flashmla_pages_retain(self._at, address, len(which), self._found_at), pages)

    def release(self, pages: Sequence[int]) -> None:
        """A holder less for each page. Raises `ArgumentError` if one has too few."""
        which = _as_pages(pages)
        address = which.ctypes.data
        self._check(self._library.flashmla_pages_release(self._at, address, len(which), self._found_at), pages)

    def open_sequence(self) -> int:
        name: int = self._library.flashmla_pages_open_sequence(self._at)
        return name

    def fork(self, sequence: int) -> int:
        child = c_int64()
        self._known(self._library.flashmla_pages_fork(self._at, sequence, byref(child)), sequence)
        return child.value

    def adopt(self, pages: Sequence[int], generations: Sequence[int], length: int) -> tuple[int, int]:
        """A sequence of the first pages that are still as cached; its name, and how many they were."""
        which, versions, count = _as_pages(pages), np.asarray(generations, np.uint64), c_int64(len(pages))
        arrays = which.ctypes.data, versions.ctypes.data
        name: int = self._library.flashmla_pages_adopt(self._at, *arrays, byref(count), length)
        return name, count.value

    def truncate(self, sequence: int, length: int) -> None:
        status = self._library.flashmla_pages_truncate(self._at, sequence, length)
        if status == BAD_LENGTH:
            expected = f"a length in [0, {self.length(sequence)}]"
            raise ArgumentError("kv_pool", "length", expected, length)
        self._known(status, sequence)

    def close_sequence(self, sequence: int) -> None:
        self._known(self._library.flashmla_pages_close_sequence(self._at, sequence), sequence)

    def reserve(self, sequence: int, tokens: int) -> None:
        """Pages for so many more tokens. Raises `OutOfPages`."""
        status = self._library.flashmla_pages_reserve(self._at, sequence, tokens, self._found_at)
        self._check(status, (sequence,))

    def step(self, tables: BatchTables, b: int, behind: bool) -> tuple[list[PageCopy], int]:
        """Room for ``tables.counts[:b]`` tokens in ``tables.sequences[:b]``, and the tensors filled.

        Returns the pages to copy, and the last step that may still read what was handed out (0: none).
        """
        address = tables.kept.address if tables.kept is not None else self._keep(tables)
        status = self._library.flashmla_pages_step(self._at, address, b, behind, self._found_at)
        if status:
            self._check(status, tables.sequences)
        found = self._found
        copies = found.copies
        return [PageCopy(*pair) for pair in tables.copies[:copies].tolist()] if copies else [], found.behind

    def commit(self, tables: BatchTables, b: int) -> list[int]:
        """Count the rows of the step as written; the indices of the sequences that filled a page."""
        count = self._library.flashmla_pages_commit(self._at, tables.kept.address, b)
        return tables.copies.reshape(-1)[:count].tolist() if count else []

    def roll_back(self, tables: BatchTables, b: int) -> None:
        """The sequences are no longer than before the step."""
        self._library.flashmla_pages_roll_back(self._at, tables.kept.address, b)

    def can_take(self, count: int) -> bool:
        return bool(self._library.flashmla_pages_can_take(self._at, count))

    def open_step(self) -> int:
        step: int = self._library.flashmla_pages_open_step(self._at)
        return step

    def close_step(self, step: int) -> None:
        self._library.flashmla_pages_close_step(self._at, step)

    def remember(self, page: int) -> int:
        """A page that somebody holds is one of the prefix cache's; its generation."""
        generation: int = self._library.flashmla_pages_remember(self._at, page)
        return generation

    def remembers(self, page: int, generation: int) -> bool:
        return bool(self._library.flashmla_pages_remembers(self._at, page, generation))

    def forget(self, page: int) -> None:
        self._library.flashmla_pages_forget(self._at, page)

    def plan_moves(self) -> list[PageCopy] | None:
        """The moves that would leave the used pages in front; None while a step is open."""
        moves = np.empty((self.n_pages // 2 + 1, 2), np.int32)
        count = self._library.flashmla_pages_plan_moves(self._at, moves.ctypes.data)
        return None if count < 0 else [PageCopy(*pair) for pair in moves[:count].tolist()]

    def move(self, moves: Sequence[PageCopy]) -> None:
        pairs = _as_pages([page for move in moves for page in move])
        self._library.flashmla_pages_move(self._at, pairs.ctypes.data, len(moves))

    def length(self, sequence: int) -> int:
        """-1 for a sequence that was released."""
        length: int = self._library.flashmla_pages_length(self._at, sequence)
        return length

    def written(self, sequence: int) -> int:
        """Tokens whose rows are there, as far as steps have said; -1 for a sequence that was released."""
        written: int = self._library.flashmla_pages_written(self._at, sequence)
        return written

    def copies_tail(self, sequence: int) -> bool:
        """Whether its next token would be written to a page of others, and is written to a copy."""
        return bool(self._library.flashmla_pages_copies_tail(self._at, sequence))

    def pages_of(self, sequence: int) -> list[int]:
        count = self._library.flashmla_pages_of(self._at, sequence, None, 0)
        if count < 0:
            raise refuse(UNKNOWN, 0, 0, (sequence,))
        pages = np.empty(count, np.int32)
        self._library.flashmla_pages_of(self._at, sequence, pages.ctypes.data, count)
        held: list[int] = pages.tolist()
        return held

    def references(self, page: int) -> int:
        holders: int = self._library.flashmla_pages_references(self._at, page)
        return holders

    def counts(self) -> PageCounts:
        counts = np.zeros(len(PageCounts._fields), np.int64)
        self._library.flashmla_pages_counts(self._at, counts.ctypes.data)
        return PageCounts(*counts.tolist())

    @property
    def n_free(self) -> int:
        count: int = self._library.flashmla_pages_n_free(self._at)
        return count

    def states(self) -> list[int]:
        """0 for a free page, 1 used, 2 shared, 3 evictable, 4 deferred."""
        states = np.zeros(self.n_pages, np.uint8)
        self._library.flashmla_pages_states(self._at, states.ctypes.data)
        kinds: list[int] = states.tolist()
        return kinds

    def deferred(self) -> list[tuple[int, int]]:
        """Pages that wait, and the last step that each waits for."""
        pages, steps = np.empty(self.n_pages, np.int32), np.empty(self.n_pages, np.int64)
        count = self._library.flashmla_pages_deferred(self._at, pages.ctypes.data, steps.ctypes.data)
        return list(zip(pages[:count].tolist(), steps[:count].tolist(), strict=True))

    def watch(self) -> None:
        """From now on `freed` tells."""
        self._library.flashmla_pages_watch(self._at)

    def freed(self) -> list[int]:
        """Pages that came to be free since the last call."""
        pages = np.empty(self._library.flashmla_pages_n_freed(self._at), np.int32)
        self._library.flashmla_pages_freed(self._at, pages.ctypes.data)
        freed: list[int] = pages.tolist()
        return freed

    def _keep(self, tables: BatchTables) -> int:
        arrays = (tables.cache_seqlens.data_ptr(), tables.slot_mapping.data_ptr())
        filled = (tables.sequences.ctypes.data, tables.counts.ctypes.data, tables.copies.ctypes.data)
        address: int = self._library.flashmla_tables_new(tables.rows, tables.most_pages, *arrays, *filled)
        tables.kept = _Handle("tables", address)
        for parts, table in tables.block_tables.items():
            self._library.flashmla_tables_add(address, table.data_ptr(), table.stride(0), parts)
        return address

    def _check(self, status: int, names: Any = ()) -> None:
        if status != FINE:
            raise refuse(status, self._found.index, self._found.needed, names)

    def _known(self, status: int, sequence: int) -> None:
        if status != FINE:
            raise refuse(status, 0, 0, (sequence,))
