"""A pool's memory, sequences and steps; `pool.KVPool` adds what a server asks of one."""

from __future__ import annotations

import bisect
import contextlib
import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Sized
from contextlib import contextmanager
from operator import index
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError, OutOfPagesError, PoolBusyError
from flashmla_ops.kv_cache.epochs import Epochs, fence_of
from flashmla_ops.kv_cache.pages import new_pages
from flashmla_ops.kv_cache.prefix import PrefixCache
from flashmla_ops.kv_cache.sequence import NOWHERE, Sequence
from flashmla_ops.kv_cache.sizes import n_bytes
from flashmla_ops.kv_cache.step import Step, StepTensors
from flashmla_ops.kv_cache.storage import Layer, Storage, common_page_size, fitting_pages, layer_of, progress_bar
from flashmla_ops.kv_cache.tables import OutOfPages

#: A step that waits for others looks so often, in seconds, whether one was lost.
PATIENCE = 0.1
#: All pools, for a fork.
_POOLS: weakref.WeakSet[PagePool] = weakref.WeakSet()


class PagePool:
    """Pages for the rows of every layer, shared by all sequences; one block table serves all layers.

    Every method either succeeds, or raises and changes nothing; several threads may call them at once. A method that
    gives out pages raises `OutOfPagesError` where there are too few.
    """

    def __init__(
        self,
        layers: int = 1,
        *,
        n_pages: int | None = None,
        memory: int | str | None = None,
        page_size: int | Sized[int] = 64,
        format: str | Sized[str] = "native",
        d: int | tuple[int, int] | Sized[int | tuple[int, int] | None] | None = None,
        h_kv: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        preallocate: bool = False,
        max_batch: int = 256,
        max_length: int | None = None,
        poison: bool = False,
        workspace: int | str = "1GiB",
    ) -> None:
        """``n_pages`` pages, or as many as ``memory`` holds (bytes, or text such as "8GiB").

        A page has ``page_size`` tokens, with their rows in all layers: ``d`` elements of ``dtype`` (a pair for caches
        of two tensors), or rows of a quantised ``format``. ``page_size``, ``format`` and ``d`` may be lists, an entry
        for each layer; a page of the pool has as many tokens as all of these sizes divide. With ``layers=0`` the pool
        keeps the books alone, until `add_layer`.

        Memory comes as it is written; ``preallocate`` takes all of it now. ``max_batch`` and ``max_length`` (tokens of
        a sequence; None: all that there are) size the tensors of a step; a larger batch gets others. With ``poison``,
        released pages are filled with NaN, so that whoever reads them is found out. ``workspace`` is the most that
        `KVPool.allocator` gives to torch's own tensors. Raises `ArgumentError`.
        """
        self.workspace = n_bytes("kv_pool", "workspace", workspace)
        kinds = _layers(layers, page_size, format, d, h_kv, dtype)
        sizes = [kind.page_size for kind in kinds] or ([page_size] if isinstance(page_size, int) else list(page_size))
        self.page_size = common_page_size(sizes)
        for name, size in (("page_size", self.page_size), ("max_batch", max_batch), ("max_length", max_length or 1)):
            if size < 1:
                raise ArgumentError("kv_pool", name, "at least 1", size)
        page_bytes = sum(kind.token_bytes for kind in kinds) * self.page_size
        self.n_pages = fitting_pages(n_pages, memory, page_bytes)
        self.device = None if device is None else torch.device(device)
        self.max_batch, self.max_length, self.poison = max_batch, max_length, poison
        self.storage = Storage(self.n_pages, self.page_size, self.device)
        self.pages = new_pages(self.n_pages, self.page_size)
        self.prefixes = PrefixCache(self.pages)
        self._lost_sequences: deque[int] = deque()
        self._sequences: weakref.WeakSet[Sequence] = weakref.WeakSet()
        self._begin()
        for kind in kinds:
            self._add(kind)
        if poison:
            self.pages.watch()
        if preallocate and kinds:
            self.storage.touch(progress_bar())
            if poison:
                self.storage.poison(range(self.n_pages))

    def _begin(self) -> None:
        """Make the parts that a copy of a pool has anew."""
        self._lock = threading.RLock()
        self._epochs = Epochs(self.pages, self._lock)
        self._running: dict[int, tuple[Sequence, ...]] = {}
        self._lost_steps: deque[Step] = deque()
        #: Tensors that no open step has, the oldest first.
        self._idle: list[StepTensors] = []
        self._made = self._fitting = 0
        self._fence = fence_of(self.device.type if self.device else "cpu")
        _POOLS.add(self)

    # Layers.

    def add_layer(
        self,
        d: int | tuple[int, int] | None = None,
        *,
        format: str = "native",
        page_size: int | None = None,
        h_kv: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> int:
        """A slab for another layer, whose number is returned; arguments as the pool's. Raises `ArgumentError`.

        A graph that torch.compile traces makes slabs too, for a cache that is filled for the first time. It cannot take
        the lock, and its thread is then the only one that has the pool.
        """
        lock = contextlib.nullcontext() if torch.compiler.is_compiling() else self._locked()
        with lock:
            if device is not None and not self.storage.layers:
                self._use_device(torch.device(device))
            self._add(layer_of(format, d, page_size or self.page_size, h_kv, dtype))
            return len(self.storage.layers) - 1

    def _add(self, layer: Layer) -> None:
        self.storage.add(layer)
        self._idle, self._fitting = [], self._made  # they may lack a table
        if self.poison:
            self.storage.poison(range(self.n_pages), len(self.storage.layers) - 1)

    def _use_device(self, device: torch.device) -> None:
        self.device = self.storage.device = device
        self._fence, self._idle, self._fitting = fence_of(device.type), [], self._made

    def cache(self, layer: int = 0) -> Tensor:
        """The cache of a layer, ``[n_pages, page_size, h_kv, d]``; of two tensors the first."""
        return self.storage.caches(layer)[0]

    def caches(self, layer: int = 0) -> tuple[Tensor, ...]:
        """The one or two tensors of a layer."""
        return self.storage.caches(layer)

    def replace_slabs(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put others in place of the slabs, as ``Module.to`` does with buffers. Raises `PoolBusyError`."""
        with self._locked():
            self._check_idle("slabs cannot be replaced")
            self.storage.replace(change)
            if self.storage.slabs:
                self._use_device(self.storage.slabs[0][0].device)

    # Sequences.

    def open(self, tokens: Iterable[int] | Tensor | None = None) -> Sequence:
        """A sequence that begins with what the prefix cache has of ``tokens``; ``pending`` of them are to be computed.

        Takes no page that is free. Without tokens it is empty, and no part of the prefix cache.
        """
        if isinstance(tokens, Tensor):
            if tokens.dim() != 1:
                raise ArgumentError("kv_pool", "tokens", "one sequence's ids, [tokens]", list(tokens.shape))
            tokens = tokens.tolist()
        known = array("q", () if tokens is None else tokens)
        with self._locked():
            name, length, chain = self.prefixes.open(known)
            return self._sequence(name, known, chain, length)

    def fork(self, parent: Sequence) -> Sequence:
        """A sequence with the tokens of ``parent``, in the same pages: a page is copied when one of both writes it.

        Raises `PoolBusyError` while a step of ``parent`` is open, which may have rows to write yet.
        """
        with self._locked():
            name = self._known(parent)
            self._check_at_rest(parent)
            name = self.pages.fork(name)
            return self._sequence(name, parent.tokens[:], list(parent.chain), parent.cached)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Keep the first ``length`` tokens, and drop pages that only held others or were reserved."""
        with self._locked():
            self.pages.truncate(self._known(sequence), length)
            del sequence.tokens[length:], sequence.chain[length // self.page_size :]
            self._after()

    def release(self, sequence: Sequence) -> None:
        """Forget a sequence, swapped ones too. Its pages are handed out again when no open step can read them."""
        with self._locked():
            if sequence.swapped is not None:
                sequence.swapped = None
                return
            self.pages.close_sequence(self._known(sequence))
            self._forget(sequence)
            self._after()

    def reserve(self, sequence: Sequence, tokens: int) -> None:
        """Pages for so many more tokens of a sequence, so that its next steps cannot lack any."""
        with self._locked():
            try:
                self.pages.reserve(self._known(sequence), tokens)
            except OutOfPages as error:
                raise self._out_of_pages(error.needed) from None
            self._after()

    def _sequence(self, name: int, tokens: array[int], chain: list[Any], cached: int) -> Sequence:
        made = Sequence(self.pages, self._lost_sequences, name, tokens, chain, cached)
        self._sequences.add(made)
        return made

    def _known(self, sequence: Sequence) -> int:
        if sequence.books is not self.pages:
            raise ArgumentError("kv_pool", "sequence", "a sequence of this pool", "another pool's")
        return sequence.known()

    def _forget(self, sequence: Sequence) -> None:
        sequence.name = NOWHERE
        self._sequences.discard(sequence)

    # Steps.

    def step(self, sequences: Sized[Sequence], new_tokens: int | Sized[int] = 1, *, behind: bool = False) -> Step:
        """Room for ``new_tokens`` more tokens in each sequence, or in each as many as a list says; all or none.

        The step is open from now on. Its tensors are the same objects every time for one batch size, unless another
        step is open. With ``behind``, it may get pages that open steps can still read: it must then enter
        `Step.layer` for every layer, which waits for those steps to have done that layer.
        """
        b = len(sequences)
        given: Any = new_tokens  # anything with a length, or that is an integer
        counts = [index(count) for count in given] if hasattr(given, "__len__") else index(given)
        if isinstance(counts, int):
            least, tokens = counts, b * counts
        else:
            least, tokens = min(counts, default=0), sum(counts)
            if len(counts) != b:
                raise ArgumentError("kv_pool", "new_tokens", f"{b} counts, one a sequence", len(counts))
        if least < 0:
            raise ArgumentError("kv_pool", "new_tokens", "at least 0", least)
        with self._locked():
            tensors, books = self._tensors(b), self.pages
            tensors.host.sequences[:b] = [each.name if each.books is books else NOWHERE for each in sequences]
            tensors.host.counts[:b] = counts
            try:
                copies, last_reader = books.step(tensors.host, b, behind)
            except OutOfPages as error:
                raise self._out_of_pages(error.needed) from None
            self._idle.remove(tensors)
            step = Step(self, self._lost_steps, self._epochs.open(), tuple(sequences), tensors)
            self._running[step.number] = step.sequences
            try:
                step.show(tokens)
                if last_reader and (ahead := self._epochs.ahead_of(last_reader)):
                    step.ahead, step.late_copies = ahead, copies
                    step.late_pages = books.freed() if self.poison else []
                else:
                    if self.poison:
                        self._after()
                    self.storage.copy(copies)
            except BaseException:
                self.close_step(step, written=False)
                raise
            self._look_at_pressure()
            return step

    def close_step(self, step: Step, *, written: bool | None) -> None:
        """`Step.close` and its ``with`` block come here. ``written`` None: nobody knows."""
        with self._locked():
            step.is_open = False
            tables, b = step.tensors.host, len(step.sequences)
            try:
                if written:
                    for i in self.pages.commit(tables, b):
                        self._remember(step.sequences[i])
                elif written is not None:
                    self.pages.roll_back(tables, b)
            finally:
                del self._running[step.number]
                self._give_back(step.tensors)
                self._epochs.close(step.number, self._fence())
                self._after()

    def _remember(self, sequence: Sequence) -> None:
        """The full pages of a sequence whose tokens are known, in the prefix cache."""
        if sequence.tokens and sequence.name != NOWHERE:
            written = self.pages.written(sequence.name)
            self.prefixes.add(sequence.tokens, sequence.chain, self.pages.pages_of(sequence.name), written)

    def begin_layer(self, step: Step, layer: int) -> None:
        """`Step.layer` begins."""
        with self._locked():
            if step.ahead:
                # One of them may be lost, or be waiting for its device: that is noticed here.
                while not self._epochs.wait(step.ahead, layer, PATIENCE):
                    self._settle()
                if self.poison:
                    self.storage.poison(step.late_pages, layer)
                self.storage.copy(step.late_copies, layer)
            self._epochs.note("layer begins", step.number, layer)

    def end_layer(self, step: Step, layer: int) -> None:
        """`Step.layer` ends, or `Step.layer_done`."""
        with self._locked():
            if not 0 <= layer < max(1, len(self.storage.layers)):
                raise ArgumentError("kv_pool", "layer", f"a layer in [0, {len(self.storage.layers)})", layer)
            self._epochs.layer_done(step.number, layer)
            told = self.poison or self._epochs.traced
            if told and (released := self._epochs.released_rows(layer)):
                self._epochs.note("rows released", step.number, layer, released)
                if self.poison:
                    self.storage.poison(released, layer)

    def _tensors(self, b: int) -> StepTensors:
        """Those that have been used most, of those that no open step has."""
        for tensors in self._idle:
            if tensors.rows >= b:
                return tensors
        rows = max(self.max_batch, 1 << max(0, b - 1).bit_length())
        longest = self.n_pages if self.max_length is None else -(-self.max_length // self.page_size)
        most_pages, most_tokens = min(longest, self.n_pages), self.n_pages * self.page_size
        parts = [self.storage.parts(layer) for layer in self.storage.layers]
        self._made += 1
        self._give_back(StepTensors(self._made, rows, most_pages, most_tokens, parts, self.device))
        return self._idle[-1]

    def _give_back(self, tensors: StepTensors) -> None:
        if tensors.number > self._fitting:
            bisect.insort(self._idle, tensors, key=lambda each: each.number)

    # Before and after every method.

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The lock, and the pool without what was lost."""
        with self._lock:
            self._settle()
            yield

    def _settle(self) -> None:
        """Close steps and sequences that nobody has any more, and steps whose device is done."""
        while self._lost_steps:
            self.close_step(self._lost_steps.popleft(), written=None)
        if self._lost_sequences:
            while self._lost_sequences:
                self.pages.close_sequence(self._lost_sequences.popleft())
            self._after()
        if self._epochs.poll():
            self._after()

    def _after(self) -> None:
        """Where pages may have come to be free."""
        if self.poison:
            self.storage.poison(self.pages.freed())
        self._look_at_pressure()

    def _look_at_pressure(self) -> None:
        """For who wants to know."""

    def _check_at_rest(self, sequence: Sequence) -> None:
        if any(sequence in running for running in self._running.values()):
            raise PoolBusyError("a sequence cannot be forked or swapped out while a step of it is open")

    def _check_idle(self, what: str) -> None:
        if len(self._epochs):
            raise PoolBusyError(f"{what} while {len(self._epochs)} steps are open")

    def _out_of_pages(self, needed: int) -> OutOfPagesError:
        counts = self.pages.counts()
        return OutOfPagesError(
            needed,
            free=counts.free,
            evictable=counts.evictable,
            deferred=counts.deferred,
            reserved=counts.reserved,
            n_pages=self.n_pages,
        )

    def __getstate__(self) -> dict[str, Any]:
        """For `copy.deepcopy`, which gives the copy rows of its own. Raises `PoolBusyError` while a step is open."""
        with self._locked():
            self._check_idle("a pool cannot be copied")
            mine = ("_lock", "_epochs", "_running", "_lost_steps", "_idle", "_fence", "_watchers", "_arena")
            return {name: value for name, value in vars(self).items() if name not in mine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._begin()


def _layers(
    layers: int,
    page_size: int | Sized[int],
    format: str | Sized[str],
    d: int | tuple[int, int] | Sized[int | tuple[int, int] | None] | None,
    h_kv: int,
    dtype: torch.dtype | None,
) -> list[Layer]:
    """Each layer, from the arguments of a pool. Raises `ArgumentError`."""
    if layers < 0:
        raise ArgumentError("kv_pool", "layers", "at least 0", layers)

    def each(name: str, given: Any, kind: type | tuple[type, ...]) -> list[Any]:
        if isinstance(given, kind):
            return [given] * layers
        if len(given) != layers:
            raise ArgumentError("kv_pool", name, f"{layers} of them, one a layer", len(given))
        return list(given)

    sizes, formats = each("page_size", page_size, int), each("format", format, str)
    widths = each("d", d, (int, tuple, type(None)))
    return [layer_of(*kind, h_kv, dtype) for kind in zip(formats, widths, sizes, strict=True)]


def _renew_locks() -> None:
    """In the child of a fork, where a thread that held a lock does not exist."""
    for pool in list(_POOLS):
        pool._lock = threading.RLock()
        pool._epochs.use(pool._lock)


os.register_at_fork(after_in_child=_renew_locks)
