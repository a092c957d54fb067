"""Attention on 8 to 1,024 ranks, simulated from parts that were measured on a few: `docs/scale.md`.

    python -m bench.scale      # writes the document from bench/results/dist-*.json

A rank is one thread of the measured machine. A step decodes a token of every sequence through the attention layers of
DeepSeek-V3; MLPs and experts are left out. Ranks are cut along four ways that can be multiplied: layers (a pipeline, of
which every stage has a batch at work), heads, pages of each sequence, and sequences.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.report import RESULTS
from bench.runner import OURS, ROOT
from bench.suites import dist
from cutlass_kernels.tables import markdown

DOCUMENT = ROOT / "docs" / "scale.md"
RANKS = (8, 32, 128, 512, 1024)
#: Sequences and tokens of each.
LOADS = ((256, 4096), (64, 32768), (1, 131072))
TRIALS = 20
ELEMENT = 2  # bytes of bf16
#: An upper quartile is so many standard deviations above the lower one.
QUARTILES = 1.349


@dataclass(frozen=True)
class Geometry:
    """The attention of DeepSeek-V3 (its configuration on Hugging Face)."""

    layers: int = 61
    hidden: int = 7168
    heads: int = 128
    d_c: int = 512
    d_r: int = 64
    d_nope: int = 128
    d_v: int = 128
    q_rank: int = 1536

    @property
    def whole(self) -> int:
        """Weights of a layer that every rank of its heads has: the projections to latents."""
        return self.hidden * (self.q_rank + self.d_c + self.d_r)

    @property
    def by_heads(self) -> int:
        """Weights of a layer that are cut with the heads."""
        per_head = self.q_rank * (self.d_nope + self.d_r) + self.d_c * (self.d_nope + self.d_v) + self.d_v * self.hidden
        return self.heads * per_head

    @property
    def row(self) -> int:
        """Bytes of a token in one layer's cache."""
        return (self.d_c + self.d_r) * ELEMENT


@dataclass(frozen=True)
class Link:
    """A message of n bytes between two ranks takes ``latency + n / rate`` seconds."""

    name: str
    latency: float
    rate: float

    def send(self, size: float) -> float:
        return self.latency + size / self.rate

    def all_gather(self, ranks: int, size: float) -> float:
        """``size`` bytes of each rank to all, around a ring."""
        return (ranks - 1) * self.send(size)

    def all_reduce(self, ranks: int, size: float) -> float:
        """The sum of ``size`` bytes of each, around a ring twice in as many pieces as there are ranks."""
        return 2 * (ranks - 1) * self.send(size / ranks)


@dataclass(frozen=True)
class Parts:
    """What was measured of one rank."""

    seconds: Mapping[int, float]  # of attention, for a row of the cache, by the heads of the rank
    spread: float  # standard deviation of the logarithm of a part's time
    weights: float  # bytes/s
    link: Link

    def attention(self, heads: float, rows: float) -> float:
        """Between two measured numbers of heads the time for the larger one; fewer than one head cannot be."""
        return rows * self.seconds[min(n for n in self.seconds if n >= heads)]


@dataclass(frozen=True)
class Plan:
    """How many ranks each way is cut into."""

    layers: int
    heads: int
    pages: int
    sequences: int

    def __str__(self) -> str:
        cut = {name: n for name, n in vars(self).items() if n > 1}
        return " x ".join(f"{n} {name}" for name, n in cut.items()) or "one rank"


@dataclass(frozen=True)
class Step:
    """A step of all sequences."""

    plan: Plan
    seconds: float  # until every sequence has its token
    tokens: float  # per second
    weights: float  # bytes of a rank
    cache: float  # bytes of a rank
    sent: float  # bytes that a rank sends
    waiting: float  # share of the time in which ranks exchange or wait for the slowest


def plans(ranks: int, sequences: int, geometry: Geometry) -> Iterator[Plan]:
    """All ways to be so many ranks, in powers of two. Every stage of a pipeline needs sequences of its own."""
    powers = [1 << i for i in range(ranks.bit_length())]
    for layers, heads, pages in itertools.product(powers, repeat=3):
        by_sequence, rest = divmod(ranks, layers * heads * pages)
        if rest or heads > geometry.heads or layers > geometry.layers or layers * by_sequence > sequences:
            continue
        yield Plan(layers, heads, pages, by_sequence)


def step(plan: Plan, sequences: int, tokens: int, parts: Parts, link: Link, seed: int = 0) -> Step:
    """One step, simulated: every rank takes its own time for each layer, and its group waits for the slowest."""
    geometry = Geometry()
    b = sequences / plan.sequences / plan.layers  # of one stage at a time
    heads, rows = geometry.heads / plan.heads, math.ceil(tokens / plan.pages)
    layers = math.ceil(geometry.layers / plan.layers)
    weights = (geometry.whole + geometry.by_heads / plan.heads) * ELEMENT
    computed = weights / parts.weights + parts.attention(heads, b * rows)
    state, out = b * heads * (geometry.d_c * ELEMENT + 4), b * geometry.hidden * ELEMENT
    gathered = link.all_gather(plan.pages, state) if plan.pages > 1 else 0.0
    added = link.all_reduce(plan.heads, out) if plan.heads > 1 else 0.0
    handed = link.send(out) if plan.layers > 1 else 0.0
    slowest = _slowest(plan.heads * plan.pages, layers, parts.spread, seed)
    stage = computed * slowest + layers * (gathered + added) + handed
    seconds = plan.layers * stage
    sent = layers * ((plan.pages - 1) * state + 2 * (plan.heads - 1) / plan.heads * out) + out * (plan.layers > 1)
    return Step(
        plan=plan,
        seconds=seconds,
        tokens=sequences / seconds,
        weights=layers * weights,
        cache=layers * b * plan.layers * rows * geometry.row,
        sent=plan.layers * sent,
        waiting=max(0.0, 1 - layers * computed / stage),
    )


def _slowest(group: int, layers: int, spread: float, seed: int) -> float:
    """The sum over layers of the slowest rank's time, where a rank's is 1 in the middle: the mean of some trials."""
    times = np.random.default_rng(seed).lognormal(0.0, spread, (TRIALS, layers, group))
    return float(times.max(axis=2).sum(axis=1).mean())


def best(ranks: int, sequences: int, tokens: int, parts: Parts, link: Link) -> Step:
    """The plan with the most tokens per second."""
    found = (step(plan, sequences, tokens, parts, link) for plan in plans(ranks, sequences, Geometry()))
    return max(found, key=lambda each: each.tokens)


def rows_of(results: Mapping[str, Any], group: str) -> list[Mapping[str, Any]]:
    return [row for row in results["results"] if row["case"]["group"] == group]


def measured(row: Mapping[str, Any], name: str = OURS) -> float:
    """Seconds of one call."""
    seconds: float = row["timings"][name]["median"] / row["case"]["times"]
    return seconds


def parts_of(results: Mapping[str, Any]) -> Parts:
    """From the results of the suite ``dist``."""
    heads = rows_of(results, dist.HEADS)
    seconds = {r["case"]["h_q"]: measured(r) / (r["case"]["b"] * r["case"]["s_kv"]) for r in heads}
    spreads = [math.log(r["timings"][OURS]["q3"] / r["timings"][OURS]["q1"]) / QUARTILES for r in heads]
    rate = results["limits"]["dram_read"] / results["host"]["threads"]
    return Parts(seconds, statistics.median(spreads), rate, _link_of(rows_of(results, dist.MESSAGES)))


def _link_of(messages: Sequence[Mapping[str, Any]]) -> Link:
    """From what two ranks tell each other: the latency of the least, and the rate at which more takes longer."""
    both = [r for r in messages if (r["case"]["way"], r["case"]["ranks"]) == ("all_gather", 2)]
    sends = {r["case"]["bytes"]: measured(r) for r in both}
    (small, fast), (large, slow) = min(sends.items()), max(sends.items())
    rate = (large - small) / (slow - fast)
    return Link("gloo on one machine", fast - small / rate, rate)


def links(parts: Parts) -> list[Link]:
    """The measured one, and two networks on paper."""
    return [parts.link, Link("25 Gb/s, 20 us", 20e-6, 25e9 / 8), Link("400 Gb/s, 5 us", 5e-6, 400e9 / 8)]


def check(results: Mapping[str, Any], parts: Parts) -> list[list[object]]:
    """What the parts say of what was measured as a whole: a row for each."""
    found: list[tuple[str, float, float]] = []
    for row in rows_of(results, dist.OPERATOR):
        case, n = row["case"], row["case"]["ranks"]
        rows, out = case["b"] * case["s_kv"], case["b"] * case["h_q"] * Geometry().d_c * ELEMENT
        if case["way"] == "pages":
            said = parts.attention(case["h_q"], rows / n) + parts.link.all_gather(n, out)
        else:
            heads = case["h_q"] / (n if case["way"] == "heads" else 1)
            part = rows if case["way"] == "heads" else rows / n
            said = parts.attention(heads, part) + parts.link.all_gather(n, out / n)
        found.append((f"decode by {case['way']}, {n} ranks, {case['s_kv']} tokens", said, measured(row)))
    for row in rows_of(results, dist.MESSAGES):
        case = row["case"]
        if case["way"] != "send":
            said = getattr(parts.link, case["way"])(case["ranks"], case["bytes"])
            found.append((f"{case['way']}, {case['ranks']} ranks, {case['bytes']} B", said, measured(row)))
    return [[name, f"{a * 1e3:.3f}", f"{b * 1e3:.3f}", f"{a / b:.2f}"] for name, a, b in found]


def document(results: Mapping[str, Any]) -> str:
    parts = parts_of(results)
    text = [HEAD.format(host=results["host"]["microarchitecture"], date=results["date"][:10], layers=Geometry().layers)]
    link = parts.link
    per_row = [[heads, f"{seconds * 1e9:.0f}"] for heads, seconds in sorted(parts.seconds.items())]
    text.append(markdown(["heads of a rank", "ns a row"], per_row))
    text.append(
        f"\nA message takes {link.latency * 1e6:.0f} us and {link.rate / 1e9:.2f} GB/s; weights are read with"
        f" {parts.weights / 1e9:.1f} GB/s; a part's time varies by {parts.spread:.1%} (standard deviation).\n"
    )
    text.append("## The parts against the whole\n")
    text.append(markdown(["measured as one", "from parts, ms", "measured, ms", "ratio"], check(results, parts)))
    for each in links(parts):
        text.append(f"\n## {each.name}\n")
        header = ["sequences", "tokens", "ranks", "plan", "ms a step", "tokens/s", "scaling"]
        header += ["weights, GB", "cache, GB", "sent, MB", "waiting"]
        text.append(markdown(header, list(_table(parts, each)), texts=4))
    return "\n".join(text) + "\n"


def _table(parts: Parts, link: Link) -> Iterator[list[object]]:
    for sequences, tokens in LOADS:
        first: Step | None = None
        for ranks in RANKS:
            found = best(ranks, sequences, tokens, parts, link)
            first = first or found
            scaling = found.tokens / first.tokens / (ranks / RANKS[0])
            yield [
                *(sequences, tokens, ranks, found.plan, f"{found.seconds * 1e3:.0f}", f"{found.tokens:.3g}"),
                *(f"{scaling:.0%}", f"{found.weights / 1e9:.2f}", f"{found.cache / 1e9:.2f}"),
                *(f"{found.sent / 1e6:.2f}", f"{found.waiting:.0%}"),
            ]


HEAD = """# Many ranks, on paper

Written by `python -m bench.scale` from what `python -m bench dist` measured on {host} ({date}); nothing here was run on
more than four processes. A rank is one thread of that machine. A step decodes one token of every sequence through the
{layers} attention layers of DeepSeek-V3, without MLPs and experts. Of all plans the one with the most tokens per second
is shown: how many ranks layers, heads, pages and sequences are cut into. Every rank takes its own time for each layer,
drawn from what was measured, and those that exchange wait for the slowest. Messages go around a ring, as gloo sends
them. "Scaling" is tokens per second for each rank, beside 8 ranks. Bytes are those of one rank, sent ones in one step.
Where the parts are set against the whole, a ratio below 1 says that they promise too much: there ranks shared two cores
with the threads that carry their messages.

## The parts
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    parser.add_argument("--results", type=Path, help="of the suite dist; default: the newest of bench/results")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    options = parser.parse_args()
    paths = [options.results] if options.results else RESULTS.glob("dist-*threads.json")
    newest = max((json.loads(path.read_text()) for path in paths), key=lambda results: results["date"])
    options.document.write_text(document(newest))
    print(f"wrote {options.document}")


if __name__ == "__main__":
    main()
