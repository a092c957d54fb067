"""The backend ``torch.compile(model, backend="flashmla")``: Inductor, with our passes and lowerings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from lowering import registration, versions
from lowering.names import user_name
from lowering.settings import Settings

#: Options that start with this are ours; all others are Inductor's.
PREFIX = "flashmla."


def split_options(options: dict[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
    """Our settings and Inductor's options, out of the options that the user gave.

    >>> split_options({"flashmla.decode": "template", "max_autotune": True})
    (Settings(decode='template', fuse_append=True, decode_up='auto', gemm='auto'), {'max_autotune': True})
    """
    options = options or {}
    ours = {key.removeprefix(PREFIX): value for key, value in options.items() if key.startswith(PREFIX)}
    known = Settings.__dataclass_fields__
    for name in ours:
        if name not in known:
            raise versions.unknown_option(PREFIX + name, [PREFIX + key for key in known])
    return replace(Settings(), **ours), {key: value for key, value in options.items() if not key.startswith(PREFIX)}


def flashmla(
    graph: torch.fx.GraphModule,
    example_inputs: list[torch.Tensor],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one graph. ``mode`` and ``options`` are those of Inductor; options of `Settings` start "flashmla."."""
    settings, theirs = split_options(options)
    patches = versions.inductor_options(mode, theirs)
    with registration.entered(settings) as current:
        current.names = [user_name(versions.source_name(node)) for node in graph.graph.find_nodes(op="placeholder")]
        return versions.compile_fx(graph, example_inputs, registration.inductor_patches(patches))
