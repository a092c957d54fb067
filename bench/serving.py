"""Serving, simulated: requests arrive, get memory for their tokens, grow by one a step and leave.

Only memory is real: a policy decides who fits. Prompts and outputs are log-normal, as in the traces that servers
publish, and some prompts begin with one of a few system prompts.
"""

from __future__ import annotations

import random
import statistics
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from flashmla_ops.errors import OutOfPagesError
from flashmla_ops.kv_cache import KVPool

MAX_LENGTH = 2048  # tokens of a request, prompt and output
SYSTEM_PROMPTS, SYSTEM_TOKENS = 8, 256
#: The traces of the suite ``pool``: requests, tokens of memory, and of each the size of a page and the shared part.
REQUESTS, MEMORY = 400, 1 << 16
TRACES = tuple((page_size, shared) for page_size in (16, 64) for shared in (0.0, 0.5))


@dataclass
class Request:
    """``done`` of ``output`` tokens have been generated behind the prompt."""

    arrival: int  # step
    prompt: list[int]
    output: int
    done: int = 0
    held: Any = None  # the policy's

    @property
    def length(self) -> int:
        return len(self.prompt) + self.done


def trace(requests: int, shared: float, seed: int = 0) -> list[Request]:
    """Requests in the order of their arrival, a ``shared`` part of them with a system prompt."""
    draw = random.Random(seed)
    made, step = [], 0.0
    for number in range(requests):
        step += draw.expovariate(1.0)
        prompt = min(MAX_LENGTH // 2 - SYSTEM_TOKENS, max(1, int(draw.lognormvariate(5.3, 0.9))))
        output = min(MAX_LENGTH // 2, max(1, int(draw.lognormvariate(5.3, 0.7))))
        tokens = [number * MAX_LENGTH + i for i in range(prompt)]
        if draw.random() < shared:
            system = draw.randrange(SYSTEM_PROMPTS) + 1
            tokens = [-system * MAX_LENGTH + i for i in range(SYSTEM_TOKENS)] + tokens
        made.append(Request(int(step), tokens, output))
    return made


class Policy(Protocol):
    """Who gets memory. Amounts are tokens."""

    def admit(self, request: Request) -> bool:
        """Memory for a prompt, if there is enough."""
        ...

    def grow(self, running: Sequence[Request]) -> bool:
        """Memory for another token of every request, or for none."""
        ...

    def release(self, request: Request) -> None: ...
    def memory(self) -> tuple[int, int]:
        """Tokens that lie somewhere, a shared one counted once, and tokens that the memory given out could hold."""
        ...


@dataclass
class Outcome:
    """A simulated trace. Utilisation and contexts are means over the steps in which somebody waited for memory."""

    finished: int = 0
    generated: int = 0
    preempted: int = 0
    steps: int = 0
    utilisation: list[float] = field(default_factory=list)
    contexts: list[int] = field(default_factory=list)  # tokens of all running requests together

    def figures(self) -> dict[str, float]:
        return {
            "utilisation": statistics.fmean(self.utilisation) if self.utilisation else 1.0,
            "context": statistics.fmean(self.contexts) if self.contexts else 0.0,
            "most_context": max(self.contexts, default=0),
            "steps": self.steps,
            "preempted": self.preempted,
        }


def simulate(requests: Sequence[Request], policy: Policy, watch: bool = False) -> Outcome:
    """Serve all requests, first come first served; with ``watch``, look at memory in every step.

    Raises ValueError for a request that all of the memory cannot hold.
    """
    coming = deque(Request(each.arrival, each.prompt, each.output) for each in requests)
    waiting: deque[Request] = deque()
    running: list[Request] = []
    outcome = Outcome()
    while coming or waiting or running:
        while coming and coming[0].arrival <= outcome.steps:
            waiting.append(coming.popleft())
        while waiting and policy.admit(waiting[0]):
            running.append(waiting.popleft())
        if waiting and not running:
            raise ValueError(f"a prompt of {len(waiting[0].prompt)} tokens does not fit into memory")
        while not policy.grow(running):
            if len(running) == 1:
                raise ValueError(f"{running[0].length + 1} tokens do not fit into memory")
            # The one that came last gives way, and begins anew.
            victim = running.pop()
            policy.release(victim)
            victim.done = 0
            waiting.appendleft(victim)
            outcome.preempted += 1
        for request in running:
            request.done += 1
        if watch and waiting:
            stored, given = policy.memory()
            outcome.utilisation.append(stored / given if given else 1.0)
            outcome.contexts.append(sum(request.length for request in running))
        for request in [each for each in running if each.done == each.output]:
            policy.release(request)
            outcome.finished += 1
            outcome.generated += request.done
        running = [each for each in running if each.done < each.output]
        outcome.steps += 1
    return outcome


class Ours:
    """A `KVPool`, books alone."""

    def __init__(self, tokens: int, page_size: int) -> None:
        self.pool = KVPool(layers=0, n_pages=tokens // page_size, page_size=page_size, max_length=MAX_LENGTH)

    def admit(self, request: Request) -> bool:
        sequence = self.pool.open(request.prompt)
        try:
            self.pool.step([sequence], sequence.pending).close()
        except OutOfPagesError:
            self.pool.release(sequence)
            return False
        request.held = sequence
        return True

    def grow(self, running: Sequence[Request]) -> bool:
        try:
            self.pool.step([request.held for request in running]).close()
        except OutOfPagesError:
            return False
        return True

    def release(self, request: Request) -> None:
        self.pool.release(request.held)

    def memory(self) -> tuple[int, int]:
        stats = self.pool.stats()
        return stats.tokens, stats.used * stats.page_size


class Reserved:
    """A contiguous cache of the greatest length for each request."""

    def __init__(self, tokens: int) -> None:
        self.free = tokens // MAX_LENGTH
        self.requests: dict[int, Request] = {}

    def admit(self, request: Request) -> bool:
        if not self.free:
            return False
        self.free -= 1
        self.requests[id(request)] = request
        return True

    def grow(self, running: Sequence[Request]) -> bool:
        return True

    def release(self, request: Request) -> None:
        self.free += 1
        del self.requests[id(request)]

    def memory(self) -> tuple[int, int]:
        return sum(each.length for each in self.requests.values()), len(self.requests) * MAX_LENGTH


class Growing:
    """A contiguous cache for each request, replaced by one of twice the size when it is full; first fit."""

    LEAST = 64

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.blocks: list[tuple[int, int]] = []  # start and size, in order
        self.requests: dict[int, Request] = {}

    def _find(self, size: int) -> int | None:
        edges = [(0, 0), *self.blocks, (self.tokens, 0)]
        return next((a + n for (a, n), (b, _) in pairwise(edges) if b - a - n >= size), None)

    def _take(self, request: Request, size: int) -> bool:
        start = self._find(size)
        if start is None:
            return False
        insort(self.blocks, (start, size))
        if request.held is not None:  # its rows are copied, and then the old block is free
            self.blocks.remove(request.held)
        request.held = (start, size)
        return True

    def admit(self, request: Request) -> bool:
        request.held = None
        size = self.LEAST
        while size < len(request.prompt) + 1:
            size *= 2
        if not self._take(request, size):
            return False
        self.requests[id(request)] = request
        return True

    def grow(self, running: Sequence[Request]) -> bool:
        return all(each.length < each.held[1] or self._take(each, 2 * each.held[1]) for each in running)

    def release(self, request: Request) -> None:
        self.blocks.remove(request.held)
        del self.requests[id(request)]

    def memory(self) -> tuple[int, int]:
        return sum(each.length for each in self.requests.values()), sum(size for _, size in self.blocks)


class Blocks:
    """vLLM's BlockPool, without its prefix cache: ``pool`` has its methods, each block an id."""

    def __init__(self, tokens: int, page_size: int, new: Callable[[int], Any]) -> None:
        self.pool, self.page_size = new(tokens // page_size), page_size
        self.requests: dict[int, Request] = {}

    def admit(self, request: Request) -> bool:
        request.held = []
        if not self._extend(request, len(request.prompt)):
            return False
        self.requests[id(request)] = request
        return True

    def _extend(self, request: Request, length: int) -> bool:
        missing = -(-length // self.page_size) - len(request.held)
        if missing > self.pool.get_num_free_blocks():
            return False
        if missing > 0:
            request.held += self.pool.get_new_blocks(missing)
        return True

    def grow(self, running: Sequence[Request]) -> bool:
        return all(self._extend(each, each.length + 1) for each in running)

    def release(self, request: Request) -> None:
        self.pool.free_blocks(reversed(request.held))
        del self.requests[id(request)]

    def memory(self) -> tuple[int, int]:
        given = sum(len(each.held) for each in self.requests.values())
        return sum(each.length for each in self.requests.values()), given * self.page_size
