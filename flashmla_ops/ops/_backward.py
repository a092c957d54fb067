"""How an operator is differentiated: by another operator, its backward, whose names say what it takes and gives.

    argument q, of the backward       an argument, or a result, of the operator: it is saved
    argument dout                     the gradient with respect to the result ``out``; zeros, or None where that is
                                      allowed, if nothing depends on it
    argument wanted                   which results are asked for: bit i is result i; others may be empty
    result dq                         the gradient with respect to the argument ``q``

So `flashmla::prefill_backward` needs no word here. What it does not name has no gradient: an argument that requires one
is refused at the forward, as is an option that the backward does not know, unless it has its default value. A result
without a gradient (``max_logits``) requires none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import _SingleLevelFunction

from flashmla_ops.errors import NotDifferentiableError
from flashmla_ops.ops.check import Check

Kernel = Callable[..., Any]


class Operation(Protocol):
    """What of an `Operator` is read here."""

    name: str
    fields: tuple[str, ...]
    returns: tuple[str, ...]
    arguments: type[Any]
    check: Check

    def bind(self, *args: Any, **kwargs: Any) -> Any: ...


class Differentiation:
    """An operator and its backward; ``ignores`` names arguments that change no result but for rounding."""

    def __init__(self, operator: Operation, backward: Operation, ignores: tuple[str, ...]) -> None:
        self._forward, self._backward = operator, backward
        takes = backward.fields
        defaults = {field.name: field.default for field in dataclasses.fields(operator.arguments)}
        self._saved = tuple(name for name in takes if name in operator.fields)
        self._results = tuple(name for name in operator.returns if name in takes)
        self._unknown = {name: defaults[name] for name in defaults if name not in (*takes, *ignores)}
        self._gradients = tuple(name.removeprefix("d") for name in backward.returns)
        self._optional = {field.name for field in dataclasses.fields(backward.arguments) if "None" in str(field.type)}
        self._incoming = tuple(name for name in operator.returns if f"d{name}" in takes)

    def kernel(self, op: torch._ops.OpOverload) -> Kernel:
        """From the dispatch keys of a call, which arguments require a gradient, and all arguments, to the results."""
        rule = self

        class Differentiated(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, below: Kernel, *args: Any) -> Any:
                results = below(*args)
                rule._save(ctx, rule._forward.bind(*args), results)
                return results

            @staticmethod
            def backward(ctx: Any, *gradients: Any) -> Any:
                return None, *rule._differentiate(ctx, gradients)

        def kernel(keys: Any, asked: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            a = rule._forward.bind(*args, **kwargs)
            rule._require(a, asked)
            return _apply(Differentiated, op, keys, a)

        return kernel

    def _require(self, a: Any, asked: Sequence[str]) -> None:
        """Raise where there is no gradient for an argument that requires one, or not with these options."""
        for name in asked:
            if name not in self._gradients:
                raise NotDifferentiableError(self._forward.check.op, name, "in its backward")
        for name, default in self._unknown.items():
            value = getattr(a, name)
            if value is not default and value != default:
                raise NotDifferentiableError(self._forward.check.op, asked[0], f"with {name}")

    def _save(self, ctx: Any, a: Any, results: Any) -> None:
        given = vars(a) | dict(zip(self._forward.returns, _listed(results), strict=True))
        kept = {name: given[name] for name in (*self._saved, *self._results)}
        ctx.names = [name for name, value in kept.items() if isinstance(value, Tensor)]
        ctx.options = {name: value for name, value in kept.items() if not isinstance(value, Tensor)}
        ctx.save_for_backward(*(kept[name] for name in ctx.names))
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(given[r] for r in self._forward.returns if r not in self._incoming))

    def _differentiate(self, ctx: Any, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The gradient of each argument, from those of the results."""
        given = dict(zip(ctx.names, ctx.saved_tensors, strict=True)) | ctx.options
        for name, gradient in zip(self._forward.returns, gradients, strict=True):
            if name in self._incoming:
                missing = gradient is None and f"d{name}" not in self._optional
                given[f"d{name}"] = torch.zeros_like(given[name]) if missing else gradient
        needed = dict(zip(self._forward.fields, ctx.needs_input_grad[1:], strict=True))
        given["wanted"] = sum(needed[name] << i for i, name in enumerate(self._gradients))
        op = getattr(torch.ops.flashmla, self._backward.name).default
        found = dict(zip(self._gradients, _listed(op(**given)), strict=True))
        return [found[name] if needed[name] else None for name in self._forward.fields]


class Last:
    """The rule of a backward, which has none itself. It is refused when a second derivative is taken.

    Not when one is asked for, as of other operators: `torch.func.grad` asks for one always.
    """

    def __init__(self, operator: Operation) -> None:
        self._operator = operator

    def kernel(self, op: torch._ops.OpOverload) -> Kernel:
        operator = self._operator

        class Once(_SingleLevelFunction):
            @staticmethod
            def forward(ctx: Any, below: Kernel, *args: Any) -> Any:
                return below(*args)

            @staticmethod
            def backward(ctx: Any, *_: Any) -> Any:
                raise NotDifferentiableError(operator.check.op, operator.fields[0], "(a second derivative)")

        def kernel(keys: Any, asked: Sequence[str], *args: Any, **kwargs: Any) -> Any:
            return _apply(Once, op, keys, operator.bind(*args, **kwargs))

        return kernel


def _apply(function: Any, op: torch._ops.OpOverload, keys: Any, a: Any) -> Any:
    """Call a function, not an `autograd.Function`: this is below the transforms of torch.func, for one level of them.

    It gets what runs the operator below autograd. The levels around this one, which come next, find the modes as they
    were: torch has switched derivatives off for the function.
    """
    forward_mode = torch._C._is_fwd_grad_enabled()

    def below(*args: Any) -> Any:
        with torch.enable_grad(), _set_fwd_grad_enabled(forward_mode), torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keys & torch._C._after_autograd_keyset, *args)

    with enable_single_level_autograd_function():
        return function.apply(below, *a.values())


def _listed(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


def check_results(
    check: Check,
    q: Tensor,
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    out_sizes: list[int],
    lse_sizes: list[int],
) -> None:
    """What attention returned, and the gradients with respect to that, as arguments of its backward."""
    check_result(check, "dout", dout, q, out_sizes, q.dtype)
    check_result(check, "out", out, q, out_sizes, q.dtype)
    check_result(check, "lse", lse, q, lse_sizes, torch.float32)
    if dlse is not None:
        check_result(check, "dlse", dlse, q, lse_sizes, torch.float32)


def check_result(check: Check, name: str, tensor: Tensor, q: Tensor, wanted: list[int], dtype: torch.dtype) -> None:
    """A result of attention, or the gradient with respect to one."""
    check.shape(name, tensor, wanted)
    check.dtype(name, tensor, dtype)
    check.device(name, tensor, q)


def wanted_only(gradients: tuple[Tensor, *tuple[Tensor | None, ...]], wanted: int) -> tuple[Tensor, ...]:
    """What a backward returns: nothing in place of what is not wanted, or not there."""
    nothing = gradients[0].new_empty(0)
    return tuple(x if wanted >> i & 1 and x is not None else nothing for i, x in enumerate(gradients))
