"""A program from a seed."""

from __future__ import annotations

import random
import re
from typing import Any

import torch

from tests.lowering.fuzz.attention import attention, latents, sizes
from tests.lowering.fuzz.builder import Builder
from tests.lowering.fuzz.complexes import complexes
from tests.lowering.fuzz.ordinary import ordinary, products
from tests.lowering.fuzz.ours import ours
from tests.lowering.fuzz.program import Program
from tests.lowering.fuzz.tails import behind

#: Families of programs: the first three hold attention that the passes look at.
ATTENTION = ("attention", "several", "latents")
#: How often each is made; graph passes have little to do in the last ones, code generation has.
PASSES = {"attention": 10, "several": 2, "latents": 2, "products": 1, "ours": 1, "ordinary": 0.5, "complexes": 0.5}
WHOLE = {"attention": 6, "several": 2, "latents": 2, "products": 2, "ours": 3, "ordinary": 5, "complexes": 1}

#: Sizes that later calls may change together.
VARYING = {
    "attention": (("s_kv",), ("s_q", "s_kv", "new"), ("b",), ("b", "s_kv")),
    "latents": (("s_kv",), ("s_q", "s_kv"), ("b",)),
    "products": (("m",),),
    "ours": (("n",), ("pages",), ("n", "pages"), ("b",), ("m",), ("s",)),
    "ordinary": (("n0",), ("n1",), ("n0", "n1")),
    "complexes": (("s",), ("s", "d"), ("h",)),
}
VARYING["several"] = VARYING["attention"]


#: Code that only a compilation treats as it does: operators that write, sizes that depend on data, control flow.
COMPILED_ONLY = r"ops\.flashmla|write_|nonzero|item\(|masked_select|\[.*[<>]|keep|cond|while_loop|flex|graph_break|held"


def generate(seed: int, mode: str = "passes") -> Program:
    """The program of a seed. The same in every process and version of Python."""
    rng = random.Random(f"{mode} {seed}")
    weights = WHOLE if mode == "whole" else PASSES
    (family,) = rng.choices(list(weights), list(weights.values()))
    for attempt in range(50):
        try:
            return _draw(random.Random(f"{mode} {seed} {attempt}"), family)
        except (RuntimeError, ValueError, IndexError, TypeError, ArithmeticError, AttributeError):
            continue  # a step that eager refuses; those that raise on purpose are added without being run
    raise AssertionError(f"no program of family {family} for seed {seed}")


def _draw(rng: random.Random, family: str) -> Program:
    b = Builder(rng)
    b.autocast = family in ATTENTION and b.chance(0.06)
    varying = rng.choice(VARYING[family]) if b.chance(0.4 if family == "ours" else 0.16) else ()
    b.varying = set(varying)
    torch.manual_seed(0)
    outputs = _outputs(b, family)
    calls = _calls(b, varying)
    how = _how(b, family, len(calls) > 2 or len({tuple(c.items()) for c in calls}) > 1)
    program = b.finish(family, outputs, calls, **how)
    if varying and not _runs(program):
        return program.but(calls=program.calls[:1], marked=())
    return program


def _outputs(b: Builder, family: str) -> list[str]:
    if family == "ordinary":
        return ordinary(b)
    if family == "complexes":
        return complexes(b)
    if family == "products":
        return products(b)
    if family == "ours":
        return ours(b)
    if family == "latents":
        y, kept = latents(b)
        return behind(b, y) + kept
    sizes(b)
    y, kept = attention(b)
    if family == "attention":
        return behind(b, y) + kept
    other, more = attention(b)
    if b.chance(0.5) and (both := b.attempt(f"{y} + {other}", "y")) is not None:
        return behind(b, both) + kept + more
    return behind(b, y) + behind(b, other) + kept + more


def _calls(b: Builder, varying: tuple[str, ...]) -> list[dict[str, int]]:
    first = dict(b.sizes)
    calls = [first]
    if varying and set(varying) & set(first):
        for step in b.pick((4,), (4, 9), (1, -1), (-1,), (7, 2)):
            calls.append(first | {name: max(1, first[name] + step) for name in varying if name in first})
    elif b.chance(0.2):
        calls.append(first)
    return calls


def _how(b: Builder, family: str, several: bool) -> dict[str, Any]:
    how: dict[str, Any] = {"fullgraph": True}
    if any("graph_break" in step.code for step in b.steps) or b.chance(0.05):
        how["fullgraph"] = False
    if several:
        how["dynamic"] = b.pick(None, None, True)
        if how["dynamic"] is None and b.chance(0.5):
            how["marked"] = tuple(_marked(b))
    elif b.chance(0.06):
        how["dynamic"] = b.pick(True, False)
    if b.chance(0.02):
        how["grad"] = True
    plain = not several and how == {"fullgraph": True}
    if plain and not re.search(COMPILED_ONLY, "\n".join(step.code for step in b.steps)) and b.chance(0.8):
        how["traced"] = True
    if b.chance(0.1):
        how["options"] = b.pick({"flashmla.decode": "template"}, {"flashmla.gemm": True}, {"flashmla.gemm": False})
    return how


def _marked(b: Builder) -> list[tuple[str, int]]:
    """The dimensions of inputs whose size is one of those that vary."""
    found = []
    for step in b.setup:
        x = b.scope[step.name]
        for name in b.varying & set(b.sizes):
            if f" {name}," in step.code or f"({name}," in step.code:
                found += [(step.name, dim) for dim, n in enumerate(x.shape) if n == b.sizes[name] and n > 1][:1]
    return found


def _runs(program: Program) -> bool:
    """Whether the calls with other sizes run eagerly."""
    setup, function = program.build()
    try:
        with torch.no_grad():
            for call in range(1, len(program.calls)):
                function(*setup(call, **program.arguments(call)))
    except Exception:
        return False
    return True
