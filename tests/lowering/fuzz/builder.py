"""Puts a program together step by step, running each: shapes, dtypes and what raises are known at once."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from tests.lowering.fuzz.program import NAMESPACE, Program, Step


class Builder:
    """A program under construction. ``rng`` makes every choice, so that a seed is a program.

    ``sizes`` are the named sizes of the first call. ``varying`` are those that later calls change: code that depends on
    them reads ``x.shape`` instead of a number.
    """

    def __init__(self, rng: random.Random, **sizes: int) -> None:
        self.rng = rng
        self.sizes = sizes
        self.varying: set[str] = set()
        self.setup: list[Step] = []
        self.inputs: list[str] = []
        self.steps: list[Step] = []
        self.scope: dict[str, Any] = {**NAMESPACE, **sizes, "call": 0}
        self.autocast = False
        self._count = 0

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def pick(self, *choices: Any) -> Any:
        return self.rng.choice(choices)

    def number(self, size: str) -> int:
        """A size at the first call, given by its name or written as a number."""
        return self.sizes[size] if size in self.sizes else int(size)

    def input(self, code: str, name: str = "a") -> str:
        """An input made by ``code``, which may name sizes and inputs before it."""
        name = self._new(name)
        self.scope[name] = eval(code, self.scope)
        self.setup.append(Step(name, code))
        self.inputs.append(name)
        return name

    def let(self, code: str, name: str = "x") -> str:
        """A variable of the program. Raises what the code raises, and then leaves the program as it was."""
        name = self._new(name)
        step = Step(name, code)
        self._run(step)
        self.steps.append(step)
        return name

    def define(self, name: str, code: str) -> str:
        """A function of the program; ``code`` has ``NAME`` where its name goes."""
        name = self._new(name)
        step = Step(name, code.replace("NAME", name))
        self._run(step)
        self.steps.append(step)
        return name

    def do(self, code: str) -> None:
        """A statement."""
        step = Step("", code)
        self._run(step)
        self.steps.append(step)

    def attempt(self, code: str, name: str = "x") -> str | None:
        """`let`, or None if it raises."""
        try:
            return self.let(code, name)
        except Exception:
            return None

    def _run(self, step: Step) -> None:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.autocast):
            exec("\n".join(step.render()), self.scope)

    def _new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}{self._count}"

    def __getitem__(self, name: str) -> Tensor:
        value: Tensor = self.scope[name]
        return value

    def shape(self, name: str) -> list[int]:
        return list(self[name].shape)

    def size(self, name: str, dim: int) -> str:
        """A size in code: as a number only where no call changes any."""
        if self.varying or self.chance(0.5):
            return f"{name}.shape[{dim}]"
        return str(self[name].shape[dim])

    def finish(self, family: str, outputs: list[str], calls: list[dict[str, int]], **how: Any) -> Program:
        read = {name for step in self.steps for name in step.reads()}.union(outputs)
        inputs = tuple(name for name in self.inputs if name in read)
        setup = tuple(step for step in self.setup if step.name in inputs)
        how["marked"] = tuple(each for each in how.get("marked", ()) if each[0] in inputs)
        returned = tuple(dict.fromkeys(outputs))
        return Program(family, setup, inputs, tuple(self.steps), returned, tuple(calls), autocast=self.autocast, **how)
