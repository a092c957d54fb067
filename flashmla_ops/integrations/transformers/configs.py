"""A configuration for one model alone.

transformers reads from a model's configuration which attention it has and which masks it makes, and two models may hold
one configuration object. A model that is enabled therefore gets a copy, so that no other model changes with it. All
modules of a model hold one copy, so that its masks are made for the attention that reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

#: Where a module whose configuration is a copy keeps its `Own`.
OWN_CONFIG = "own_config"


@dataclass(eq=False)
class Own:
    """A copy of ``shared``, held by ``holders`` modules, which had ``shared`` before."""

    config: Any
    shared: Any
    holders: int = 0


def separate(model: nn.Module, attention: str) -> None:
    """Give the modules of ``model`` one copy of each of their configurations, to choose ``attention`` in.

    Values of attributes are not copied. A copy that modules hold already is taken if nobody else holds it, or if
    ``attention`` is chosen in it: else a module elsewhere would change, to which this attention may be unknown.
    """
    renewed: dict[int, Any] = {}
    for modules in _by_shared(_holders(model)):
        own = _own(modules[0])
        same = own is not None and all(_own(module) is own for module in modules)
        if own is not None and same and (own.config._attn_implementation == attention or own.holders == len(modules)):
            continue
        shared = modules[0].config if own is None else own.shared
        fresh = Own(copy.copy(modules[0].config), shared)
        renewed[id(shared)] = fresh.config
        for module in modules:
            renewed[id(module.config)] = fresh.config
            _hold(module, fresh)
    for config in {id(config): config for config in renewed.values()}.values():
        for name in config.sub_configs:
            part = vars(config).get(name)
            if isinstance(part, PreTrainedConfig):
                vars(config)[name] = renewed.get(id(part)) or copy.copy(part)


def choose(model: nn.Module, model_types: Collection[str], attention: str) -> None:
    """Choose ``attention`` in the copies that modules of these types of models hold."""
    for module in _holders(model):
        if _own(module) is not None and module.config.model_type in model_types:
            module.config._attn_implementation = attention


def is_separate(model: nn.Module) -> bool:
    """Whether any module of ``model`` holds a copy."""
    return any(_own(module) is not None for module in _holders(model))


def copy_for(config: Any, attention: str) -> Any:
    """A copy of a configuration, for one module alone, in which ``attention`` is chosen."""
    own = copy.copy(config)
    for name in own.sub_configs:
        if isinstance(part := vars(own).get(name), PreTrainedConfig):
            vars(own)[name] = copy.copy(part)
    own._attn_implementation = attention
    return own


def reunite(model: nn.Module, attention: str) -> None:
    """Undo `separate`. Copies in which ``attention`` is still chosen get the choice that was made before.

    The modules have the former objects again, unless a copy was changed since: then the model keeps its copies, and no
    other model changes with it. A part of a model keeps its copy until the rest is done too.
    """
    held = [(module, own) for module in _holders(model) if (own := _own(module)) is not None]
    copies = {id(own): own for _, own in held}
    for own in copies.values():
        if own.config._attn_implementation == attention:
            own.config._attn_implementation = own.shared._attn_implementation
    if len(held) < sum(own.holders for own in copies.values()):
        return
    unchanged = all(own.config == own.shared for own in copies.values())
    for module, own in held:
        delattr(module, OWN_CONFIG)
        if unchanged:
            module.config = own.shared


def _holders(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(vars(module).get("config"), PreTrainedConfig)]


def _own(module: Any) -> Own | None:
    """The entry that a module holds; None if it was given another configuration since."""
    own: Own | None = vars(module).get(OWN_CONFIG)
    return own if own is not None and own.config is module.config else None


def _hold(module: Any, fresh: Own) -> None:
    if (old := _own(module)) is not None:
        old.holders -= 1
    setattr(module, OWN_CONFIG, fresh)
    module.config = fresh.config
    fresh.holders += 1


def _by_shared(modules: list[Any]) -> list[list[Any]]:
    """The modules in groups of one former configuration, in order."""
    groups: dict[int, list[Any]] = {}
    for module in modules:
        own = _own(module)
        groups.setdefault(id(module.config if own is None else own.shared), []).append(module)
    return list(groups.values())
