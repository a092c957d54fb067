"""What runs the attention kernels of a device, and what is known of calls that came before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.config import Config
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.driver import Grid, Launch, Values
from flashmla_ops.ops.operator import Operator


@dataclass
class Engine:
    """Runs kernels on one device. ``chosen`` remembers what served each sort of call, for `explain`."""

    device: Device
    prepare: Callable[[Config, Grid, Values], Launch]
    chosen: dict[str, str] = field(default_factory=dict)
    #: Calls by `signature`.
    plans: dict[object, Plan] = field(default_factory=dict)

    def run(self, config: Config, grid: Grid, values: Values) -> None:
        """Launch a kernel once."""
        self.prepare(config, grid, values)({name: each for name, each in values.items() if isinstance(each, Tensor)})

    def remember(self, call: str, served: str) -> None:
        """A line a sort of call; a hundred say enough."""
        if len(self.chosen) < 100 or call in self.chosen:
            self.chosen[call] = served


class Unserved(Exception):
    """No kernel takes a call; the message says what is in the way."""


@dataclass(frozen=True)
class Plan:
    """How calls of one signature are served: all but the addresses of their tensors is known."""

    #: Why it is the float64 definition; empty if kernels serve the call.
    reason: str
    config: str = ""
    #: Parameter, argument of the operator, and what it has to go through.
    tensors: tuple[tuple[str, str, Callable[[Tensor], Tensor] | None], ...] = ()
    results: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    workspace: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = ()
    launches: tuple[Launch, ...] = ()
    #: From the arguments and the results of the launches to those of the operator.
    finish: Callable[[Any, Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    def __call__(self, a: Any) -> tuple[Tensor, ...]:
        made = {name: a.q.new_empty(shape, dtype=dtype) for name, shape, dtype in (*self.results, *self.workspace)}
        for parameter, name, fix in self.tensors:
            tensor = getattr(a, name)
            made[parameter] = tensor if fix is None else fix(tensor)
        for launch in self.launches:
            launch(made)
        found = [made[name] for name, _, _ in self.results]
        return tuple(found) if self.finish is None else self.finish(a, *found)


def signature(operator: Operator[Any], a: Any) -> object:
    """What a plan depends on: the arguments, with tensors by form and place among 16 bytes."""
    return operator.name, *[
        (each.shape, each.stride(), each.dtype, each.get_device(), each.data_ptr() % 16)
        if isinstance(each, Tensor)
        else each
        for each in vars(a).values()
    ]
