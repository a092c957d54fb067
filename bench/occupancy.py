"""Memory of the traces of the suite ``pool``, and the slowest of single allocations: a table of a run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from bench import serving
from bench.peers import vllm_blocks
from flashmla_ops.kv_cache.native_pages import NativePages

OURS = "flashmla"
#: The same pool, with the rows of a model that decodes the trace.
DECODED = "flashmla, decoding"
CALLS = 20_000


def of_suite(suite: str) -> list[dict[str, Any]]:
    """A row for each trace and policy, and for each way to allocate; none for other suites."""
    if suite != "pool":
        return []
    rows: list[dict[str, Any]] = []
    for page_size, shared in serving.TRACES:
        requests = serving.trace(serving.REQUESTS, shared)
        for name, policy in policies(page_size).items():
            figures = serving.simulate(requests, policy(), watch=True).figures()
            rows.append({"policy": name, "page_size": page_size, "shared": shared} | figures)
    from bench import decoding  # transformers takes seconds to import, and no other suite needs it

    page_size, shared = serving.TRACES[0]
    figures = decoding.figures(serving.trace(serving.REQUESTS, shared), serving.MEMORY, page_size)
    rows.append({"policy": DECODED, "page_size": page_size, "shared": shared} | figures)
    return rows + [{"policy": name} | latencies(*pair) for name, pair in allocations().items()]


def policies(page_size: int) -> dict[str, Callable[[], serving.Policy]]:
    found: dict[str, Callable[[], serving.Policy]] = {
        OURS: lambda: serving.Ours(serving.MEMORY, page_size),
        "contiguous, reserved": lambda: serving.Reserved(serving.MEMORY),
        "contiguous, growing": lambda: serving.Growing(serving.MEMORY),
    }
    if vllm_blocks.missing() is None:
        found[vllm_blocks.NAME] = lambda: serving.Blocks(serving.MEMORY, page_size, vllm_blocks.new)
    return found


def allocations() -> dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]:
    """Ways to allocate a page and to release it."""
    pages = NativePages(4096, 16)
    found: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
        OURS: (pages.allocate_one, pages.release_one)
    }
    if vllm_blocks.missing() is None:
        blocks = vllm_blocks.new(4096)
        found[vllm_blocks.NAME] = (lambda: blocks.get_new_blocks(1), blocks.free_blocks)
    return found


def latencies(allocate: Callable[[], Any], release: Callable[[Any], object]) -> dict[str, float]:
    """Percentiles of single calls in seconds, what the clock takes included."""
    taken: dict[str, list[int]] = {"allocate": [], "release": []}
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        page = allocate()
        between = time.perf_counter_ns()
        release(page)
        end = time.perf_counter_ns()
        taken["allocate"].append(between - start)
        taken["release"].append(end - between)
    found: dict[str, float] = {}
    for name, times in taken.items():
        cuts = statistics.quantiles(times, n=1000)
        found |= {f"{name}_p{label}": cuts[i] * 1e-9 for label, i in (("50", 499), ("99", 989), ("99.9", 998))}
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown of both."""
    traces, single = ([row for row in rows if ("utilisation" in row) == wanted] for wanted in (True, False))
    by_trace = [
        [
            row["page_size"],
            f"{row['shared']:.0%}",
            row["policy"],
            f"{row['utilisation']:.1%}",
            f"{row['context']:,.0f}",
            f"{row['most_context']:,}",
            row["steps"],
            row["preempted"],
            f"{row['tokens_per_second']:,.0f}" if "tokens_per_second" in row else "",
        ]
        for row in traces
    ]
    header = ["page", "shared", "policy", "utilisation", "context", "most", "steps", "preempted", "tokens/s"]
    percentiles = [key for row in single[:1] for key in row if key != "policy"]
    by_call = [[row["policy"], *(f"{row[key] * 1e6:.2f}" for key in percentiles)] for row in single]
    return "\n\n".join(
        [
            "Memory of the same traces: of what was given out, the part that held tokens; and the tokens of all running"
            " requests together, on average and at most, over the steps in which a request waited for memory. One is"
            " decoded to the end, by a model of 4 layers.",
            tabulate(by_trace, header, "pipe", disable_numparse=True),
            "A page allocated and released, in µs, what the clock takes included.",
            tabulate(by_call, ["", *(key.replace("_", " ") for key in percentiles)], "pipe", disable_numparse=True),
        ]
    )
