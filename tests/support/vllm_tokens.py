"""Run by vLLM's Python: reads a job as JSON, and writes greedy tokens, their log-probabilities and cached lengths."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

#: One process, so that an engine ends with it.
SETTINGS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"}


def _chosen(output: Any) -> list[float]:
    return [of[token].logprob for token, of in zip(output.token_ids, output.logprobs, strict=True)]


def main() -> None:
    os.environ.update(SETTINGS | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"})
    from vllm import LLM, SamplingParams

    job = json.loads(sys.stdin.read())
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8}
    engine = LLM(model=job["model"], skip_tokenizer_init=True, **options | job["options"])
    wanted = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, logprobs=0)
    rounds = [
        engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], wanted, use_tqdm=False)
        for prompts in job["rounds"]
    ]
    found = {
        "tokens": [[list(each.outputs[0].token_ids) for each in made] for made in rounds],
        "logprobs": [[_chosen(each.outputs[0]) for each in made] for made in rounds],
        "cached": [[each.num_cached_tokens for each in made] for made in rounds],
    }
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
