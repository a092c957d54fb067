"""The instructions that are implemented: each a builder that turns syntax into a step over numpy vectors.

A rule names every qualifier that it understands. An instruction with any other is refused, so that nothing is
modelled by leaving a part of it out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cutlass_kernels.emulator.errors import UnsupportedInstruction
from cutlass_kernels.emulator.ptx import types
from cutlass_kernels.emulator.ptx.syntax import Instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

Builder = Callable[[Translator, Instruction], Step]


@dataclass(frozen=True)
class Rule:
    """``kind``: its class in the counters. ``control``: its step hands the lanes on itself.

    ``waits``: it only synchronises, and is a `Site` that a mutant may drop.
    """

    name: str
    build: Builder
    accepts: frozenset[str]
    kind: str
    control: bool = False
    waits: bool = False


_RULES: dict[str, Rule] = {}


def instruction(
    *names: str, kind: str, accepts: str = "", control: bool = False, waits: bool = False
) -> Callable[[Builder], Builder]:
    """Register a builder. A name is the opcode's beginning; the longest one that fits an instruction is taken.

    ``accepts``: the qualifiers that may follow, besides types.
    """

    def register(build: Builder) -> Builder:
        for name in names:
            _RULES[name] = Rule(name, build, frozenset(accepts.split()), kind, control, waits)
        return build

    return register


def opcodes() -> list[str]:
    """Every implemented opcode, by the name of its rule."""
    return sorted(_RULES)


def rule_for(found: Instruction) -> Rule:
    """The rule of an instruction. Raises `UnsupportedInstruction`."""
    for length in range(len(found.opcode), 0, -1):
        rule = _RULES.get(".".join(found.opcode[:length]))
        if rule is not None:
            unknown = [q for q in found.opcode[length:] if q not in rule.accepts and not types.is_type(q)]
            if unknown:
                raise UnsupportedInstruction(f"{rule.name} with .{' .'.join(unknown)}", found.line, found.text)
            return rule
    raise UnsupportedInstruction(f"the instruction {found.name}", found.line, found.text)
