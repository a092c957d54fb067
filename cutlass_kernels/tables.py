"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tabulate import tabulate


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]], *, texts: int = 1) -> str:
    """A table whose first columns are ``texts``, and the others numbers. Cells stay as they are: "1.50" is no 1.5."""
    align: list[Literal["left", "right"]] = ["left" if column < texts else "right" for column in range(len(header))]
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)
