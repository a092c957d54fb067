"""One rewrite: it is made, or the graph and what is known about it stay as they were and the record says why."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from flashmla_ops.errors import FlashMLAError, typed
from lowering.passes.writer import Writer
from lowering.record import Record, Refusal

log = logging.getLogger(__name__)

#: Begins the reason of a refusal that is a fault of ours and not of the model.
INTERNAL = "internal error"


def attempt(writer: Writer, record: Record, pattern: str, node: object, rewrite: Callable[[], str | None]) -> bool:
    """Call ``rewrite``, which gives what it did, or None where there was nothing to do; whether it did something.

    `Refusal` and the errors of our operators, which check the arguments of what is written, are reasons to refuse. So
    is a question about a size that only data can answer.
    """
    mark = writer.mark()
    try:
        with typed():
            done = rewrite()
    except Exception as error:
        if writer.has_replaced(mark):
            raise
        reason = _reason(error)
    else:
        if done is not None:
            record.rewrote(done, node)
            return True
        reason = ""
    writer.undo(mark)
    if reason:
        record.refused(pattern, node, reason)
    return False


def _reason(error: Exception) -> str:
    if isinstance(error, (Refusal, FlashMLAError)):
        return str(error)
    if isinstance(error, GuardOnDataDependentSymNode):
        return f"a size depends on data: {error.cond}"
    return internal_error(error)


def internal_error(error: Exception) -> str:
    """The reason of a refusal for an exception that nobody expected, which is logged with its traceback."""
    log.warning("A rewrite failed and was left out; please report this.", exc_info=error)
    return f"{INTERNAL}: {type(error).__name__}: {error}"
