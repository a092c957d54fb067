"""A map of a pool's pages: one square each, coloured by what it is."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from flashmla_ops.errors import ArgumentError

KINDS = ("free", "used", "shared", "evictable", "deferred")
COLOURS = ("#e8ecef", "#1f6f8b", "#7b5ea7", "#4c9f70", "#e08e45")
SQUARE, GAP, MARGIN, LEGEND = 10, 1, 12, 28  # pixels


def draw(states: list[int], title: str, path: Path) -> None:
    """Write the map as ``.svg`` or, by matplotlib, ``.png``. ``states`` are numbers of `KINDS`."""
    if path.suffix not in (".svg", ".png"):
        raise ArgumentError("kv_pool", "path", "a name that ends in .svg or .png", path)
    columns = max(32, math.ceil(math.sqrt(len(states) * 2)))
    if path.suffix == ".svg":
        path.write_text(svg(states, title, columns))
    else:
        _png(states, title, columns, path)


def legend(states: list[int]) -> list[str]:
    """``12 free`` and so on, for every kind."""
    return [f"{states.count(kind):,} {name}" for kind, name in enumerate(KINDS)]


def svg(states: list[int], title: str, columns: int) -> str:
    """Runs of like pages in a row are one rectangle, ruled by a grid on top."""
    step = SQUARE + GAP
    rows = -(-len(states) // columns)
    width, height = columns * step + 2 * MARGIN, rows * step + 2 * MARGIN + 2 * LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif"'
        ' font-size="12">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="{MARGIN}" y="{MARGIN + 8}">{title}</text>',
    ]
    for i, (text, colour) in enumerate(zip(legend(states), COLOURS, strict=True)):
        x, y = MARGIN + i * 105, MARGIN + LEGEND - 4
        parts.append(f'<rect x="{x}" y="{y}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14}" y="{y + 9}" font-size="10">{text}</text>')
    top = MARGIN + 2 * LEGEND - 12
    for row in range(rows):
        line = states[row * columns : (row + 1) * columns]
        start = 0
        for end in range(1, len(line) + 1):
            if end == len(line) or line[end] != line[start]:
                x, y = MARGIN + start * step, top + row * step
                size = f'width="{(end - start) * step - GAP}" height="{SQUARE}"'
                parts.append(f'<rect x="{x}" y="{y}" {size} fill="{COLOURS[line[start]]}"/>')
                start = end
    grid = " ".join(f"M{MARGIN + column * step - GAP / 2} {top}v{rows * step}" for column in range(1, columns))
    parts.append(f'<path d="{grid}" stroke="#ffffff" stroke-width="{GAP}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _png(states: list[int], title: str, columns: int, path: Path) -> None:
    try:
        import matplotlib as mpl
    except ModuleNotFoundError as error:
        raise ArgumentError("kv_pool", "path", "a name that ends in .svg where matplotlib is missing", path) from error
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows = -(-len(states) // columns)
    padded = states + [-1] * (rows * columns - len(states))
    cells: list[list[Any]] = [padded[row * columns : (row + 1) * columns] for row in range(rows)]
    figure = Figure(figsize=(9, max(2.5, 9 * rows / columns + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = mpl.colors.ListedColormap(["#ffffff", *COLOURS])
    axes.pcolormesh(cells[::-1], cmap=colours, vmin=-1.5, vmax=len(KINDS) - 0.5, edgecolors="white", linewidth=0.3)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, fontsize=10)
    patches = [Patch(color=colour, label=text) for colour, text in zip(COLOURS, legend(states), strict=True)]
    axes.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=len(KINDS), frameon=False)
    figure.savefig(path, dpi=150)
