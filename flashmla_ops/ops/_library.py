"""The one ``torch.library`` of the package, and every operator that has been defined in it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from flashmla_ops.ops import _autocast, _autograd, _docs, _sharding

if TYPE_CHECKING:
    from flashmla_ops.ops._backward import Differentiation, Last

NAMESPACE = "flashmla"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")  # noqa: TOR901 (lives as long as the process)

Function = Callable[..., Any]


class Defined(NamedTuple):
    """An operator's implementations in Python; `complete` binds the last ones when all operators are defined."""

    fake: Function
    reference: Function
    vmap: Function | None
    autocast: _autocast.Rule | None
    sharding: _sharding.Cuts | None
    mutates: tuple[str, ...]
    backward: Differentiation | Last | None = None


#: Every operator, as "append_" and "append_.two".
DEFINED: dict[str, Defined] = {}

LIBRARY.define("_refuse_gradient(str op, str argument) -> ()")
LIBRARY.impl("_refuse_gradient", _autograd.raise_refusal, "CompositeImplicitAutograd")


def define(
    schema: str,
    *,
    fake: Function,
    reference: Function,
    vmap: Function | None = None,
    autocast: _autocast.Rule | None = None,
    sharding: _sharding.Cuts | None = None,
    mutates: tuple[str, ...] = (),
) -> None:
    """Define an operator: its schema, its fake, the reference that runs where no kernel is registered, and its rules.

    A kernel for a device is registered by the library that holds it (`flashmla_ops.cpu` for the CPU). The reference
    sits below every device key, so an operator works wherever torch does. ``vmap`` is as `torch.library.register_vmap`
    takes it, ``autocast`` as in `_autocast`; without one, arguments stay as they are. ``sharding`` is as in
    `_sharding`; an operator without one takes no DTensor. ``mutates`` names the first arguments, which it writes to.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    DEFINED[name] = Defined(fake, reference, vmap, autocast, sharding, mutates)


def differentiate(schema: str, backward: Differentiation | Last) -> None:
    """State how an operator that is defined is differentiated."""
    name = schema.split("(", 1)[0]
    LIBRARY.define(_autograd.twin(schema))
    DEFINED[name] = DEFINED[name]._replace(backward=backward)


def complete() -> None:
    """Bind to every operator what depends on all of them, and what the compiled kernels, loaded by now, did not."""
    operators = {name: operator(name) for name in DEFINED}
    backwards = {name: defined.backward for name, defined in DEFINED.items() if defined.backward is not None}
    _autograd.complete(LIBRARY, operators, backwards)
    for name, defined in DEFINED.items():
        if defined.vmap is not None:
            torch.library.register_vmap(f"{NAMESPACE}::{name}", defined.vmap, lib=LIBRARY)
        if defined.autocast is not None:
            _autocast.register(LIBRARY, operators[name], defined.autocast)
    _sharding.bind(
        [
            _sharding.Rule(operators[name], defined.sharding, len(defined.mutates))
            for name, defined in DEFINED.items()
            if defined.sharding is not None
        ]
    )
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{__package__}."):
            _docs.document(module)


def operator(name: str) -> torch._ops.OpOverload:
    """``torch.ops.flashmla.append_.two`` for "append_.two". Only when all are defined: torch lists overloads once."""
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.flashmla, packet), overload or "default")  # type: ignore[no-any-return]
