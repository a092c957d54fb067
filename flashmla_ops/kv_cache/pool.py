"""`KVPool`: one pool of pages for the cached rows of all sequences and layers of a model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Sized
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from flashmla_ops.errors import ArgumentError, PoolBusyError, SwapError
from flashmla_ops.kv_cache import plot, stats, swap
from flashmla_ops.kv_cache.arena import Arena
from flashmla_ops.kv_cache.core import PagePool
from flashmla_ops.kv_cache.device_arena import DeviceArena
from flashmla_ops.kv_cache.epochs import TraceEvent
from flashmla_ops.kv_cache.sequence import NOWHERE, Sequence
from flashmla_ops.kv_cache.stats import PoolStats

#: Bytes by which the memory for torch's own tensors grows.
WORKSPACE_STEP = 64 << 20


class KVPool(PagePool):
    """Pages for the rows of every layer, shared by all sequences; one block table serves all layers.

        pool = KVPool(layers=27, format="fp8_v32", d=576, page_size=64, memory="8GiB", preallocate=True)
        seq = pool.open(prompt_tokens)               # cached prefixes are found again
        with pool.step([seq], seq.pending) as step:  # room for the rest of the prompt
            model(..., step.block_table, step.cache_seqlens, step.slot_mapping)
        pool.release(seq)                            # at once, whatever is still being read

    Every method either succeeds, or raises and changes nothing; several threads may call them at once. A method that
    gives out pages raises `OutOfPagesError` where there are too few. `PagePool` has the arguments.
    """

    def _begin(self) -> None:
        self._watchers: list[Watermarks] = []
        self._arena: Arena | DeviceArena | None = None
        super()._begin()

    # Torch's own tensors.

    def allocator(self) -> AbstractContextManager[None]:
        """Serve torch's allocations on the pool's device from memory of the pool: see `Arena`, and `DeviceArena`.

        It grows up to the pool's ``workspace``, and lives as long as the pool and what was allocated from it. Raises
        `ArenaUnavailableError`, which says why it cannot.
        """
        return self.arena().allocator()

    def arena(self) -> Arena | DeviceArena:
        """The arena of `allocator`, made when it is first asked for. Raises `ArenaUnavailableError`."""
        with self._locked():
            if self._arena is None:
                first = min(WORKSPACE_STEP, self.workspace)
                if self.device is not None and self.device.type == "cuda":
                    self._arena = DeviceArena(first, device=self.device, limit=self.workspace)
                else:
                    self._arena = Arena(first, limit=self.workspace)
            return self._arena

    # Pressure.

    def can_fit(
        self, new_tokens: int | Sized[int], sequences: Sized[Sequence] | None = None, headroom: int = 0
    ) -> bool:
        """Whether there are pages for a step of these sequences, or for new ones; ``headroom`` pages are left.

        ``new_tokens`` is one count for all sequences, or a list; without ``sequences``, the lengths of new ones.
        """
        counts = [new_tokens] if isinstance(new_tokens, int) else list(new_tokens)
        if sequences is not None:
            counts = counts * len(sequences) if isinstance(new_tokens, int) else counts
            if len(counts) != len(sequences):
                raise ArgumentError("kv_pool", "new_tokens", f"{len(sequences)} counts, one a sequence", len(counts))
        with self._locked():
            if sequences is None:
                needed = sum(self._pages_for(count) for count in counts)
            else:
                needed = self._missing(sequences, counts)
            return self.pages.can_take(needed + headroom)

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def _missing(self, sequences: Sized[Sequence], counts: Sized[int]) -> int:
        """Pages that a step of these sequences takes."""
        writers: Counter[int] = Counter()
        needed = 0
        for sequence, count in zip(sequences, counts, strict=True):
            name = self._known(sequence)
            held, length = self.pages.pages_of(name), sequence.length
            needed += max(0, self._pages_for(length + count) - len(held))
            if count and self.pages.copies_tail(name):
                tail = held[length // self.page_size]
                # The last holder of a page keeps it, unless an open step may read it.
                if self.pages.references(tail) - writers[tail] > 1 or len(self._epochs):
                    writers[tail] += 1
                    needed += 1
        return needed

    def watch(self, low: float, high: float, tell: Callable[[PoolStats], object]) -> None:
        """Call ``tell`` when the share of pages that could be given out falls below ``low``, and when it is back.

        Back is above ``high``. It is called by the method that made it so, with the pool's lock held. Raises
        `ArgumentError` unless 0 <= low <= high <= 1.
        """
        if not 0 <= low <= high <= 1:
            raise ArgumentError("kv_pool", "low", "0 <= low <= high <= 1", f"{low} and {high}")
        with self._locked():
            self._watchers.append(Watermarks(low, high, tell))
            self._look_at_pressure()

    def _look_at_pressure(self) -> None:
        for each in self._watchers:
            wanted = each.high if each.low_now else each.low
            enough = self.pages.can_take(max(0, int(wanted * self.n_pages)))
            if enough == each.low_now:
                each.low_now = not enough
                each.tell(self._stats())

    def evict(self) -> None:
        """Forget the prefix cache: pages that nobody else holds are free."""
        with self._locked():
            self.prefixes.clear()
            for sequence in self._sequences:
                sequence.chain.clear()
            self._after()

    # Swapping.

    def swap_out(self, sequence: Sequence, path: str | Path | None = None) -> None:
        """Move a sequence's rows to host memory, or to a file, and give its pages back.

        They are given back once the rows are safe: whatever fails or is killed before, the sequence or what was in the
        file is as it was. Raises OSError, and `PoolBusyError` while a step of this sequence is open.
        """
        with self._locked():
            name = self._known(sequence)
            self._check_at_rest(sequence)
            held = self.pages.pages_of(name)[: self._pages_for(sequence.length)]
            taken = swap.take(self.storage, held, sequence.length, sequence.tokens[:])
            if path is not None:
                taken = swap.save(taken, Path(path))
            sequence.swapped = taken
            self.pages.close_sequence(name)
            sequence.name = NOWHERE
            sequence.chain.clear()
            self._after()

    def swap_in(self, sequence: Sequence) -> None:
        """Bring a sequence back. Raises `SwapError` if its rows are not what they were."""
        with self._locked():
            if sequence.swapped is None or sequence.books is not self.pages:
                raise ArgumentError("kv_pool", "sequence", "a swapped sequence of this pool", sequence)
            holder = self._bring(sequence.swapped, list(sequence.swapped.read()))
            sequence.name, sequence.chain, sequence.swapped = holder.name, holder.chain, None
            self._forget(holder)

    def restore(self, path: str | Path) -> Sequence:
        """A sequence that any pool of the same layers and page size swapped to a file. Raises `SwapError`."""
        with self._locked():
            found = swap.load(Path(path))
            return self._bring(found, found.pages)

    def _bring(self, swapped: swap.Swapped, pages: Sized[bytes]) -> Sequence:
        """A sequence with the rows of these pages."""
        if swapped.layout != swap.layout_of(self.storage):
            raise SwapError(f"the rows are of another pool, whose pages and layers are {swapped.layout}")
        holder = self._sequence(self.pages.open_sequence(), swapped.tokens, [], 0)
        try:
            with self.step([holder], swapped.length):
                for page, data in zip(self.pages.pages_of(holder.name), pages, strict=True):
                    self.storage.write(page, data)
        except BaseException:
            self.release(holder)
            raise
        return holder

    # Compaction.

    def compact_(self) -> int:
        """Move rows so that the used pages are the first ones; how many pages were moved.

        Rows are copied to free pages before any table changes, and then all tables change together. Tensors of a step
        follow at the next step. Raises `PoolBusyError` while a step is open.
        """
        with self._locked():
            moves = self.pages.plan_moves()
            if moves is None:
                raise PoolBusyError(f"pages cannot be moved while {len(self._epochs)} steps are open")
            self.storage.copy(moves)
            self.pages.move(moves)
            self.prefixes.move(moves)
            self._after()
            return len(moves)

    # Observing.

    def stats(self) -> PoolStats:
        """Numbers of this moment. Takes time in the number of pages."""
        with self._locked():
            return self._stats()

    def _stats(self) -> PoolStats:
        found = (self.prefixes.looked_up, self.prefixes.found, self.prefixes.collisions)
        living = sum(each.name != NOWHERE for each in self._sequences)
        return stats.gather(self.pages.counts(), self.storage, living, len(self._epochs), found)

    def explain(self) -> str:
        """The same in words."""
        arena = self._arena
        return stats.explain(self.stats(), self.storage) + (f"\n{arena.explain()}" if arena else "")

    def snapshot(self) -> str:
        """Everything as JSON: `stats`, what each page is, and the sequences with their pages."""
        with self._locked():
            sequences: list[dict[str, Any]] = [
                {"length": each.length, "cached": each.cached, "tokens_known": len(each.tokens), "pages": each.pages}
                for each in self._sequences
                if each.name != NOWHERE
            ]
            kinds = [plot.KINDS[kind] for kind in self.pages.states()]
            found = {"stats": self._stats().as_dict(), "pages": kinds, "sequences": sequences}
        return json.dumps(found)

    def plot(self, path: str | Path) -> None:
        """A map of the pages as ``.svg``, or by matplotlib as ``.png``."""
        with self._locked():
            states, first = self.pages.states(), stats.explain(self._stats(), self.storage).partition("\n")[0]
        plot.draw(states, first, Path(path))

    @contextmanager
    def trace(self) -> Iterator[list[TraceEvent]]:
        """Tell the steps and released pages of the ``with`` block as they change."""
        with self._locked():
            events = self._epochs.start_trace()
        try:
            yield events
        finally:
            with self._locked():
                self._epochs.stop_trace()


class Watermarks:
    """Shares of a pool's pages, and whether fewer than the low one could be given out."""

    def __init__(self, low: float, high: float, tell: Callable[[PoolStats], object]) -> None:
        self.low, self.high, self.tell = low, high, tell
        self.low_now = False
