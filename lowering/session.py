"""The compilation under way: its settings, and the record of what was decided in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field

from lowering.record import Record
from lowering.settings import Settings


@dataclass
class Session:
    """One compilation with our lowerings: its settings, and the record of what was decided in it.

    ``names`` are what the user calls the inputs. ``rewrites`` has an entry for each graph that the passes saw,
    ``lowered`` what lowerings decided.
    """

    settings: Settings = field(default_factory=Settings)
    names: list[str] = field(default_factory=list)
    rewrites: list[Record] = field(default_factory=list)
    lowered: Record = field(default_factory=Record)


_SESSION: ContextVar[Session | None] = ContextVar("flashmla_session", default=None)
_RECORDING: ContextVar[Session | None] = ContextVar("flashmla_recording", default=None)


def session() -> Session | None:
    """The session of the compilation under way in this thread; None in everybody else's compilations."""
    return _SESSION.get()


@contextlib.contextmanager
def opened(settings: Settings) -> Iterator[Session]:
    """A session for the compilations of this thread inside the block."""
    current = Session(settings)
    if (watched := _RECORDING.get()) is not None:
        current.rewrites, current.lowered = watched.rewrites, watched.lowered
    token = _SESSION.set(current)
    try:
        yield current
    finally:
        _SESSION.reset(token)


@contextlib.contextmanager
def recording() -> Iterator[Session]:
    """Collect the decisions of every session that this thread opens in the block."""
    collected = Session()
    token = _RECORDING.set(collected)
    try:
        yield collected
    finally:
        _RECORDING.reset(token)
