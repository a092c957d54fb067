"""Imports never go in a circle, those for typing and those inside functions counted."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).parent.parent
TOPS = ("flashmla_build", "flashmla_ops", "cutlass_kernels", "lowering", "bench")


def modules(root: Path) -> dict[str, Path]:
    """The packages' modules by name."""
    found = {}
    for path in (path for top in TOPS for path in (root / top).rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports: ``from a import b`` is a.b where that is a module, and else a."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            found |= {name if name in known else base for name in names}
    return found & known.keys()


def circles(root: Path) -> list[list[str]]:
    known = modules(root)
    graph = networkx.DiGraph(
        (name, other) for name, path in known.items() for other in imported(path, known) if other != name
    )
    return [sorted(each) for each in networkx.strongly_connected_components(graph) if len(each) > 1]


def test_no_circles() -> None:
    assert len(modules(ROOT)) > 150
    assert circles(ROOT) == []


@pytest.mark.parametrize(
    "second", ["import bench.a", "def f():\n    from bench import a", "if 0:\n    from bench.a import x"]
)
def test_a_circle_is_found(tmp_path: Path, second: str) -> None:
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("from bench.b import y")
    (tmp_path / "bench" / "b.py").write_text(second)
    assert circles(tmp_path) == [["bench.a", "bench.b"]]
