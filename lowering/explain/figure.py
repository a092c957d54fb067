"""The picture of `explain`: the steps of two programs side by side, as SVG without scripts or fonts of its own."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby

from lowering.explain.program import Program, Step

COLOURS = {"kernel": "#2f6fb3", "flashmla": "#2a8f5b", "library": "#8a8f98"}
LEGEND = {"kernel": "generated kernel", "flashmla": "flashmla operator", "library": "library call"}
INK, PALE, LINE = "#1c2128", "#6a7179", "#e3e6ea"
WIDTH, COLUMN, ROW, TOP, GAP = 860, 400, 25, 92, 20
LABEL = 130  # width of the first column of the table
NUMBER = 90  # and of a number
MOST = 60  # steps drawn; a larger model repeats itself
LONGEST = 52  # characters of a name
#: Parts of a kernel's name that say how data is moved, not what is computed.
MOVES = ("to_copy", "copy", "unsafe_view", "view", "expand", "transpose", "unsqueeze", "slice", "clone", "permute", "t")


def draw(before: Program, after: Program, rows: Sequence[tuple[str, int, int]]) -> str:
    """``rows`` are the lines of the table below the steps: label, value before, value after."""
    columns = [_grouped(program.steps) for program in (before, after)]
    table = TOP + ROW * max(len(column) for column in columns) + GAP
    height = table + ROW * len(rows) + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
        ' font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for i, (kind, label) in enumerate(LEGEND.items()):
        x = GAP + 170 * i
        parts.append(f'<rect x="{x}" y="16" width="12" height="12" rx="3" fill="{COLOURS[kind]}"/>')
        parts.append(_text(x + 18, 26, label, PALE))
    for i, (title, column) in enumerate(zip(("Inductor", "flashmla"), columns, strict=True)):
        left = GAP + i * (COLUMN + GAP)
        parts.append(_text(left, 64, title, INK, 'font-size="18" font-weight="600"'))
        parts.append(f'<rect x="{left}" y="74" width="{COLUMN}" height="1" fill="{LINE}"/>')
        parts += [_box(left, TOP + ROW * line, *entry) for line, entry in enumerate(column)]
    for line, (label, old, new) in enumerate(rows):
        parts += _comparison(table + ROW * line, label, old, new)
    return "\n".join([*parts, "</svg>\n"])


def _text(x: int, y: int, text: str, colour: str, attributes: str = "") -> str:
    return f'<text x="{x}" y="{y}" fill="{colour}"{" " * bool(attributes)}{attributes}>{escape(text)}</text>'


def _comparison(y: int, label: str, old: int, new: int) -> list[str]:
    """A line of the table: what it is, and for both programs the number and a bar as long as it."""
    parts = [
        f'<rect x="{GAP}" y="{y}" width="{WIDTH - 2 * GAP}" height="1" fill="{LINE}"/>',
        _text(GAP, y + 17, label, INK),
    ]
    for i, value in enumerate((old, new)):
        x = GAP + LABEL + i * (COLUMN + GAP - (LABEL if i else 0))
        bar = max(2, (COLUMN - LABEL - NUMBER) * value // max(old, new)) if value else 0  # one scale for both
        colour = COLOURS["flashmla"] if i else COLOURS["library"]
        parts.append(_text(x, y + 17, f"{value:,}", INK, 'font-weight="600"'))
        parts.append(f'<rect x="{x + NUMBER}" y="{y + 8}" width="{bar}" height="10" rx="3" fill="{colour}"/>')
    return parts


def _grouped(steps: Sequence[Step]) -> list[tuple[str, str]]:
    """Kind and text of each box; neighbours that are equal share one."""
    groups = [(step, len(list(same))) for step, same in groupby(steps)]
    boxes: list[tuple[str, str]] = [
        (step.kind, label(step) if n == 1 else f"{n} × {label(step)}") for step, n in groups[:MOST]
    ]
    if len(groups) > MOST:
        boxes.append(("library", f"and {sum(n for _, n in groups[MOST:])} more"))
    return boxes


def label(step: Step) -> str:
    """A step's name as it is read: what a generated kernel computes, and an operator without its overload."""
    if step.kind != "kernel":
        return step.name.removesuffix(".default").removesuffix(".out").replace("flashmla.", "flashmla::")
    words = step.name.removeprefix("cpp_fused_").strip("_").replace("unsafe_view", "view").split("_")
    computed = [word for word in words if word and not word.isdigit() and word not in MOVES and word != "to"]
    return " ".join(computed) or "copy"


def _box(x: int, y: int, kind: str, name: str) -> str:
    text = name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"
    return (
        f'<rect x="{x}" y="{y}" width="{COLUMN}" height="{ROW - 4}" rx="4" fill="{COLOURS[kind]}"/>'
        f'<text x="{x + 8}" y="{y + 15}" fill="#ffffff">{escape(text)}</text>'
    )
