"""Tables in Markdown, and their place in a document."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tabulate import tabulate


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]], *, texts: int = 1) -> str:
    """A table whose first columns are ``texts``, and the others numbers. Cells stay as they are: "1.50" is no 1.5."""
    align: list[Literal["left", "right"]] = ["left" if column < texts else "right" for column in range(len(header))]
    return tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)


def marked(name: str, content: str) -> str:
    """``content`` between the marks of ``name``."""
    return f"<!-- {name} begin -->\n{content}\n<!-- {name} end -->"


def place(document: Path, name: str, content: str) -> None:
    """Put ``content`` between the marks of ``name`` in a document. Raises `ValueError` unless they are there once."""
    parts = re.split(f"<!-- {re.escape(name)} (?:begin|end) -->", document.read_text())
    if len(parts) != 3:
        raise ValueError(f"{document}: expected one <!-- {name} begin --> ... <!-- {name} end -->")
    document.write_text(parts[0] + marked(name, content) + parts[2])
