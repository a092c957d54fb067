"""Ranks in a row, each with some layers of a model: what they send to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmla_ops.errors import NotDifferentiableError
from flashmla_ops.parallel.collectives import answered

OP = "pipeline_parallel"
#: The tag of a message says what it is.
STATES, RESULTS = 1, 2


class Line:
    """Each rank takes states from the one before and gives its own to the next; the last gives results to all.

    Nobody waits until what it sent has arrived, but for `wait`: what was sent and not received is lost with the line.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.last = dist.get_rank(group), dist.get_world_size(group) - 1
        self.is_first, self.is_last = self.rank == 0, self.rank == self.last
        self._under_way: list[tuple[Any, Tensor]] = []
        self._own: list[Tensor] = []
        self._keeps_logits = False

    def receive_states(self, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """A hook before the first layer: its states are those of the rank before."""
        return self._received(torch.empty_like(args[0]), self.rank - 1, STATES), *args[1:]

    def send_states(self, layer: nn.Module, args: tuple[Any, ...], states: Tensor) -> None:
        """A hook after the last layer."""
        self._send(states, self.rank + 1, STATES)

    def send_logits(self, head: nn.Module, args: tuple[Any, ...], logits: Tensor) -> None:
        """A hook after the last rank's projection to logits."""
        if not self._keeps_logits:
            self._send_to_all(logits)
            self.wait()

    @contextmanager
    def keeping_logits(self) -> Iterator[None]:
        """The last rank's logits stay there, so that it can `give` what it makes of them."""
        self._keeps_logits = True
        try:
            yield
        finally:
            self._keeps_logits = False

    def give(self, result: Tensor) -> None:
        """A result of the last rank for all, itself among them: each takes it by `take`, in the same order."""
        self._send_to_all(result)
        self._own.append(result)

    def take(self, like: Tensor) -> Tensor:
        """The next result of the last rank, which has the shape and the type of ``like``."""
        return self._own.pop(0) if self.is_last else self._received(torch.empty_like(like), self.last, RESULTS)

    def wait(self) -> None:
        """Until all that was sent has arrived."""
        with answered("send", self.group):
            for work, _ in self._under_way:
                work.wait()
        self._under_way.clear()

    def _send_to_all(self, result: Tensor) -> None:
        for rank in range(self.last):
            self._send(result, rank, RESULTS)

    def _send(self, tensor: Tensor, rank: int, tag: int) -> None:
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotDifferentiableError(OP, "model")
        self._under_way = [(work, sent) for work, sent in self._under_way if not work.is_completed()]
        sent = tensor.contiguous()
        with answered("send", self.group):
            self._under_way.append((dist.isend(sent, group=self.group, group_dst=rank, tag=tag), sent))

    def _received(self, tensor: Tensor, rank: int, tag: int) -> Tensor:
        with answered("recv", self.group):
            dist.recv(tensor, group=self.group, group_src=rank, tag=tag)
        return tensor
