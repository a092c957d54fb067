"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from flashmla_ops.errors import ArgumentError

_UNITS = {"": 1, "B": 1, **{f"{prefix}iB": 1 << 10 * power for power, prefix in enumerate("KMGT", 1)}}
_UNITS |= {f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)} | {"KB": 1000}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def n_bytes(op: str, argument: str, amount: int | str) -> int:
    """Bytes in ``amount``: a number of them, or text such as "256MiB" (binary) or "1.5GB" (decimal).

    Raises `ArgumentError`, which names the argument of ``op``, unless that is at least one byte.
    """
    found = amount
    if isinstance(amount, str) and (parts := _AMOUNT.fullmatch(amount)) and parts[2] in _UNITS:
        found = int(float(parts[1]) * _UNITS[parts[2]])
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ArgumentError(op, argument, 'a number of bytes, or text such as "256MiB" or "1.5GB"', repr(amount))
    return found


def in_words(count: int) -> str:
    """A number of bytes, with the largest binary unit that it has at least one of."""
    for prefix, power in (("T", 4), ("G", 3), ("M", 2), ("K", 1)):
        if count >= 1 << 10 * power:
            return f"{count / (1 << 10 * power):.4g} {prefix}iB"
    return f"{count} B"
