"""``python -m bench``: see the package's docstring, or ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import compare, report, runner, timing
from bench.limits import DRAM_BUFFER_OF_L3, LimitMeter
from bench.suite import Suite
from bench.suites import SUITES, peer_names, select


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time operators against peers and limits.")
    actions = parser.add_subparsers(dest="action", required=True)
    suites = [actions.add_parser(name, help=suite.description) for name, suite in SUITES.items()]
    suites.append(actions.add_parser("all", help="every suite"))
    for suite in suites:
        suite.add_argument("--quick", action="store_true", help="small cases, few blocks: a look, not a measurement")
        suite.add_argument("--peers", nargs="*", metavar="NAME", help=f"of {', '.join(peer_names())}")
        suite.add_argument(
            "--only",
            nargs="+",
            type=condition,
            default=[],
            metavar="KEY=VALUE[,VALUE]",
            help="the cases of which these hold, such as: b=1,4 h_q=128 dtype=bf16",
        )
        suite.add_argument("--out", type=Path, default=report.RESULTS, help="the folder for the JSON")
    for action in (*suites, actions.add_parser("limits", help="measure and print the machine's limits")):
        action.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    actions.add_parser("table", help="write the tables of README.md and docs/bench.md from bench/results")
    actions.add_parser(
        "plots", help="draw bench/pictures from bench/results, and those that documents show to docs/bench"
    )
    two = actions.add_parser("compare", help="what became slower, beyond noise, from one result to another")
    two.add_argument("old", type=Path)
    two.add_argument("new", type=Path)
    return parser.parse_args(arguments)


def condition(text: str) -> tuple[str, set[str]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(text)
    return key, set(values.split(","))


def matching(cases: Sequence[Any], conditions: Sequence[tuple[str, set[str]]]) -> list[Any]:
    """The cases of which every condition holds; values are compared as text."""
    return [case for case in cases if all(str(getattr(case, key, None)) in values for key, values in conditions)]


def run_suite(suite: Suite, cases: Sequence[Any], options: argparse.Namespace) -> bool:
    """Run and write the results; False if one of ours is wrong."""
    torch.set_num_threads(options.threads)  # the suite before may have chosen another
    budget = timing.QUICK if options.quick else timing.Budget()
    with LimitMeter(options.threads) as meter:
        cold_bytes = DRAM_BUFFER_OF_L3 // 2 * meter.cpu.l3_bytes
        problems = suite.problems(cases, select(suite, options.peers), cold_bytes)
        results = runner.run(suite.name, problems, budget, meter)
    options.out.mkdir(parents=True, exist_ok=True)
    partial = options.quick or options.only or options.peers is not None
    path = options.out / runner.file_name(results, quick=bool(partial))
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
    if wrong := runner.wrong(results):
        print(f"{runner.OURS} is WRONG in {len(wrong)} cases: {wrong}", file=sys.stderr)
    return not wrong


def said_missing(suite: Suite) -> bool:
    """Whether a suite cannot run here, which is then said."""
    if (reason := suite.missing()) is not None:
        print(f"{suite.name} is left out: {reason}", file=sys.stderr)
    return reason is not None


def run_suites(options: argparse.Namespace) -> int:
    suites = SUITES.values() if options.action == "all" else [SUITES[options.action]]
    torch.set_num_threads(options.threads)
    if not (runs := [suite for suite in suites if not said_missing(suite)]):
        return 1
    chosen = [(suite, matching(suite.cases(options.quick), options.only)) for suite in runs]
    if not any(cases for _, cases in chosen):
        print("no case matches --only", file=sys.stderr)
        return 1
    torch.set_grad_enabled(False)
    correct = [run_suite(suite, cases, options) for suite, cases in chosen if cases]
    return 0 if all(correct) else 1


def print_limits(options: argparse.Namespace) -> int:
    with LimitMeter(options.threads) as meter:
        meter.measure()
        print(json.dumps(asdict(meter.limits()), indent=1))
    return 0


def main() -> int:
    options = parse()
    match options.action:
        case "table":
            report.write_tables()
            return 0
        case "plots":
            from bench import plots  # matplotlib is needed for nothing else

            plots.draw_all()
            return 0
        case "compare":
            changes = compare.compare(*(json.loads(path.read_text()) for path in (options.old, options.new)))
            print(compare.table(changes))
            return 1 if compare.regressions(changes) else 0
        case "limits":
            timing.sleep_when_idle()
            return print_limits(options)
        case _:
            timing.sleep_when_idle()
            return run_suites(options)


if __name__ == "__main__":
    sys.exit(main())
