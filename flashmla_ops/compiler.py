"""The way from this package to its torch.compile backend, which is a package of its own that builds on this one.

The backend announces itself as an entry point, so nothing here imports it.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from flashmla_ops.errors import FlashMLAError

GROUP = "flashmla_ops.compiler"


class NoCompilerError(FlashMLAError, ImportError):
    """No compiler backend is installed beside this package."""


def enable_compile() -> None:
    """Make the `flashmla` backend the one of every ``torch.compile`` that names none. Idempotent.

    To undo it, call ``lowering.disable()``. Raises `NoCompilerError` where the backend is not installed.
    """
    found = list(entry_points(group=GROUP))
    if not found:
        raise NoCompilerError(f"no entry point {GROUP!r}: install the package instead of copying its files")
    for entry_point in found:
        entry_point.load().enable()
