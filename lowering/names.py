"""Inputs by the names that a user gave them: ``attention_mask`` rather than ``arg3_1``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch.fx import Graph

#: A word that may be the name of a node.
_WORD = re.compile(r"\b[A-Za-z_]\w*\b")
_PART = re.compile(r"\['([^']*)'\]|\[(\d+)\]|\.(\w+)")
_TABLES = ("_modules", "_parameters", "_buffers")


def user_name(source: str) -> str:
    """The user's name for what Dynamo calls ``source``.

    >>> user_name("L['self']._modules['layers']._modules['0']._parameters['weight']")
    'layers.0.weight'
    >>> user_name("L['kwargs']['attention_mask']"), user_name("L['args'][0]")
    ('attention_mask', 'args[0]')
    """
    name, of_module, first = "", False, True
    for key, index, attribute in _PART.findall(source):
        part = key or attribute
        if part in _TABLES:
            name, of_module = (name if of_module else ""), True
        elif index:
            name += f"[{index}]"
        elif not (first and part == "kwargs"):
            name += f".{part}" if name else part
        first = False
    return name or source


def names_of_inputs(graph: Graph, names: Sequence[str]) -> dict[str, str]:
    """The users' names of a graph's inputs by the names of their nodes; ``names`` are those of the flat arguments."""
    found = {}
    for node in graph.find_nodes(op="placeholder"):
        position = getattr(node.meta.get("desc"), "idx", None)
        if isinstance(position, int) and position < len(names):
            found[node.name] = names[position]
    return found


def said(text: str, names: dict[str, str]) -> str:
    """The text with users' names for the graph's."""
    return _WORD.sub(lambda word: names.get(word.group(), word.group()), text)
