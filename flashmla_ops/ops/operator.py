"""What an operator is: its arguments, its contract and its reference, and all that torch must know, derived from them.

    @dataclass
    class Doubled(Arguments):
        x: Tensor  # [n]
        factor: int = 2

    def contract(check: Check, a: Doubled) -> Result:
        check.dims("x", a.x, "[n]")
        return Result([a.x.size(0)], a.x.dtype)

    DOUBLE = Operator("double", Doubled, contract, lambda a: a.x * a.factor, returns=("out",))

From this come the schema ``double(Tensor x, SymInt factor=2) -> Tensor``, the fake (the contract, then empty results),
and the reference as the implementation of every device that has no kernel (the contract, what depends on values, then
the function given). A gradient comes from the operator that is stated as the backward (`_backward`), or is refused, for
all of them in one place (`_autograd`). The rules for vmap, autocast and sharding (`_sharding`) get the arguments by
name. ``with_out`` adds the overload that writes into given tensors.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

import torch
from torch import Tensor

from flashmla_ops.ops import _autocast, _sharding
from flashmla_ops.ops._backward import Differentiation, Last
from flashmla_ops.ops._library import define, differentiate
from flashmla_ops.ops.check import Check, Result, dtype_name

#: An integer on which a graph is specialised. One without this may be symbolic.
Static = Annotated[int, "static"]

_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    Sequence[Tensor]: "Tensor[]",
    int: "SymInt",
    Static: "int",
    bool: "bool",
    str: "str",
    float: "float",
    float | None: "float?",
    torch.dtype: "ScalarType",
    torch.dtype | None: "ScalarType?",
}


@dataclass
class Arguments:
    """The arguments of an operator: the fields of a dataclass, in the order of the schema."""

    def values(self) -> tuple[Any, ...]:
        return tuple(vars(self).values())


A = TypeVar("A", bound=Arguments)
Results = Result | tuple[Result, ...] | None
Contract = Callable[[Check, A], Results]
#: From the number of entries, each argument's mapped dimension by name, and the arguments, to results and dimensions.
Vmap = Callable[[int, dict[str, Any], A], tuple[Any, Any]]
#: From the dtype of autocast and the arguments to those that the operator runs with.
Autocast = Callable[[torch.dtype, A], A]
#: From the arguments, with tensors that have no data, to the ways in which they may be cut for several ranks.
Sharding = Callable[[A], Sequence[_sharding.Way]]


class Operator(Generic[A]):
    """One operator of ``torch.ops.flashmla``, defined when it is made."""

    def __init__(
        self,
        name: str,
        arguments: type[A],
        contract: Contract[A],
        reference: Callable[[A], Any],
        *,
        returns: tuple[str, ...] = (),
        mutates: tuple[str, ...] = (),
        values: Callable[[Check, A], None] | None = None,
        vmap: Vmap[A] | None = None,
        autocast: Autocast[A] | None = None,
        sharding: Sharding[A] | None = None,
    ) -> None:
        """``name`` with its overload: "append_.two". ``returns`` names the results, ``mutates`` what is written.

        ``contract`` raises on what shapes, strides and dtypes decide and returns what the results are; ``values``
        raises on what the values of tensors decide, before the reference runs. ``reference`` returns results of any
        float type and strides: they are rounded to those of the contract. Without ``sharding`` every rank has all.
        """
        self.name, self.arguments, self.contract, self.returns = name, arguments, contract, returns
        self._reference, self._values = reference, values
        self.check = Check(name.partition(".")[0])
        self.fields = tuple(field.name for field in dataclasses.fields(arguments))
        self._inputs = ", ".join(_declared(arguments, mutates))
        self._schema = f"{name}({self._inputs}) -> {_returned(returns)}"
        define(
            self._schema,
            fake=self.fake,
            reference=self.reference,
            vmap=None if vmap is None else self._mapped(vmap),
            autocast=None if autocast is None else self._cast(autocast),
            sharding=self._cut(sharding or (lambda a: ())),
            mutates=mutates,
        )

    def bind(self, *args: Any, **kwargs: Any) -> A:
        return self.arguments(*args, **kwargs)

    def results(self, a: A) -> tuple[Result, ...]:
        """What the operator returns for these arguments. Raises what their shapes, strides and dtypes do not allow."""
        results = self.contract(self.check, a)
        return () if results is None else (results,) if isinstance(results, Result) else results

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """Empty results, as under `FakeTensorMode`."""
        a = self.bind(*args, **kwargs)
        results = self.results(a)
        like = next(tensor for value in a.values() for tensor in _tensors(value))
        return _unpacked([like.new_empty(shape, dtype=dtype) for shape, dtype in results])

    def reference(self, *args: Any, **kwargs: Any) -> Any:
        a = self.bind(*args, **kwargs)
        results = self.results(a)
        if self._values is not None:
            self._values(self.check, a)
        computed = self._reference(a)
        if not results:
            return None
        parts = [computed] if len(results) == 1 else computed
        return _unpacked([part.to(r.dtype).contiguous() for part, r in zip(parts, results, strict=True)])

    def differentiated_by(self, backward: Operator[Any], *, ignores: tuple[str, ...] = ()) -> None:
        """State the operator that computes its gradients (`_backward` says from what, and of what).

        ``ignores`` names arguments that change no result but for rounding.
        """
        differentiate(self._schema, Differentiation(self, backward, ignores))
        differentiate(backward._schema, Last(backward))

    def with_out(self, *, contiguous_rows: tuple[str, ...] = (), in_place: str = "") -> Operator[A]:
        """Define the ``.out`` overload: it writes into tensors given by keyword, and returns nothing.

        ``contiguous_rows`` and ``in_place`` are as in `Check.outs`.

        It is not tagged torch.Tag.out. With the tag, Inductor lowers `decode` to ExternKernelMultiOut, which in torch
        2.13 takes the fake outputs' SymInt sizes for sympy expressions and asserts as soon as a size is dynamic; and
        without it, an operator that returns its arguments cannot be traced.
        """

        def checked(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
            outs = {name: kwargs.pop(name) for name in self.returns}
            a = self.bind(*args, **kwargs)
            self.check.outs(self.results(a), outs, vars(a), contiguous_rows=contiguous_rows, in_place=in_place)
            return outs

        def fake(*args: Any, **kwargs: Any) -> None:
            checked(*args, **kwargs)

        def by_functional(*args: Any, **kwargs: Any) -> None:
            outs = checked(*args, **kwargs)
            inputs = {name: value for name, value in kwargs.items() if name not in outs}
            results = getattr(torch.ops.flashmla, self.name).default(*args, **inputs)
            for out, result in zip(outs.values(), _listed(results), strict=True):
                out.copy_(result)

        outs = ", ".join(f"Tensor({letter}!) {name}" for letter, name in zip("abc", self.returns, strict=False))
        schema = f"{self.name}.out({self._inputs}, *, {outs}) -> ()"
        define(schema, fake=fake, reference=by_functional)
        return self

    def _mapped(self, rule: Vmap[A]) -> Callable[..., tuple[Any, Any]]:
        def mapped(info: Any, in_dims: tuple[Any, ...], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            dims = dict.fromkeys(self.fields) | dict(zip(self.fields, in_dims, strict=False))
            return rule(info.batch_size, dims, self.bind(*args, **kwargs))

        return mapped

    def _cast(self, rule: Autocast[A]) -> _autocast.Rule:
        def cast(dtype: torch.dtype, *args: Any) -> tuple[Any, ...]:
            return rule(dtype, self.bind(*args)).values()

        return cast

    def _cut(self, rule: Sharding[A]) -> _sharding.Cuts:
        def cut(*args: Any, **kwargs: Any) -> Sequence[_sharding.Cut]:
            a = self.bind(*args, **kwargs)
            shapes = {name: r.shape for name, r in zip(self.returns, self.results(a), strict=True)}
            return _sharding.cuts(rule(a), vars(a), shapes)

        return cut


def _declared(arguments: type[Arguments], mutates: tuple[str, ...]) -> list[str]:
    """The arguments as a schema has them."""
    types = typing.get_type_hints(arguments, include_extras=True)
    declared = []
    for field in dataclasses.fields(arguments):
        kind = _TYPES[types[field.name]]
        if field.name in mutates:
            kind += f"({'abc'[mutates.index(field.name)]}!)"
        default = "" if field.default is dataclasses.MISSING else f"={_literal(field.default)}"
        declared.append(f"{kind} {field.name}{default}")
    return declared


def _literal(value: Any) -> str:
    return (
        f'"{value}"' if isinstance(value, str) else dtype_name(value) if isinstance(value, torch.dtype) else str(value)
    )


def _returned(names: tuple[str, ...]) -> str:
    return "Tensor" if len(names) == 1 else f"({', '.join(f'Tensor {name}' for name in names)})"


def _tensors(value: Any) -> list[Tensor]:
    """The tensors of one argument."""
    return [value] if isinstance(value, Tensor) else [*value] if isinstance(value, (list, tuple)) else []


def _listed(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results


def _unpacked(results: Sequence[Any]) -> Any:
    """The results as the caller gets them: nothing, a tensor or a tuple."""
    return None if not results else results[0] if len(results) == 1 else tuple(results)
