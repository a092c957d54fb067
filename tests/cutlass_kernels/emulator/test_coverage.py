"""Every implemented opcode occurs in the PTX of a test of this folder, and so does every family that refuses."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from cutlass_kernels.emulator import LIMITS, opcodes

#: Qualifiers may be computed by an f-string, which leaves a NUL in them.
OPCODE = r"[a-z][a-z0-9_]*(?:\.[a-zA-Z0-9_\0]+(?:::[a-z0-9_A-Z]+)*)*"
#: The opcode of a statement: what follows a label and a guard.
STATEMENT = re.compile(rf"(?:^|[;{{}}\n:]|@!?%\w+)\s*({OPCODE})(?=[\s;]|$)", re.MULTILINE)


def strings(tree: ast.AST) -> Iterator[str]:
    """The strings of a module but for docstrings; what an f-string computes is a NUL in it."""
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in documentation | inside:
            continue
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def rule(token: str) -> str | None:
    """The name of the rule that an opcode with its qualifiers goes to."""
    parts, known = token.split("."), set(opcodes())
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in known), None)


def written(source: str) -> set[str]:
    """The rules of the opcodes in a test's PTX: statements that end in ";", and strings that are an opcode alone."""
    found = set()
    for text in strings(ast.parse(source)):
        tokens = STATEMENT.findall(text) if ";" in text else re.findall(rf"^{OPCODE}$", text)
        found |= {name for token in tokens if (name := rule(token)) is not None}
    return found


def test_every_opcode_has_a_test() -> None:
    tests = (path for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__))
    missing = set(opcodes()) - set[str]().union(*(written(path.read_text()) for path in tests))
    assert not missing, f"implemented, but in no test: {sorted(missing)}"


def test_words_are_no_opcodes() -> None:
    assert not written('''def f(x):\n    """Do not call; match."""\n    raise ValueError("not a call of match")\n''')
    assert written('x = f"@%p1 {op}.u32 %r0, 1; DONE: not.b32 %r1, %r0;"; y = ["brev.b32"]') == {"not", "brev"}


def test_limits_are_sentences() -> None:
    assert LIMITS
    assert all(limit.endswith(".") and not limit.endswith("..") and len(limit) < 120 for limit in LIMITS)
