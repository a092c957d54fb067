"""``python -m bench.quality``: measure, and write the tables of docs/sparsity.md and docs/quantize.md.

    python -m bench.quality run smollm2 --weights FOLDER --lengths 2048 8192 --texts 2 --decoded 128 --needles 10
    python -m bench.quality run tiny_mla_lm --lengths 1024
    python -m bench.quality quant smollm2 --weights FOLDER --speed
    python -m bench.quality quant tiny_mla_lm
    python -m bench.quality tiles smollm2 --weights FOLDER --length 8192
    python -m bench.quality table

FOLDER holds SmolLM2-135M-Instruct as transformers saves it. Results go to bench/quality/results, one file a model, in
which those of other lengths stay.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import flashmla_ops
from bench.quality import tiles, weights
from bench.quality.evaluate import evaluate
from bench.quality.table import RESULTS, write
from bench.quality.texts import documentation, haystacks
from flashmla_ops.sparsity import DynamicSparsity

TINY = Path(flashmla_ops.__file__).parent / "fixtures" / "tiny_mla_lm"


def selectors() -> dict[str, DynamicSparsity]:
    """Every way to choose. ``boxes`` keeps a share of pages, the others as many as matter."""
    return {
        "certified, eps 0.1": DynamicSparsity("certified", eps=0.1),
        "certified, eps 0.05": DynamicSparsity("certified", eps=0.05),
        "estimate, tau 0.01": DynamicSparsity("estimate", tau=0.01),
        "estimate, tau 0.005": DynamicSparsity("estimate", tau=0.005),
        "lsh, tau 0.01": DynamicSparsity("lsh", tau=0.01),
        "spread, tau 0.01": DynamicSparsity("spread", tau=0.01),
        "boxes, keep 0.4": DynamicSparsity("boxes", keep=0.4),
        "first page and last two": DynamicSparsity("mask", mask=torch.zeros(1, 1, 4096, dtype=torch.bool)),
    }


def run(arguments: argparse.Namespace) -> None:
    folder = folder_of(arguments)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = tokenizer_of(folder)
    file = RESULTS / f"{arguments.model}.json"
    before = json.loads(file.read_text()) if file.exists() else []
    rows = [row for row in before if row["length"] not in arguments.lengths]
    with torch.no_grad():
        for length in arguments.lengths:
            ids = documentation(tokenizer, arguments.texts, length)
            depths = [(i + 0.5) / arguments.needles for i in range(arguments.needles)]
            stacks = haystacks(tokenizer, length, depths, n_needles=1 + 2 * arguments.distractors)
            measured = evaluate(arguments.model, model, tokenizer, ids, arguments.decoded, stacks, selectors())
            rows += [row.as_json() for row in measured]
            print(*measured, sep="\n", flush=True)
            RESULTS.mkdir(exist_ok=True)
            file.write_text(json.dumps(sorted(rows, key=lambda row: row["length"]), indent=1) + "\n")


def folder_of(arguments: argparse.Namespace) -> Path:
    return TINY if arguments.model == TINY.name else arguments.weights


def tokenizer_of(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(folder / "tokenizer.json")))


def run_quant(arguments: argparse.Namespace) -> None:
    """Texts lie apart in turns: one to calibrate, the next to measure."""
    folder = folder_of(arguments)
    ids = documentation(tokenizer_of(folder), 2 * arguments.texts, arguments.length)
    options = {"tolerance": arguments.tolerance, "speed": arguments.speed}
    weights.write_results(weights.measure(arguments.model, folder, ids[::2], ids[1::2], **options))


def run_tiles(arguments: argparse.Namespace) -> None:
    folder = folder_of(arguments)
    ids = documentation(tokenizer_of(folder), 1, arguments.length)
    tiles.write_results(tiles.measure(arguments.model, folder, ids))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run")
    measure.add_argument("model", choices=["smollm2", TINY.name])
    measure.add_argument("--weights", type=Path)
    measure.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    measure.add_argument("--texts", type=int, default=4)
    measure.add_argument("--decoded", type=int, default=256)
    measure.add_argument("--needles", type=int, default=20)
    measure.add_argument("--distractors", type=int, choices=[0, 1], default=0)
    quant = commands.add_parser("quant", help="quantised weights: bits, bytes, perplexity")
    quant.add_argument("model", choices=["smollm2", TINY.name])
    quant.add_argument("--weights", type=Path)
    quant.add_argument("--length", type=int, default=512)
    quant.add_argument("--texts", type=int, default=8, help="to calibrate, and as many to measure")
    quant.add_argument("--tolerance", type=float, default=0.01, help="of perplexity, for the mix that is chosen")
    quant.add_argument("--speed", action="store_true", help="tokens/s too: keeps the model in every format in memory")
    skipped = commands.add_parser("tiles", help="tiles of prefill's second product that no query gives weight to")
    skipped.add_argument("model", choices=["smollm2", TINY.name])
    skipped.add_argument("--weights", type=Path)
    skipped.add_argument("--length", type=int, default=8192, help="a multiple of 64")
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        write()
    elif arguments.model == "smollm2" and arguments.weights is None:
        parser.error("smollm2 needs --weights")
    elif arguments.command == "quant":
        run_quant(arguments)
    elif arguments.command == "tiles":
        run_tiles(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
