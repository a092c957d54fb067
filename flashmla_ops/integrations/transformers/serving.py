"""transformers' OpenAI-compatible server with our attention: ``flashmla serve MODEL --continuous-batching``.

``transformers serve`` takes the names of its own attention functions alone, and imports no library that could add one.
This is the same server and the same command line, in a process in which models are enabled as they are loaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

from flashmla_ops.integrations.transformers.attention import ABSORBED_ATTENTION
from flashmla_ops.integrations.transformers.grouped import GROUPED_ATTENTION
from flashmla_ops.integrations.transformers.hook import enable

#: Values of ``--attn-implementation`` that mean our attention, as leaving it out does.
OURS = (None, "flashmla", ABSORBED_ATTENTION, GROUPED_ATTENTION)


class EnabledModels(model_manager.ModelManager):  # type: ignore[misc]
    """The models of a server, enabled unless another attention was asked for."""

    def __init__(self, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> None:
        self.enables = attn_implementation in OURS
        super().__init__(*args, attn_implementation="sdpa" if self.enables else attn_implementation, **kwargs)

    def _load_model(self, *args: Any, **kwargs: Any) -> Any:
        """Raises `UnsupportedModelError` for a model that `enable` refuses."""
        model = super()._load_model(*args, **kwargs)
        if self.enables:
            enable(model)
        return model


def serve(*args: Any, **kwargs: Any) -> Serve:
    """``transformers.cli.serve.Serve`` with these arguments and our attention, where no other is asked for.

    Serves until it is stopped, or with ``non_blocking=True`` until ``kill_server`` of what it returns is called. Raises
    ImportError where what transformers' server needs is not installed, and `UnsupportedModelError` for a model to be
    loaded at once that `enable` refuses.
    """
    with _loading_enabled():
        return Serve(*args, **kwargs)


def command(arguments: Sequence[str]) -> int:
    """``transformers serve`` with these words; the exit code."""
    app = typer.Typer(add_completion=False)
    with _loading_enabled():
        app.command(name="serve")(Serve)
        code = app(args=list(arguments), prog_name="flashmla serve", standalone_mode=False)
    return code if isinstance(code, int) else 0


@contextmanager
def _loading_enabled() -> Iterator[None]:
    """Servers that are made meanwhile have `EnabledModels`; the name is transformers' own again afterwards."""
    theirs = model_manager.ModelManager
    model_manager.ModelManager = EnabledModels
    try:
        yield
    finally:
        model_manager.ModelManager = theirs
