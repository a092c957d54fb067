"""A program in float32 where it is in float16: what its numbers are where float16 overflows.

Scores that overflow are inf, and their softmax NaN, where a kernel that keeps scores in float32 returns the right
numbers. The inputs are made in float16 and widened after that. What depends on none of them, such as positions and
masks, is computed in float16 and widened after that too, so that it keeps the values that float16 gives it.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.lowering.fuzz.program import Program, Step

HALF = re.compile(r"(?<!finfo\(torch\.)\bfloat16\b")
LIMIT = re.compile(r"finfo\((\w+)\.dtype\)")


def widened(program: Program) -> Program | None:
    """The program in float32; None where no input is in float16, or a limit is of a dtype that only calls know."""
    dtypes = {name: x.dtype for name, x in program.values().items() if isinstance(x, Tensor)}
    narrow = [name for name in program.inputs if dtypes.get(name) == torch.float16]
    if not narrow or not dtypes.keys() >= set(LIMIT.findall(program.text)):
        return None
    dependent, steps = set(narrow), []
    for step in program.steps:
        if dependent & step.reads() or step.code.startswith("def "):
            dependent |= {step.name} - {""}
            steps.append(Step(step.name, HALF.sub("float32", _limited(step.code, dtypes))))
        else:
            steps.append(step)
            if dtypes.get(step.name) == torch.float16:
                steps.append(Step(step.name, f"{step.name}.float()"))
    setup = (*program.setup, *(Step(name, f"{name}.float()") for name in narrow))
    return program.but(setup=setup, steps=tuple(steps))


def _limited(code: str, dtypes: dict[str, torch.dtype]) -> str:
    """The limits of the dtype that a variable has in the program, not of its wider one."""
    return LIMIT.sub(lambda found: f"finfo({dtypes[found[1]]})", code)
