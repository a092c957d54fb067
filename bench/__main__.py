"""``python -m bench``: see the package's docstring, or ``--help``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench import decode, peers, report, runner, timing
from bench.limits import DRAM_BUFFER_OF_L3, LimitMeter


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time operators against peers and limits.")
    actions = parser.add_subparsers(dest="action", required=True)
    suite = actions.add_parser(decode.NAME, help=decode.__doc__)
    suite.add_argument("--quick", action="store_true", help="small cases, few blocks: a look, not a measurement")
    suite.add_argument("--dtype", nargs="+", choices=decode.DTYPES, default=["bf16", "fp32"])
    suite.add_argument("--peers", nargs="*", metavar="NAME", help=f"of {', '.join(p.name for p in peers.PEERS)}")
    suite.add_argument("--case", action="append", type=shape, metavar="B,H_Q,S_KV", help="this case only; repeatable")
    suite.add_argument("--out", type=Path, help="the JSON to write (default: in bench/results)")
    for action in (suite, actions.add_parser("limits", help="measure and print the machine's limits")):
        action.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    actions.add_parser("table", help="write the README's tables from bench/results")
    return parser.parse_args(arguments)


def shape(text: str) -> tuple[int, int, int]:
    b, h_q, s_kv = (int(number) for number in text.split(","))
    return b, h_q, s_kv


def run_decode(options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    wanted = decode.cases(quick=options.quick, dtypes=options.dtype)
    if options.case:
        wanted = [decode.DecodeCase(b, h_q, s_kv, dtype) for dtype in options.dtype for b, h_q, s_kv in options.case]
    with LimitMeter(options.threads) as meter:
        cold_bytes = DRAM_BUFFER_OF_L3 // 2 * meter.cpu.l3_bytes
        results = runner.run(
            decode.NAME,
            decode.problems(wanted, peers.select(options.peers), cold_bytes),
            timing.QUICK if options.quick else timing.Budget(),
            meter,
        )
    path: Path = options.out or runner.default_path(results, quick=options.quick)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}")
    if wrong := runner.wrong(results):
        print(f"{runner.OURS} is WRONG in {len(wrong)} cases: {wrong}", file=sys.stderr)
    return 1 if wrong else 0


def print_limits(options: argparse.Namespace) -> int:
    with LimitMeter(options.threads) as meter:
        meter.measure()
        print(json.dumps(asdict(meter.limits()), indent=1))
    return 0


def main() -> int:
    options = parse()
    timing.sleep_when_idle()
    match options.action:
        case "table":
            report.write_tables()
            return 0
        case "limits":
            return print_limits(options)
        case _:
            return run_decode(options)


if __name__ == "__main__":
    sys.exit(main())
