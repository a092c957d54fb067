"""One program through the backend: does it do what it does eagerly?"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tests.lowering.fuzz.backends import Compiler
from tests.lowering.fuzz.compare import Difference, Expected, observe
from tests.lowering.fuzz.program import CAPTURED, Program

#: The kinds of an outcome that are failures.
FAILURES = ("wrong", "crash", "died", "hang")


#: Errors of ours where eager raises one of its own: `index_copy` at negative positions, and what is read up to there.
REFUSED = re.compile(r"argument '(cache_seqlens|cu_seqlens_k)': expected .*, got -\d")

#: A failure is named after the worst difference.
SEVERITY = {"raises": 0, "values": 0, "strides": 2}


@dataclass(frozen=True)
class Outcome:
    """``kind``: ok, error (eager raises, and so do we), torch (differs under stock torch alike), refused (our operators
    refuse, when they run, what they say they refuse), or one of `FAILURES`.

    ``what`` tells failures apart, ``detail`` explains them. ``rewritten`` and ``refused`` are patterns and reasons.
    """

    kind: str
    what: str = ""
    detail: str = ""
    rewritten: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    seconds: float = 0.0
    family: str = ""

    @property
    def failed(self) -> bool:
        return self.kind in FAILURES


def check(program: Program, mode: str) -> Outcome:
    """Run a program eagerly and compiled, and compare. Never raises."""
    begun = time.perf_counter()
    compiler = Compiler(mode, ours=True)
    expected = [Expected(program, call) for call in range(len(program.calls))]
    found = next(differing(program, compiler, expected), None)
    kind, what, detail = "ok", "", ""
    internal = [d for d in compiler.decisions if d.reason.startswith("internal error")]
    if found is not None:
        call, differences = found
        kind, what, detail = _judged(program, mode, expected, call, differences)
        if kind == "wrong" and mode == "passes" and not program.calls_ours and not any_rewritten(compiler):
            # The passes left the graph as it was, so all that ran is torch's: its attention reads past the end of keys
            # that are fewer than the values, for one.
            kind, what = "torch", f"{what}, and nothing was rewritten"
    elif internal:
        kind, what, detail = "crash", "internal error", str(internal[0])
    elif expected[0].seen.error is not None:
        kind = "error"
    decisions = compiler.decisions
    return Outcome(
        kind,
        what,
        detail,
        tuple(d.pattern for d in decisions if d.rewritten),
        tuple(f"{d.pattern}: {d.reason}" for d in decisions if not d.rewritten),
        time.perf_counter() - begun,
        program.family,
    )


def any_rewritten(compiler: Compiler) -> bool:
    return any(decision.rewritten for decision in compiler.decisions)


def differing(program: Program, compiler: Compiler, expected: list[Expected]) -> Iterator[tuple[int, list[Difference]]]:
    """The calls that differ from the eager ones, and in what; the last one is the first that raises."""
    torch._dynamo.reset()
    setup, function = program.build()
    compiled = compiler.compile(function, program)
    with torch._dynamo.config.patch(dict.fromkeys(CAPTURED, True)):
        for call, each in enumerate(expected):
            actual = observe(compiled, setup, program, call)
            if differences := each.differences(actual):
                yield call, differences
            if actual.error is not None:
                return


def _judged(
    program: Program, mode: str, expected: list[Expected], call: int, differences: list[Difference]
) -> tuple[str, str, str]:
    """Ours is to blame for what torch alone does right; and for whatever a program with our own operators does."""
    stock = dict(differing(program, Compiler(mode, ours=False), expected))
    theirs = {difference.kind for difference in stock.get(call, [])}
    if call > min(stock, default=call) and any(d.kind.startswith("raises") for d in stock[min(stock)]):
        return "torch", str(differences[0]), ""
    blamed = [d for d in differences if d.kind not in theirs]
    if not blamed and program.calls_ours and any(d.kind.startswith("values") for d in differences):
        blamed = differences
    text = f"call {call}: " + "; ".join(map(str, blamed or differences))
    if not blamed:
        return "torch", re.sub(r"\d+", "#", str(differences[0])[:120]), text
    if blamed[0].kind == "raises another error" and REFUSED.search(blamed[0].detail):
        return "refused", blamed[0].detail, text
    first = min(blamed, key=lambda difference: SEVERITY.get(difference.kind.split()[0], 1))
    crashed = first.kind == "raises"
    return ("crash", re.sub(r"\d+", "#", first.detail), text) if crashed else ("wrong", first.kind, text)
