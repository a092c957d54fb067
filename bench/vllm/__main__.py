"""``python -m bench.vllm``: servers under load, on our attention and on vLLM's own, in the same run.

Both serve the same model, and take turns with halves of the same requests. Then clients of ours are killed, and it gets
requests that are wrong. Ends with 1 where a request was lost, a page stayed taken, or an error has no type.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench import runner, vllm
from bench.cpu import this_cpu
from bench.report import RESULTS
from bench.vllm import checkpoints, load
from bench.vllm.server import Server, served
from cutlass_kernels.tables import markdown, place
from flashmla_ops.integrations.vllm.checkpoint import TINY

#: The document with the table, between the marks of this name.
DOCUMENT, MARK = runner.ROOT / "docs" / "serving.md", "load"
OURS, THEIRS = "flashmla", "vLLM's own"
LAYERS, HIDDEN_SIZE = 2, 512
KILLED = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.vllm", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--groups", nargs="+", choices=(checkpoints.MLA, checkpoints.GQA), default=["MLA", "GQA"])
    parser.add_argument("--quick", action="store_true", help="40 requests of 8 clients, not compiled: a look")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder for the JSON")
    return parser.parse_args()


def words(folder: str, clients: int, eager: bool) -> list[str]:
    options = {"--model": folder, "--served-model-name": load.MODEL, "--max-model-len": str(load.MAX_LENGTH)}
    options |= {"--max-num-seqs": str(clients), "--dtype": "bfloat16"}
    return [word for option in options.items() for word in option] + (["--enforce-eager"] if eager else [])


def compare(group: str, requests: list[load.Request], clients: int, eager: bool) -> dict[str, Any]:
    """Both servers of a group: summaries by name, and what became of clients that died and requests that were wrong."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        checkpoints.write(group, Path(folder), LAYERS, HIDDEN_SIZE)
        shutil.copy(TINY / "tokenizer.json", folder)
        threads = torch.get_num_threads()
        servers: dict[str, Server] = {
            name: stack.enter_context(served(words(folder, clients, eager), ours=name == OURS, threads=threads))
            for name in (OURS, THEIRS)
        }
        answers: dict[str, list[load.Answer]] = {name: [] for name in servers}
        seconds = dict.fromkeys(servers, 0.0)
        half = len(requests) // 2
        for part in (requests[:half], requests[half:]):
            for name, server in servers.items():
                load.run(server, part[:4], 2)  # what the first requests compile or allocate is not timed
                made, took = load.run(server, part, clients)
                answers[name] += made
                seconds[name] += took
        ours = servers[OURS]
        load.kill_clients(ours, KILLED)
        found = {
            "running": ours.until("num_requests_running", 0),
            "kv_cache_usage": ours.until("kv_cache_usage_perc", 0),
            "wrong_requests_without_a_typed_error": load.wrong_requests(ours),
        }
        summaries = {name: load.summarize(requests, answers[name], seconds[name]).as_dict() for name in servers}
        return {"group": group, "servers": summaries, "after_killed_clients": found}


def failures(result: dict[str, Any]) -> list[str]:
    after = result["after_killed_clients"]
    found = [f"{name} lost {each['lost']} requests" for name, each in result["servers"].items() if each["lost"]]
    if after["running"] or after["kv_cache_usage"]:
        found.append(f"{KILLED} clients were killed, and the server still works for them or holds their pages")
    found += [f"{name}: no typed error" for name in after["wrong_requests_without_a_typed_error"]]
    return [f"{result['group']}: {each}" for each in found]


def table(results: list[dict[str, Any]]) -> str:
    header = ["model", "server", "requests", "lost", "tokens/s", "first token p50", "p99", "last token p50", "p99"]
    rows = []
    for result in results:
        for name, each in result["servers"].items():
            times = [f"{each[key]:.2f} s" for key in ("first_p50", "first_p99", "last_p50", "last_p99")]
            counts = [str(each["requests"]), str(each["lost"]), f"{each['tokens_per_second']:.0f}"]
            rows.append([result["group"], name, *counts, *times])
    return markdown(header, rows, texts=2)


def chapter(whole: dict[str, Any]) -> str:
    """The table, and what it is of."""
    about = f"{whole['requests']} requests of {whole['clients']} clients, {whole['threads']} threads of {whole['cpu']}"
    return f"{about}, {whole['date'][:10]} (`{whole['command']}`):\n\n{table(whole['load'])}"


def main() -> int:
    options = parse()
    if reason := vllm.missing():
        print(reason, file=sys.stderr)
        return 1
    requests, clients = (40, 8) if options.quick else (options.requests, options.clients)
    made = load.trace(requests)
    results = [compare(group, made, clients, options.quick) for group in options.groups]
    print(table(results))
    whole = {
        "load": results,
        "requests": requests,
        "clients": clients,
        "command": runner.command(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": runner.commit(),
        "versions": runner.versions(),
        "cpu": this_cpu().microarchitecture,
        "threads": torch.get_num_threads(),
    }
    path = options.out / ("serve-load-quick.json" if options.quick else "serve-load.json")
    path.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"wrote {path}")
    if path == RESULTS / "serve-load.json":
        place(DOCUMENT, MARK, chapter(whole))
    wrong = [each for result in results for each in failures(result)]
    print("\n".join(wrong), file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
