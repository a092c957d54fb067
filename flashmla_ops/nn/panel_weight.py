"""A weight that is kept in panels, as others see it: a copy in its own shape, which refuses to be written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashmla_ops.errors import ArgumentError

#: The special methods that write, of ``+=`` and the like.
_OPERATIONS = ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "matmul")
_BITWISE = ("and", "or", "xor", "lshift", "rshift")
IN_PLACE = {"__setitem__", *(f"__i{name}__" for name in (*_OPERATIONS, *_BITWISE))}


class PanelWeight(Tensor):
    """A copy that can be read like any tensor. A write would be lost, and raises `ArgumentError`, in its views too."""

    #: The function that keeps the weight otherwise, and what the tensor is a copy of.
    owner: ClassVar[tuple[str, str]] = ("fast_linear", "a weight that is kept in panels (call restore_linear first)")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        for written in _written(name, args, kwargs):
            if isinstance(written, PanelWeight):
                op, what = written.owner
                raise ArgumentError(op, "weight", f"no write to a copy of {what}", name)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            return torch.utils._pytree.tree_map(lambda x: _as_seen(x, args), result)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)


def _name(func: Any) -> str:
    """``add_``, of the method, the function and the operator; ``data.__set__`` of an attribute's setter."""
    name = getattr(func, "__name__", str(func))
    if name in ("__set__", "__delete__"):
        return f"{func.__self__.__name__}.{name}"
    return name.partition(".")[0] or name


def _written(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that a function writes: its first by its name, and ``out``."""
    out = kwargs.get("out")
    written = list(out) if isinstance(out, list | tuple) else [out]
    dunder = name.startswith("__") and name.endswith("__")
    in_place = name.endswith((".__set__", ".__delete__")) or name in IN_PLACE
    if in_place or (name.endswith("_") and not dunder):
        first = args[0] if args else next(iter(kwargs.values()), None)
        written += first if isinstance(first, list | tuple) else [first]
    return written


def _as_seen(value: Any, args: tuple[Any, ...]) -> Any:
    """A view of the weight refuses writes as the weight does; everything else is an ordinary tensor."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().data_ptr()
    owners = (x for x in args if isinstance(x, PanelWeight) and x.untyped_storage().data_ptr() == storage)
    return value.as_subclass(next(map(type, owners), Tensor))
