"""Row formats: how one token of one KV head lies in memory.

A cache row is a *value* (its first ``d_v`` elements) and a *key* (its elements from ``qk_start`` on, followed by the
row of a second tensor where one is given). ``native`` rows hold the elements themselves in the cache tensor's dtype; a
quantised format adds a dataclass here that says where its values, scales and rotary part lie.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeRow:
    """Elements stored as they are; the cache tensor's last dimension is the row."""

    name: str = "native"


ROW_FORMATS: dict[str, NativeRow] = {row.name: row for row in (NativeRow(),)}
