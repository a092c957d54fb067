"""The books of a pool in Python, for machines without a C++ compiler. `native_pages` has the same methods.

``cpu/csrc/pool/pages.h`` says what they do; a test runs both beside each other.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from flashmla_ops.errors import ArgumentError
from flashmla_ops.kv_cache.tables import (
    OUT_OF_PAGES,
    REPEATED,
    TOO_LONG,
    UNKNOWN,
    BatchTables,
    PageCopy,
    PageCounts,
    refuse,
)


@dataclass
class _Sequence:
    length: int = 0
    written: int = 0
    pages: list[int] = field(default_factory=list)


class PythonPages:
    """The pages ``0 .. n_pages - 1`` and the sequences in them."""

    def __init__(self, n_pages: int, page_size: int) -> None:
        self.n_pages, self.page_size = n_pages, page_size
        self._references = [0] * n_pages
        self._generations = [0] * n_pages
        self._remembered = 0
        self._dropped = [0] * n_pages  # the last step when a sequence dropped rows of a page
        self._free = list(range(n_pages - 1, -1, -1))
        self._cached: set[int] = set()
        self._evictable: OrderedDict[int, int] = OrderedDict()  # page: the step at which it was dropped
        self._deferred: deque[tuple[int, int]] = deque()
        self._open: set[int] = set()
        self._last_step = 0
        self._sequences: dict[int, _Sequence] = {}
        self._last_sequence = 0
        self._peak = self._evictions = 0
        self._freed: list[int] | None = None

    @property
    def _first_open(self) -> int:
        return min(self._open, default=self._last_step + 1)

    @property
    def _n_used(self) -> int:
        return self.n_pages - len(self._free) - len(self._evictable) - len(self._deferred)

    def can_take(self, count: int) -> bool:
        first = self._first_open
        return count <= len(self._free) + sum(step < first for step in self._evictable.values())

    def _take(self) -> tuple[int, int]:
        """A page, and the last step that may still read it."""
        behind = 0
        if self._free:
            page = self._free.pop()
        else:
            oldest = next(iter(self._evictable.values()), None)
            if oldest is not None and (oldest < self._first_open or not self._deferred):
                page, behind = self._evictable.popitem(last=False)
                self._cached.discard(page)
                self._evictions += 1
            else:
                page, behind = self._deferred.popleft()
            self._tell_freed(page)
        self._references[page] = 1
        self._peak = max(self._peak, self._n_used)
        return page, behind

    def _drop(self, page: int, late: bool = False) -> None:
        """``late``: the step that is opened next reads it too."""
        self._references[page] -= 1
        step = self._dropped[page] = self._last_step + late
        if self._references[page] == 0:
            if page in self._cached:
                self._evictable[page] = step
            else:
                self._put(page, step)

    def _put(self, page: int, step: int) -> None:
        if self._open:
            self._deferred.append((page, step))
        else:
            self._free.append(page)
            self._tell_freed(page)

    def _tell_freed(self, page: int) -> None:
        if self._freed is not None:
            self._freed.append(page)

    def allocate(self, count: int) -> list[int]:
        if not self.can_take(count):
            raise refuse(OUT_OF_PAGES, 0, count)
        return [self._take()[0] for _ in range(count)]

    def allocate_one(self) -> int:
        return self.allocate(1)[0]

    def release_one(self, page: int) -> None:
        self.release([page])

    def retain(self, pages: Sequence[int]) -> None:
        self._check_held(pages, dict.fromkeys(pages, 1))
        for page in pages:
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        self._check_held(pages, Counter(pages))
        for page in pages:
            self._drop(page)

    def _check_held(self, pages: Sequence[int], least: dict[int, int]) -> None:
        for i, page in enumerate(pages):
            if not 0 <= page < self.n_pages or self._references[page] < least[page]:
                raise refuse(UNKNOWN, i, 0, pages)

    def open_sequence(self) -> int:
        self._last_sequence += 1
        self._sequences[self._last_sequence] = _Sequence()
        return self._last_sequence

    def fork(self, sequence: int) -> int:
        parent = self._at(sequence)
        child = self.open_sequence()
        pages = parent.pages[: self._pages_for(parent.length)]
        self._sequences[child] = _Sequence(parent.length, parent.written, pages)
        for page in pages:
            self._references[page] += 1
        return child

    def adopt(self, pages: Sequence[int], generations: Sequence[int], length: int) -> tuple[int, int]:
        name = self.open_sequence()
        sequence = self._sequences[name]
        for page, generation in zip(pages, generations, strict=True):
            if not self.remembers(page, generation):
                break
            self._evictable.pop(page, None)
            self._references[page] += 1
            sequence.pages.append(page)
        self._peak = max(self._peak, self._n_used)
        sequence.length = sequence.written = min(length, len(sequence.pages) * self.page_size)
        return name, len(sequence.pages)

    def truncate(self, sequence: int, length: int) -> None:
        found = self._at(sequence)
        if not 0 <= length <= found.length:
            raise ArgumentError("kv_pool", "length", f"a length in [0, {found.length}]", length)
        self._drop_from(found, self._pages_for(length))
        if length < found.length and length % self.page_size:
            self._dropped[found.pages[-1]] = self._last_step  # open steps may read the rows that are cut off
        found.length, found.written = length, min(found.written, length)

    def close_sequence(self, sequence: int) -> None:
        self._drop_from(self._at(sequence), 0)
        del self._sequences[sequence]

    def _drop_from(self, sequence: _Sequence, kept: int) -> None:
        while len(sequence.pages) > kept:
            self._drop(sequence.pages.pop())

    def reserve(self, sequence: int, tokens: int) -> None:
        found = self._at(sequence)
        found.pages += self.allocate(max(0, self._pages_for(found.length + tokens) - len(found.pages)))

    def step(self, tables: BatchTables, b: int, behind: bool) -> tuple[list[PageCopy], int]:
        names, counts = tables.sequences[:b].tolist(), tables.counts[:b].tolist()
        for i, (name, count) in enumerate(zip(names, counts, strict=True)):
            if name not in self._sequences:
                raise refuse(UNKNOWN, i, 0, names)
            if name in names[:i]:
                raise refuse(REPEATED, i, 0)
            longest = self._pages_for(self._sequences[name].length + count)
            if tables.most_pages < self.n_pages and longest > tables.most_pages:
                raise refuse(TOO_LONG, i, 0)
        sequences = [self._sequences[name] for name in names]
        writers: Counter[int] = Counter()
        shared: list[_Sequence] = []
        needed = 0
        for each, count in zip(sequences, counts, strict=True):
            needed += max(0, self._pages_for(each.length + count) - len(each.pages))
            if count and each.length % self.page_size:
                tail = each.pages[each.length // self.page_size]
                # Where nobody else holds a page, nor an open step reads it, the last of its writers keeps it.
                writes = writers[tail] and self._open
                if self._references[tail] - writers[tail] > 1 or writes or self._dropped[tail] >= self._first_open:
                    writers[tail] += 1
                    shared.append(each)
        needed += len(shared)
        ready = self.n_pages - self._n_used
        if not (needed <= ready if behind else self.can_take(needed)):
            raise refuse(OUT_OF_PAGES, 0, needed)
        copies, last = [], 0
        for each in shared:
            source = each.pages[each.length // self.page_size]
            target, step = self._take()
            each.pages[each.length // self.page_size] = target
            copies.append(PageCopy(source, target))
            last = max(last, step)
        slots: list[int] = []
        for i, (each, count) in enumerate(zip(sequences, counts, strict=True)):
            if count and each.length % self.page_size:
                tail = each.pages[each.length // self.page_size]
                self._cached.discard(tail)
            positions = range(each.length, each.length + count)
            each.length += count
            while len(each.pages) < self._pages_for(each.length):
                page, step = self._take()
                each.pages.append(page)
                last = max(last, step)
            slots += [each.pages[t // self.page_size] * self.page_size + t % self.page_size for t in positions]
            self._write_row(tables, i, each)
        for source, _ in copies:  # not before: they are still to be copied, and late by a step behind others
            self._drop(source, late=behind and bool(self._open))
        tables.slot_mapping[: len(slots)] = tables.slot_mapping.new_tensor(slots)
        return copies, last

    def _write_row(self, tables: BatchTables, i: int, sequence: _Sequence) -> None:
        pages = sequence.pages[: self._pages_for(sequence.length)]
        for parts, table in tables.block_tables.items():
            row = [page * parts + part for page in pages for part in range(parts)]
            table[i, : len(row)] = table.new_tensor(row)
        tables.cache_seqlens[i] = sequence.length

    def commit(self, tables: BatchTables, b: int) -> list[int]:
        filled = []
        for i, name, start, end in self._spans(tables, b):
            sequence = self._sequences.get(name)
            if sequence is not None and sequence.written == start and sequence.length >= end:
                sequence.written = end
                if end // self.page_size > start // self.page_size:
                    filled.append(i)
        return filled

    def roll_back(self, tables: BatchTables, b: int) -> None:
        for _, name, start, _ in self._spans(tables, b):
            if self.length(name) > start:
                self.truncate(name, start)

    def _spans(self, tables: BatchTables, b: int) -> list[tuple[int, int, int, int]]:
        ends, counts = tables.cache_seqlens[:b].tolist(), tables.counts[:b].tolist()
        names = tables.sequences[:b].tolist()
        return [(i, names[i], ends[i] - counts[i], ends[i]) for i in range(b)]

    def open_step(self) -> int:
        self._last_step += 1
        self._open.add(self._last_step)
        return self._last_step

    def close_step(self, step: int) -> None:
        self._open.discard(step)
        while self._deferred and self._deferred[0][1] < self._first_open:
            page, _ = self._deferred.popleft()
            self._free.append(page)
            self._tell_freed(page)

    def remember(self, page: int) -> int:
        self._cached.add(page)
        self._remembered += 1
        self._generations[page] = self._remembered
        return self._remembered

    def remembers(self, page: int, generation: int) -> bool:
        return page in self._cached and self._generations[page] == generation

    def forget(self, page: int) -> None:
        if page in self._cached:
            self._cached.discard(page)
            if self._evictable.pop(page, None) is not None:
                self._put(page, self._last_step)

    def plan_moves(self) -> list[PageCopy] | None:
        if self._open:
            return None
        kept = self.n_pages - len(self._free)
        free = set(self._free)
        targets = iter(sorted(page for page in free if page < kept))
        return [PageCopy(page, next(targets)) for page in range(kept, self.n_pages) if page not in free]

    def move(self, moves: Sequence[PageCopy]) -> None:
        now = dict(moves)
        for sequence in self._sequences.values():
            sequence.pages = [now.get(page, page) for page in sequence.pages]
        for source, target in moves:
            self._references[target], self._references[source] = self._references[source], 0
            self._generations[target] = self._generations[source]
        self._cached = {now.get(page, page) for page in self._cached}
        self._evictable = OrderedDict((now.get(page, page), step) for page, step in self._evictable.items())
        self._free = sorted((set(self._free) | now.keys()) - set(now.values()), reverse=True)
        for source in now:
            self._tell_freed(source)

    def length(self, sequence: int) -> int:
        return self._sequences[sequence].length if sequence in self._sequences else -1

    def written(self, sequence: int) -> int:
        return self._sequences[sequence].written if sequence in self._sequences else -1

    def copies_tail(self, sequence: int) -> bool:
        found = self._at(sequence)
        if found.length % self.page_size == 0:
            return False
        tail = found.pages[found.length // self.page_size]
        return self._references[tail] > 1 or self._dropped[tail] >= self._first_open

    def pages_of(self, sequence: int) -> list[int]:
        return list(self._at(sequence).pages)

    def references(self, page: int) -> int:
        return self._references[page]

    def counts(self) -> PageCounts:
        rows: Counter[int] = Counter()
        reserved = 0
        for sequence in self._sequences.values():
            for i, page in enumerate(sequence.pages):
                held = min(max(0, sequence.length - i * self.page_size), self.page_size)
                reserved += held == 0
                rows[page] = max(rows[page], held)
        runs = [len(list(run)) for free, run in groupby(self.states(), lambda kind: kind == 0) if free]
        return PageCounts(
            free=len(self._free),
            used=self._n_used,
            evictable=len(self._evictable),
            deferred=len(self._deferred),
            reserved=reserved,
            shared=sum(holders > 1 for holders in self._references),
            peak=self._peak,
            evictions=self._evictions,
            rows=rows.total(),
            longest_free=max(runs, default=0),
        )

    @property
    def n_free(self) -> int:
        return len(self._free)

    def states(self) -> list[int]:
        kinds = [2 if holders > 1 else holders for holders in self._references]
        for page in self._evictable:
            kinds[page] = 3
        for page, _ in self._deferred:
            kinds[page] = 4
        return kinds

    def deferred(self) -> list[tuple[int, int]]:
        return list(self._deferred)

    def watch(self) -> None:
        self._freed = []

    def freed(self) -> list[int]:
        freed, self._freed = self._freed or [], [] if self._freed is not None else None
        return freed

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _at(self, sequence: int) -> _Sequence:
        if sequence not in self._sequences:
            raise refuse(UNKNOWN, 0, 0, (sequence,))
        return self._sequences[sequence]
