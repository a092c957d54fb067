"""Running a model and leaving it as it was: its buffers, its attributes and torch's random numbers."""

from __future__ import annotations

import contextlib
import copy
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def undisturbed(model: Callable[..., Any]) -> Iterator[None]:
    """Let the block work on copies of the buffers of ``model``, and of tensors that are plain attributes.

    Afterwards its modules have the attributes that they had before, and the generators of random numbers their state.
    ``model`` is a module, a method of one, or a function that refers to some. Parameters are not copied.
    """
    modules = list(dict.fromkeys(each for root in _roots(model) for each in root.modules()))
    before = [(module, dict(module.__dict__), dict(module._buffers)) for module in modules]
    memo: dict[int, Any] = {}  # what shares memory, or is one tensor, still does
    with torch.random.fork_rng():
        try:
            for module, attributes, buffers in before:
                module._buffers = {name: _copied(value, memo) for name, value in buffers.items()}
                for name, value in attributes.items():
                    if isinstance(value, Tensor):
                        module.__dict__[name] = _copied(value, memo)
            yield
        finally:
            for module, attributes, _ in before:
                module.__dict__.clear()
                module.__dict__.update(attributes)


def _copied(tensor: Tensor | None, memo: dict[int, Any]) -> Tensor | None:
    if tensor is None or isinstance(tensor, nn.Parameter):
        return tensor
    return copy.deepcopy(tensor if tensor.is_leaf else tensor.detach(), memo)


def _roots(model: object) -> Iterator[nn.Module]:
    if isinstance(model, nn.Module):
        yield model
    elif isinstance(model, types.MethodType):
        yield from _roots(model.__self__)
        yield from _roots(model.__func__)
    elif isinstance(model, functools.partial):
        for value in (model.func, *model.args, *model.keywords.values()):
            yield from _roots(value)
    elif isinstance(model, types.FunctionType):
        named = [model.__globals__.get(name) for name in model.__code__.co_names]
        closed = [cell.cell_contents for cell in model.__closure__ or () if cell != types.CellType()]
        for value in (*named, *closed):
            if isinstance(value, nn.Module):
                yield value
