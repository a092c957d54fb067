"""A program's effects, eagerly and compiled, and in what the two differ.

Values may differ by what rounding explains: the program runs again, eagerly, on inputs that are changed in their last
place, and a small multiple of what that changes is allowed. So an ill-conditioned program is allowed more, and results
that jump (an argmax, a comparison) are not compared where they did.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.lowering.fuzz.program import Program
from tests.lowering.fuzz.wide import widened

#: Multiples allowed of what a change of the inputs in their last place does, and of the rounding of the largest value.
CONDITION, ROUNDING, HALF_ROUNDING = 8.0, 64.0, 6.0
#: How often inputs are disturbed, and how often where numbers look wrong.
FEW, MANY = 2, 12
EPSILON, HALF_EPSILON = 2.0**-23, 2.0**-8


@dataclass
class Observation:
    """One call: what it returned or raised, and what it did to its inputs."""

    error: Exception | None = None
    outputs: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    bumped: list[bool] = field(default_factory=list)
    shared: dict[tuple[int, int], int | None] = field(default_factory=dict)
    grads: list[Any] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """Everything that has a value, by a name for it."""
        groups = {"output": self.outputs, "input": self.inputs, "gradient": self.grads}
        return {f"{group} {i}": x for group, values in groups.items() for i, x in enumerate(values)}


@dataclass(frozen=True)
class Difference:
    """``kind`` is what failures are told apart by: "values of output 0", "strides of output 1", "raises"."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


def observe(
    function: Callable[..., Any],
    setup: Callable[..., Any],
    program: Program,
    call: int,
    noise: tuple[int, float] | None = None,
) -> Observation:
    """Run one call. ``noise``: a seed, and the relative change of all inputs that is made with it."""
    inputs = setup(call, **program.arguments(call))
    if noise is not None:
        _disturb([x for x in inputs if isinstance(x, Tensor)], *noise)
    for name, dim in program.marked:
        torch._dynamo.mark_dynamic(inputs[program.inputs.index(name)], dim)
    leaves = [x for x in inputs if program.grad and isinstance(x, Tensor) and x.is_floating_point() and x._base is None]
    for x in leaves:
        x.requires_grad_()
    versions = [x._version if isinstance(x, Tensor) else 0 for x in inputs]
    seen = Observation(inputs=inputs)
    try:
        with torch.set_grad_enabled(program.grad):
            seen.outputs = pytree.tree_leaves(function(*inputs))
            if program.grad:
                seen.grads = _gradients(seen.outputs, leaves)
    except Exception as error:
        seen.error = error
        return seen
    seen.bumped = [isinstance(x, Tensor) and x._version != v for x, v in zip(inputs, versions, strict=True)]
    tensors = [x for x in (*seen.outputs, *inputs) if isinstance(x, Tensor)]
    for (i, x), (j, y) in itertools.combinations(enumerate(tensors), 2):
        if x.numel() and y.numel():
            same = x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr()
            seen.shared[i, j] = y.storage_offset() - x.storage_offset() if same else None
    return seen


def _gradients(outputs: list[Any], leaves: list[Tensor]) -> list[Any]:
    wanted = [x for x in outputs if isinstance(x, Tensor) and x.requires_grad]
    if not wanted:
        return []
    total = sum((x.double().sum() for x in wanted[1:]), wanted[0].double().sum())
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def _epsilon(program: Program) -> float:
    """The last place of the narrowest numbers in a program."""
    half = program.autocast or "float16" in program.text  # bfloat16 too
    return HALF_EPSILON if half else EPSILON


def _disturb(inputs: list[Tensor], seed: int, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    for memory in {x.untyped_storage().data_ptr(): x for x in inputs if x.dtype.is_floating_point}.values():
        if memory.dtype.itemsize > 1:
            flat = torch.empty(0, dtype=memory.dtype).set_(memory.untyped_storage())
            flat.mul_(1 + epsilon * (2 * torch.rand(flat.shape, generator=generator) - 1))


class Expected:
    """The eager program's effects at one call, and how far each value may be from them."""

    def __init__(self, program: Program, call: int, epsilon: float | None = None) -> None:
        setup, function = program.build()
        self.program, self.call = program, call
        self.seen = observe(function, setup, program, call)
        self.epsilon = epsilon or _epsilon(program)
        self.disturbed: list[dict[str, Any]] = []
        self._observe_disturbed(FEW)

    def _observe_disturbed(self, n: int) -> None:
        """Have ``n`` observations with inputs changed in the last place."""
        setup, function = self.program.build()
        for seed in range(len(self.disturbed) + 1, n + 1):
            observation = observe(function, setup, self.program, self.call, (seed, self.epsilon))
            self.disturbed.append(observation.values())

    @cached_property
    def wide(self) -> Expected | None:
        """The same in float32."""
        program = widened(self.program)
        return None if program is None else Expected(program, self.call, EPSILON)

    def differences(self, actual: Observation) -> list[Difference]:
        found = self._differences(actual)
        if any(each.kind.startswith("values") for each in found) and len(self.disturbed) < MANY:
            # Few changes of inputs reach scores of thousands, which are rounded coarsely: more show what rounding does.
            self._observe_disturbed(MANY)
            found = self._differences(actual)
        return found

    def _differences(self, actual: Observation) -> list[Difference]:
        expected = self.seen
        if expected.error is not None or actual.error is not None:
            return _errors(expected.error, actual.error)
        if len(expected.outputs) != len(actual.outputs):
            return [Difference("outputs", f"{len(actual.outputs)}, not {len(expected.outputs)}")]
        found: list[Difference] = []
        others = actual.values()
        for name, value in expected.values().items():
            found += self._value(name, value, others.get(name))
        if expected.bumped != actual.bumped:
            found.append(Difference("version counters", f"bumped {actual.bumped}, not {expected.bumped}"))
        if expected.shared != actual.shared:
            pairs = [p for p in expected.shared if expected.shared[p] != actual.shared.get(p)]
            text = ", ".join(f"{p}: {actual.shared.get(p)}, not {expected.shared[p]}" for p in pairs)
            found.append(Difference("aliasing", text))
        return found

    def _value(self, name: str, expected: Any, actual: Any) -> list[Difference]:
        if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
            same = type(expected) is type(actual) and bool(expected == actual)
            return [] if same else [Difference(f"value of {name}", f"{actual}, not {expected}")]
        if actual.dtype != expected.dtype:
            return [Difference(f"dtype of {name}", f"{actual.dtype}, not {expected.dtype}")]
        if actual.shape != expected.shape:
            # What is selected by numbers that overflowed has the shape that it has in float32.
            right = self._right_in_float32(name, _exact(actual)).all()
            return [] if right else [Difference(f"shape of {name}", f"{actual.shape}, not {expected.shape}")]
        found = []
        if not name.startswith("gradient") and (ours := seen_strides(actual)) != (theirs := seen_strides(expected)):
            found.append(Difference(f"strides of {name}", f"{ours}, not {theirs}"))
        allowed = self._tolerance(name, expected)
        if allowed is None:
            return found
        a, e = (_exact(x) for x in (actual, expected))
        wrong = ~((a == e) | ((a - e).abs() <= allowed) | (a.isnan() & e.isnan()))
        if (overflowed := wrong & ~e.isfinite() & a.isfinite()).any():
            wrong &= ~(overflowed & self._right_in_float32(name, a))
        if wrong.any():
            error = (a - e).abs()[wrong].max().item()
            text = f"{int(wrong.sum())} of {wrong.numel()} wrong, error {error:.3g}, allowed {allowed:.3g}"
            found.append(Difference(f"values of {name}", text))
        return found

    def _right_in_float32(self, name: str, actual: Tensor) -> Tensor:
        """Where the program gives these numbers in float32, up to the rounding of float16."""
        right = None if self.wide is None else self.wide.seen.values().get(name)
        if self.wide is None or not isinstance(right, Tensor) or right.shape != actual.shape:
            return torch.zeros((), dtype=torch.bool)
        allowed = self.wide._tolerance(name, right)
        r = _exact(right)
        if allowed is None:
            return torch.zeros((), dtype=torch.bool)
        finite = r[r.isfinite()].abs()
        allowed += HALF_ROUNDING * self.epsilon * float(finite.max() if finite.numel() else 0)
        return (actual - r).abs() <= allowed

    def _tolerance(self, name: str, expected: Tensor) -> float | None:
        """None where the value is not compared, since a change in the last place of an input turns it upside down."""
        e = _exact(expected)
        finite = e[e.isfinite()].abs()
        half = self.epsilon > 1e-3
        rounding = (HALF_ROUNDING if half else ROUNDING) * self.epsilon * float(finite.max() if finite.numel() else 0)
        if not expected.dtype.is_floating_point:
            rounding = 0.0
        for values in self.disturbed:
            other = values.get(name)
            if not isinstance(other, Tensor) or other.shape != expected.shape:
                return None
            d = _exact(other)
            if not torch.equal(d.isfinite(), e.isfinite()):
                return None
            change = (d - e).abs()[e.isfinite()]
            if change.numel() and (largest := float(change.max())) > 0:
                if not expected.dtype.is_floating_point:
                    return None
                rounding = max(rounding, CONDITION * largest)
        return rounding


def _exact(x: Tensor) -> Tensor:
    return x.detach().double()


def seen_strides(x: Tensor) -> list[int]:
    """The strides that matter: a tensor without elements has none, nor has a dimension of one."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def _errors(expected: Exception | None, actual: Exception | None) -> list[Difference]:
    if expected is None:
        return [Difference("raises", describe(actual))]
    if actual is None:
        return [Difference("does not raise", describe(expected))]
    if type(expected) is not type(actual):
        return [Difference("raises another error", f"{describe(actual)}; eager: {describe(expected)}")]
    return []


def describe(error: Exception | None) -> str:
    lines = [line for line in str(error).strip().splitlines() if line and not line.startswith("backend=")] or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"
