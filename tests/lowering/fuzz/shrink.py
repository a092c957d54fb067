"""The smallest program that still fails in the same way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from tests.lowering.fuzz.check import Outcome
from tests.lowering.fuzz.program import Program, Step

Check = Callable[[Program, str], Outcome]


def shrink(program: Program, mode: str, failure: Outcome, check: Check, seconds: float = 300.0) -> Program:
    """Try simpler programs for as long as one fails as ``failure`` did, or the time is over."""
    end = time.monotonic() + seconds
    progress = True
    while progress and time.monotonic() < end:
        progress = False
        for simpler in simplifications(program):
            if time.monotonic() > end:
                break
            outcome = check(simpler, mode)
            if outcome.failed and (outcome.kind, _kind(outcome.what)) == (failure.kind, _kind(failure.what)):
                program, progress = simpler, True
                break
    return program


def _kind(what: str) -> str:
    """Without numbers, which change as outputs and nodes go away."""
    return re.sub(r"\d+", "", what)


def simplifications(program: Program) -> Iterator[Program]:
    """Programs that are a little simpler, those that save most first. They need not run."""
    for index in range(len(program.outputs)):
        if len(program.outputs) > 1:
            yield tidy(program.but(outputs=program.outputs[:index] + program.outputs[index + 1 :]))
    if len(program.calls) > 1:
        yield program.but(calls=program.calls[:1], marked=())
        yield program.but(calls=program.calls[:-1])
    for name, plain in (
        ("traced", False),
        ("grad", False),
        ("autocast", False),
        ("dynamic", None),
        ("fullgraph", True),
        ("options", {}),
    ):
        if getattr(program, name) != plain:
            yield program.but(**{name: plain})
    if program.marked:
        yield program.but(marked=())
    values = program.values()
    for index in reversed(range(len(program.steps))):
        yield from _without(program, index, values)
    for index in range(len(program.setup)):
        yield from _plainer_input(program, index)
    yield from _smaller(program)


def tidy(program: Program) -> Program:
    """Without steps and inputs that nothing reads."""
    wanted, kept = set(program.outputs), []
    for step in reversed(program.steps):
        if not step.name or step.name in wanted:
            kept.append(step)
            wanted |= step.reads()
    inputs = tuple(name for name in program.inputs if name in wanted)
    needed, setup = set(inputs), []
    for step in reversed(program.setup):
        if step.name in needed:
            setup.append(step)
            needed |= step.reads()
    marked = tuple(each for each in program.marked if each[0] in inputs)
    return program.but(steps=tuple(kept[::-1]), setup=tuple(setup[::-1]), inputs=inputs, marked=marked)


def _without(program: Program, index: int, values: dict[str, object]) -> Iterator[Program]:
    """A step gone; or the value it made as an input; or what it read in its place."""
    step = program.steps[index]
    before, after = program.steps[:index], program.steps[index + 1 :]
    if not step.name:
        yield tidy(program.but(steps=before + after))
        return
    value = values.get(step.name)
    if isinstance(value, Tensor) and len(program.calls) == 1:
        made = Step(step.name, _literal(value))
        yield tidy(program.but(steps=before + after, setup=(*program.setup, made), inputs=(*program.inputs, step.name)))
    defined = {each.name for each in (*before, *program.setup)}
    for other in sorted(step.reads() & defined):
        yield tidy(
            program.but(
                steps=before + _renamed(after, step.name, other),
                outputs=tuple(other if name == step.name else name for name in program.outputs),
            )
        )


def _renamed(steps: tuple[Step, ...], old: str, new: str) -> tuple[Step, ...]:
    pattern = re.compile(rf"(?<![\w.]){old}\b")
    return tuple(Step(step.name, pattern.sub(new, step.code)) for step in steps)


def _literal(value: Tensor) -> str:
    """Code for a tensor like this one: random numbers in the same layout; the same values where it holds no floats."""
    dtype = f"dtype={value.dtype}"
    if not value.dtype.is_floating_point:
        return f"torch.tensor({value.tolist()}, {dtype})"
    if value.is_contiguous():
        return f"torch.randn({tuple(value.shape)}, {dtype})"
    length = 1 + sum((n - 1) * step for n, step in zip(value.shape, value.stride(), strict=True))
    return f"torch.randn({length}, {dtype}).as_strided({tuple(value.shape)}, {value.stride()})"


def _plainer_input(program: Program, index: int) -> Iterator[Program]:
    """An input in float32, and without what is done to it."""
    step = program.setup[index]
    for code in (
        step.code.replace("bfloat16", "float32").replace("float16", "float32"),
        re.sub(r"\) \* [\d.]+$", ")", step.code),
    ):
        if code != step.code:
            yield program.but(setup=(*program.setup[:index], Step(step.name, code), *program.setup[index + 1 :]))


def _smaller(program: Program) -> Iterator[Program]:
    """One size less, in every call."""
    for name in program.sizes:
        for change in (lambda n: 1, lambda n: n // 2, lambda n: n - 1):
            calls = tuple(call | {name: change(call[name])} for call in program.calls)
            if all(call[name] > 0 for call in calls) and calls != program.calls:
                yield program.but(calls=calls)
