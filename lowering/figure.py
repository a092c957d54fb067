"""The picture of `explain`: the steps of two programs side by side, as SVG without scripts or fonts of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from lowering.program import Program, Step

COLOURS = {"kernel": "#2f6fb3", "flashmla": "#2a8f5b", "library": "#8a8f98"}
LEGEND = {"kernel": "generated kernel", "flashmla": "flashmla operator", "library": "library call"}
WIDTH, COLUMN, ROW, TOP, GAP = 860, 400, 26, 64, 20
MOST = 60  # steps drawn; a larger model repeats itself
LONGEST = 50  # characters of a name


def draw(before: Program, after: Program, rows: Sequence[tuple[str, int, int]]) -> str:
    """``rows`` are the lines of the table below the steps: label, value before, value after."""
    columns = [_grouped(program.steps) for program in (before, after)]
    height_of_steps = ROW * max(len(column) for column in columns)
    table = TOP + height_of_steps + GAP
    height = table + ROW * (len(rows) + 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for i, (title, column) in enumerate(zip(("Inductor", "flashmla"), columns, strict=True)):
        left = GAP + i * (COLUMN + GAP)
        parts.append(f'<text x="{left}" y="40" font-size="17" font-weight="600" fill="#1c2128">{title}</text>')
        parts += [_box(left, TOP + ROW * line, *entry) for line, entry in enumerate(column)]
    for line, (label, old, new) in enumerate(rows):
        y = table + ROW * line + 17
        for x, text in ((GAP, label), (GAP + 150, str(old)), (GAP + COLUMN + GAP, str(new))):
            parts.append(f'<text x="{x}" y="{y}" fill="#1c2128">{escape(text)}</text>')
    for i, (kind, label) in enumerate(LEGEND.items()):
        x, y = GAP + 190 * i, table + ROW * len(rows) + 12
        parts.append(f'<rect x="{x}" y="{y}" width="14" height="14" rx="3" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 20}" y="{y + 12}" fill="#1c2128">{label}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _grouped(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Kind and text of each box; neighbours that are equal share one."""
    groups = [(step, len(list(same))) for step, same in groupby(steps)]
    boxes: list[tuple[str, str]] = [
        (step.kind, step.name if n == 1 else f"{n} x {step.name}") for step, n in groups[:MOST]
    ]
    if len(groups) > MOST:
        boxes.append(("library", f"and {sum(n for _, n in groups[MOST:])} more"))
    return boxes


def _box(x: int, y: int, kind: str, name: str) -> str:
    text = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return (
        f'<rect x="{x}" y="{y}" width="{COLUMN}" height="{ROW - 4}" rx="4" fill="{COLOURS[kind]}"/>'
        f'<text x="{x + 8}" y="{y + 15}" fill="#ffffff">{escape(text)}</text>'
    )
