"""Steps that are open, how far each has come, and which released pages still wait for them.

A page that was released waits for the steps that were open then. Its rows in one layer wait only until those steps have
done that layer: a step that goes behind them, layer by layer, may write there while they compute later ones.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from flashmla_ops.errors import ArgumentError
from flashmla_ops.kv_cache.pages import Pages


class Fence(Protocol):
    """Work of a device that was handed over: a recorded ``torch.cuda.Event``, say."""

    def query(self) -> bool:
        """Whether it is done. Does not wait."""
        ...


class TraceEvent(NamedTuple):
    """Something that happened to the pages of a pool."""

    seconds: float  # of `time.perf_counter`
    what: str  # open, layer begins, layer done, rows released, close
    step: int
    layer: int  # -1: all
    pages: tuple[int, ...]


class Epochs:
    """The open steps of one pool, by number. Everything is done under the pool's lock."""

    def __init__(self, pages: Pages, lock: threading.RLock) -> None:
        self._pages = pages
        self.use(lock)
        self._layers_done: dict[int, int] = {}
        self._fences: deque[tuple[int, Fence]] = deque()
        self._trace: list[TraceEvent] | None = None

    def use(self, lock: threading.RLock) -> None:
        """Another lock in place of the pool's."""
        self._changed = threading.Condition(lock)

    def __len__(self) -> int:
        return len(self._layers_done)

    def open(self) -> int:
        number = self._pages.open_step()
        self._layers_done[number] = 0
        self.note("open", number)
        return number

    def close(self, number: int, fence: Fence | None = None) -> None:
        """The step has read all that it will; with a fence, once that is done."""
        if fence is not None:
            self._fences.append((number, fence))
            self.poll()
            return
        del self._layers_done[number]
        self._pages.close_step(number)
        self.note("close", number)
        self._changed.notify_all()

    def poll(self) -> bool:
        """Close the steps whose fences are done, without waiting. Whether there was one."""
        closed = False
        for _ in range(len(self._fences)):
            number, fence = self._fences.popleft()
            if fence.query():
                self.close(number)
                closed = True
            else:
                self._fences.append((number, fence))
        return closed

    @property
    def traced(self) -> bool:
        return self._trace is not None

    def layer_done(self, number: int, layer: int) -> None:
        """The step reads no more of this layer and those before."""
        if number not in self._layers_done:
            raise ArgumentError("kv_pool", "step", "a step that is open", f"step {number}")
        if layer < self._layers_done[number]:
            expected = f"{self._layers_done[number]} or a later one: layers are done in their order"
            raise ArgumentError("kv_pool", "layer", expected, layer)
        self._layers_done[number] = layer + 1
        self.note("layer done", number, layer)
        self._changed.notify_all()

    def released_rows(self, layer: int) -> list[int]:
        """Pages that wait for open steps, all of which have done this layer."""
        waiting = [number for number, done in self._layers_done.items() if done <= layer]
        oldest = min(waiting, default=None)
        return [page for page, step in self._pages.deferred() if oldest is None or step < oldest]

    def ahead_of(self, step: int) -> list[int]:
        """The open steps up to this one."""
        return [number for number in self._layers_done if number <= step]

    def wait(self, numbers: Sequence[int], layer: int, seconds: float) -> bool:
        """Wait until these steps have done a layer, or are closed; whether they have. The lock is free meanwhile."""

        def done() -> bool:
            return all(self._layers_done.get(number, layer + 1) > layer for number in numbers)

        return self._changed.wait_for(done, seconds)

    def start_trace(self) -> list[TraceEvent]:
        """The list that events are appended to from now on."""
        self._trace = []
        return self._trace

    def stop_trace(self) -> None:
        self._trace = None

    def note(self, what: str, step: int, layer: int = -1, pages: Sequence[int] = ()) -> None:
        if self._trace is not None:
            self._trace.append(TraceEvent(time.perf_counter(), what, step, layer, tuple(pages)))


def fence_of(device_type: str) -> Callable[[], Fence | None]:
    """Makes fences behind the work that was handed to a device so far; the CPU needs none."""
    if device_type != "cuda":
        return lambda: None

    def record() -> Any:
        import torch

        event = torch.cuda.Event()
        event.record()
        return event

    return record
