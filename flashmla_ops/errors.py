"""Every error this library raises on purpose: it names the argument, what was expected and what came.

The C++ kernels sit below torch's dispatcher, which turns any C++ exception into a plain ``RuntimeError``. All our
errors therefore derive from ``RuntimeError`` and share one message form, so that ``except RuntimeError`` catches an
operator's error wherever it was found (eager, fake tensor, compiled), and `typed` restores the class where Python code
of ours is the caller.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator


class FlashMLAError(RuntimeError):
    """Base class of the errors of this library."""


class ArgumentError(FlashMLAError, ValueError):
    """An argument that an operator cannot take.

    Attributes: ``op`` (operator name), ``argument``, ``expected`` and ``actual`` (text).
    """

    def __init__(self, op: str, argument: str, expected: str, actual: object) -> None:
        self.op, self.argument, self.expected, self.actual = op, argument, expected, str(actual)
        super().__init__(f"flashmla::{op}: argument '{argument}': expected {expected}, got {actual}")


class NotDifferentiableError(FlashMLAError):
    """A gradient is required of an operator that has none: no backward at all, or not ``when`` ("with softcap")."""

    def __init__(self, op: str, argument: str, when: str = "") -> None:
        self.op, self.argument = op, argument
        super().__init__(
            f"flashmla::{op}: argument '{argument}' requires a gradient, but the operator has"
            f" {f'no gradient for it {when}' if when else 'no backward'};"
            " call it under torch.no_grad() or detach the argument"
        )


class BuildError(FlashMLAError):
    """The C++ kernels could not be compiled or loaded."""


class UnsupportedModelError(FlashMLAError, TypeError):
    """A model, layer or cache that an integration does not know how to serve."""


class RankError(FlashMLAError):
    """Another rank of a group did not answer: it died, or was not there before the group's timeout."""


class FallbackWarning(UserWarning):
    """Something asked for runs, and right, but without the operators of this library."""


class OutOfPagesError(FlashMLAError, MemoryError):
    """A pool has too few pages for what was asked. Nothing was allocated.

    Attributes, in pages: ``needed``; ``free``; ``evictable`` (of the prefix cache alone; those that an open step may
    still read cannot be taken yet); ``deferred`` (released, but an open step may still read them); ``reserved`` (of
    sequences, for tokens to come); and ``n_pages`` of the pool.
    """

    def __init__(self, needed: int, *, free: int, evictable: int, deferred: int, reserved: int, n_pages: int) -> None:
        self.needed, self.free, self.evictable = needed, free, evictable
        self.deferred, self.reserved, self.n_pages = deferred, reserved, n_pages
        super().__init__(
            f"{needed} pages are needed and {free} of {n_pages} are free ({evictable} evictable, {deferred} deferred"
            f" until open steps close, {reserved} reserved): release, truncate or swap out sequences, or make the pool"
            " with more pages"
        )


class PoolBusyError(FlashMLAError):
    """Something that moves rows was asked of a pool while a step is open, which may read them."""


class SwapError(FlashMLAError):
    """A swapped sequence cannot be read back: its file is not whole, or is another pool's."""


class ArenaUnavailableError(FlashMLAError):
    """Torch's allocator cannot be served from an arena here."""


class ArenaFullError(FlashMLAError, MemoryError):
    """An arena has no free block that is large enough, and was told not to let others serve."""


_ARENA = re.compile(r"flashmla::arena: [^\n]*")
_ARGUMENT = re.compile(r"flashmla::(\w+): argument '([^']+)': expected (.*), got (.*)", re.DOTALL)
_GRADIENT = re.compile(r"flashmla::(\w+): argument '([^']+)' requires a gradient")


def from_message(message: str) -> FlashMLAError | None:
    """The typed error that an operator's message describes, or None if the message is not one of ours."""
    if found := _ARGUMENT.search(message):
        return ArgumentError(*(part.strip() for part in found.groups()))
    if found := _GRADIENT.search(message):
        return NotDifferentiableError(*found.groups())
    if found := _ARENA.search(message):
        return ArenaFullError(found.group())
    return None


@contextlib.contextmanager
def typed() -> Iterator[None]:
    """Re-raise an operator's RuntimeError as the typed error it describes."""
    try:
        yield
    except FlashMLAError:
        raise
    except RuntimeError as error:
        known = from_message(str(error))
        if known is None:
            raise
        raise known from error
