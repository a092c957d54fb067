"""Give one object the methods of a mixin, and take them away again.

The object's class is exchanged for a subclass of it, made once from the mixin and the class, that has the name of the
class: what finds modules by the name of their class still finds them. Nothing is stored in the object, so that its
attributes and ``state_dict`` are what they were. A copy or a pickle names the mixins and the class, all of which can be
imported, and makes the subclass again. An object may have several mixins, which go in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flashmla_ops.errors import UnsupportedModelError

_subclasses: dict[tuple[type[Specialised], type], type] = {}  # of a mixin and a class
_origins: dict[type, tuple[type[Specialised], type]] = {}  # the mixin and class of a subclass


class Specialised:
    """Base class of mixins."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        if type(self) not in _origins:  # a subclass that somebody else made of ours
            return super().__reduce_ex__(protocol)
        return _new, _parts(type(self)), self.__getstate__()


def specialise(thing: object, mixin: type[Specialised]) -> None:
    """Let ``thing`` have the methods of ``mixin``, before those of its class. Changes nothing if it has them."""
    if not isinstance(thing, mixin):
        thing.__class__ = subclass(mixin, type(thing))


def restore(thing: object, mixin: type[Specialised]) -> None:
    """Give ``thing`` its class back. Changes nothing if it has not the methods of ``mixin``.

    Raises `UnsupportedModelError` if its class was exchanged for another since.
    """
    if not isinstance(thing, mixin):
        return
    mixins, original = _parts(type(thing))
    if mixin not in mixins:
        found = f"{type(thing).__module__}.{type(thing).__qualname__}"
        raise UnsupportedModelError(f"its class was exchanged for {found} since it was enabled: undo that first")
    thing.__class__ = _class_of([each for each in mixins if each is not mixin], original)


def mixin_of(thing: object) -> type[Specialised] | None:
    """The mixin whose methods `specialise` gave to ``thing``; None where its class is another."""
    return _origins.get(type(thing), (None, None))[0]


def subclass(mixin: type[Specialised], original: type) -> type:
    """The class of things that have the methods of ``mixin`` and those of ``original``."""
    if (mixin, original) not in _subclasses:
        names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
        made = type(original.__name__, (mixin, original), names)
        _origins.setdefault(_subclasses.setdefault((mixin, original), made), (mixin, original))
    return _subclasses[mixin, original]


def _new(mixins: tuple[type[Specialised], ...], original: type) -> Any:
    return object.__new__(_class_of(mixins, original))


def _class_of(mixins: Sequence[type[Specialised]], original: type) -> type:
    for mixin in reversed(mixins):
        original = subclass(mixin, original)
    return original


def _parts(kind: type) -> tuple[tuple[type[Specialised], ...], type]:
    """The mixins that made a class, the last one first, and the class that they were added to."""
    mixins = []
    while kind in _origins:
        mixin, kind = _origins[kind]
        mixins.append(mixin)
    return tuple(mixins), kind
