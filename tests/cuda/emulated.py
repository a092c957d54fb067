"""The emulated devices of `flashmla_ops.cuda.verify`, as tests use them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flashmla_ops.cuda.engine import Engine
from flashmla_ops.cuda.verify.emulated import Emulated, bytes_of, device


@contextmanager
def no_hazards(emulated: Emulated) -> Iterator[Engine]:
    yield emulated.engine
    assert not emulated.hazards, "; ".join(map(str, emulated.hazards))


__all__ = ["Emulated", "bytes_of", "device", "no_hazards"]
