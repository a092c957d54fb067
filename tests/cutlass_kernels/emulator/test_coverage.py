"""Every implemented opcode occurs in the PTX of a test of this folder, and so does every family that refuses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from cutlass_kernels.emulator import LIMITS, UnsupportedInstruction, opcodes
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.registry import rule_for

TOKEN = re.compile(r"(?<![\w.%])[a-z][a-z0-9_]*(?:\.[a-zA-Z0-9_]+(?:::[a-z0-9_A-Z]+)*)*")


def written() -> set[str]:
    """The rules of all tokens of all strings in the tests that could be opcodes."""
    found = set()
    for path in Path(__file__).parent.glob("test_*.py"):
        if path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for token in TOKEN.findall(node.value):
                    try:
                        found.add(rule_for(Instruction(tuple(token.split(".")), (), None, 0, token)).name)
                    except UnsupportedInstruction:
                        continue
    return found


def test_every_opcode_has_a_test() -> None:
    missing = set(opcodes()) - written()
    assert not missing, f"implemented, but in no test: {sorted(missing)}"


def test_limits_are_sentences() -> None:
    assert LIMITS
    assert all(limit.endswith(".") and not limit.endswith("..") and len(limit) < 120 for limit in LIMITS)
