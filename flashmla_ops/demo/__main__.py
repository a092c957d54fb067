"""Run the demo. Its last line says whether FlashMLA gave the right tokens, and how much faster a step became."""

from __future__ import annotations

import sys
import traceback
import warnings
from pathlib import Path

import torch

from flashmla_ops import capability
from flashmla_ops.demo.timing import read_bandwidth, sleep_when_idle

try:
    import transformers
    from tqdm import tqdm  # type: ignore[import-untyped]

    from flashmla_ops.demo import report, steps, text
except ModuleNotFoundError as error:
    sys.exit(f"demo: FAILED {error.name} is not installed: pip install 'flashmla-ops[demo]'")

CHART = Path("demo_output") / "decode_step.png"
STAGES = 12


def main() -> int:
    """Returns the exit code: 0 if everything was right."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # DeepSeek-V2's rotary embedding is complex; Inductor leaves it to torch, and says so.
    warnings.filterwarnings("ignore", message="Torchinductor does not support code generation for complex")
    try:
        last_line, code = run()
    except Exception as error:
        traceback.print_exc()
        last_line, code = f"demo: FAILED {type(error).__name__}: {error}".splitlines()[0], 1
    print(last_line, flush=True)
    return code


@torch.no_grad()
def run() -> tuple[str, int]:
    """All sections in turn; the last line to print, and the exit code."""
    print(capability.explain(), flush=True)
    with tqdm(total=STAGES, bar_format="{bar:24} {n_fmt}/{total_fmt} [{elapsed}] {desc}", leave=False) as bar:

        def advance(stage: str) -> None:
            bar.set_description_str(stage, refresh=False)
            bar.update()

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


if __name__ == "__main__":
    sleep_when_idle()
    sys.exit(main())
