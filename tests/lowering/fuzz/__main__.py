"""``python -m tests.lowering.fuzz --count 20000 --seed 0 --jobs 2``: check programs, and shrink what fails."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter

from tests.lowering.fuzz.backends import MODES
from tests.lowering.fuzz.check import Outcome
from tests.lowering.fuzz.generate import ATTENTION, generate
from tests.lowering.fuzz.shrink import shrink
from tests.lowering.fuzz.workers import Worker, check_all, own_cache


class Tally:
    """Counts of outcomes, and the failures that were seen."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.families: Counter[str] = Counter()
        self.rewritten: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.torch: Counter[str] = Counter()
        self.failures: dict[tuple[str, str], list[int]] = {}

    def add(self, seed: int, outcome: Outcome) -> bool:
        """Whether it is a failure of a kind not seen before."""
        self.kinds[outcome.kind] += 1
        self.families[outcome.family] += 1
        self.rewritten[outcome.family] += is_rewritten(outcome)
        self.refused.update(each.split(": ", 1)[1][:60] for each in outcome.refused)
        if outcome.kind == "torch":
            self.torch[outcome.what[:100]] += 1
        if not outcome.failed:
            return False
        seeds = self.failures.setdefault((outcome.kind, outcome.what), [])
        seeds.append(seed)
        return len(seeds) == 1

    @property
    def share(self) -> float:
        """The share of the programs with attention in which one was rewritten."""
        programs = sum(self.families[family] for family in ATTENTION)
        return sum(self.rewritten[family] for family in ATTENTION) / max(1, programs)

    def __str__(self) -> str:
        lines = [
            f"programs   {sum(self.kinds.values())}: " + ", ".join(f"{k} {n}" for k, n in self.kinds.most_common())
        ]
        lines.append(
            f"rewritten  {self.share:.0%} of those that hold attention: {dict(self.rewritten)} of {dict(self.families)}"
        )
        lines.append("refused")
        lines += [f"  {n:6} {reason}" for reason, n in self.refused.most_common(30)]
        lines.append("as under torch alone")
        lines += [f"  {n:6} {what}" for what, n in self.torch.most_common(15)]
        lines += [f"{kind}: {what}: seeds {seeds[:12]}" for (kind, what), seeds in self.failures.items()]
        return "\n".join(lines)


def is_rewritten(outcome: Outcome) -> bool:
    """Whether attention was: products are not what families of attention are about."""
    return any(re.search("flashmla::(decode|prefill|attend)", pattern) for pattern in outcome.rewritten)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lowering.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many")
    parser.add_argument("--mode", choices=MODES, default="passes")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after that many")
    parser.add_argument("--shrink", type=float, default=120.0, help="seconds for each kind of failure; 0: not at all")
    parser.add_argument("--known", default="", help="failures whose name matches this expression are counted only")
    options = parser.parse_args()
    begun, tally, first = time.monotonic(), Tally(), []

    def seeds() -> object:
        for seed in range(options.seed, options.seed + options.count):
            if time.monotonic() - begun > 60 * options.minutes:
                return
            yield seed, options.mode

    for (seed, _), outcome in check_all(seeds(), options.jobs):
        known = bool(options.known and re.search(options.known, outcome.what))
        if tally.add(seed, outcome) and not known:
            first.append((seed, outcome))
        if outcome.failed and not known:
            command = f"python -m tests.lowering.fuzz --mode {options.mode} --seed {seed}"
            print(f"{outcome.kind}: {outcome.what}\n  {outcome.detail}\n  {command}", flush=True)
        elif options.count == 1:
            print(outcome, generate(seed, options.mode).render(), sep="\n")
        if sum(tally.kinds.values()) % 500 == 0:
            print(
                f"{sum(tally.kinds.values())} programs, {time.monotonic() - begun:.0f} s: {dict(tally.kinds)}",
                flush=True,
            )
    if options.shrink:
        _show_smallest(first, options.mode, options.shrink)
    print(tally, f"seconds    {time.monotonic() - begun:.0f}", sep="\n")
    return 1 if tally.failures else 0


def _show_smallest(failures: list[tuple[int, Outcome]], mode: str, seconds: float) -> None:
    worker = Worker()
    with own_cache():
        for seed, outcome in failures:
            if not outcome.what.startswith("the fuzzer"):
                smallest = shrink(generate(seed, mode), mode, outcome, worker, seconds)
                print(f"\n# seed {seed}, {outcome.kind}: {outcome.what}\n# {worker(smallest, mode).detail}")
                print(smallest.render(), flush=True)
    worker.stop()


if __name__ == "__main__":
    sys.exit(main())
