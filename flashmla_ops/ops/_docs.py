"""Documentation of the operators where Python looks for it: ``help(torch.ops.flashmla.decode)``.

A module of this package names its operators in the first line of its docstring, which says what each argument is.
"""

from __future__ import annotations

import re
from types import ModuleType

import torch


def document(module: ModuleType) -> None:
    """Give the operators that a module names its docstring, behind their schemas. All must be defined."""
    text = module.__doc__ or ""
    for name in re.findall(r"``flashmla::(\w+)``", text.partition("\n")[0]):
        packet = getattr(torch.ops.flashmla, name)
        schemas = [str(getattr(packet, overload)._schema) for overload in packet.overloads()]
        packet.__doc__ = "\n".join(schemas) + "\n\n" + text
