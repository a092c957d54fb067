"""Run the demo. Its last line says whether FlashMLA gave the right tokens, and how much faster a step became."""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch

from flashmla_ops import capability
from flashmla_ops.demo.timing import read_bandwidth, sleep_when_idle

try:
    import transformers
    from tqdm import tqdm  # type: ignore[import-untyped]

    from flashmla_ops.demo import chat, report, steps, text
except ModuleNotFoundError as error:
    sys.exit(f"demo: FAILED {error.name} is not installed: pip install 'flashmla-ops[demo]'")

CHART = Path("demo_output") / "decode_step.png"
CHAT_CHART = Path("demo_output") / "smollm2.png"
STAGES, CHAT_STAGES = 12, 5
#: Models by their names on the command line; the first is the one that this package carries.
MODELS = ("tiny", "smollm2")


def main(model: str = MODELS[0]) -> int:
    """Returns the exit code: 0 if everything was right."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSeek-V2's rotary embedding is complex; Inductor leaves it to torch, and says so.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    try:
        last_line, code = run() if model == MODELS[0] else run_chat()
    except Exception as error:
        traceback.print_exc()
        last_line, code = f"demo: FAILED {type(error).__name__}: {error}".splitlines()[0], 1
    print(last_line, flush=True)
    return code


@torch.no_grad()
def run() -> tuple[str, int]:
    """All sections in turn; the last line to print, and the exit code."""
    print(capability.explain(), flush=True)
    with _progress(STAGES) as bar:

        def advance(stage: str) -> None:
            _advance(bar, stage)

        texts = text.run(advance)
        bar.write("\n" + report.text_report(texts) + "\n")
        advance("measuring memory bandwidth")
        bandwidth = read_bandwidth()
        times = steps.run(advance)
        bar.write(report.step_report(times, bandwidth) + "\n")
    report.draw(times, bandwidth, CHART)
    print(f"chart: {CHART}")
    wrong = times.wrong()
    if texts.identical != texts.total:
        wrong.append(f"tokens identical {texts.identical}/{texts.total}")
    if wrong:
        return f"demo: FAILED {'; '.join(wrong)}", 1
    tokens = f"tokens identical {texts.identical}/{texts.total}"
    return f"demo: OK, {tokens}, {times.speedup():.1f}x faster than transformers SDPA at {steps.CONTEXTS[-1]}", 0


@torch.no_grad()
def run_chat() -> tuple[str, int]:
    """SmolLM2's answers; the last line to print, and the exit code."""
    print(capability.explain(), flush=True)
    with _progress(CHAT_STAGES) as bar:
        result = chat.run(lambda stage: _advance(bar, stage))
        bar.write("\n" + report.chat_report(result, chat.QUESTIONS) + "\n")
    report.draw_chat(result, CHAT_CHART)
    print(f"chart: {CHAT_CHART}")
    tokens = f"tokens identical {result.identical}/{result.total}"
    if result.identical != result.total:
        return f"demo: FAILED {tokens}", 1
    ours, theirs = (report.speed(result.generations[name]) for name in (text.COMPILED, text.INDUCTOR))
    return f"demo: OK, {tokens}, {ours / theirs:.1f}x the tokens a second of transformers SDPA compiled", 0


def _progress(stages: int) -> Any:
    return tqdm(total=stages, bar_format="{bar:24} {n_fmt}/{total_fmt} [{elapsed}] {desc}", leave=False)


def _advance(bar: Any, stage: str) -> None:
    bar.set_description_str(stage, refresh=False)
    bar.update()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m flashmla_ops.demo", description=__doc__)
    parser.add_argument("model", nargs="?", choices=MODELS, default=MODELS[0], help="smollm2: real weights, fetched")
    chosen = parser.parse_args().model
    sleep_when_idle()
    sys.exit(main(chosen))
