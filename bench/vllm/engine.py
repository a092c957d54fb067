"""Run by vLLM's Python: an engine whose sequences all have their prompts, and which decodes as it is told.

Reads a `Job` as its first line. Answers with the path of the logits of the first decoding step, then one line for each
line that it reads, a number of steps to take.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

#: The token that every sequence gets, so that all engines decode the same.
TOKEN = 7


def mend_rotary() -> None:
    """vLLM 0.32 rotates queries of DeepSeek's models for wrong positions: without this its own logits are wrong."""
    from flashmla_ops.integrations.vllm import platform

    platform.mend_rotary()


class Decoding:
    """An engine behind the prompts of a job."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams

        mend_rotary()
        self.b = len(job["prompts"])
        engine = LLM(
            model=job["model"],
            skip_tokenizer_init=True,
            max_num_seqs=self.b,
            enable_prefix_caching=False,
            **job["options"],
        )
        self.engine = engine.llm_engine
        self.logits = self._watch()
        sampling = SamplingParams(
            temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False, allowed_token_ids=[TOKEN]
        )
        for i, prompt in enumerate(job["prompts"]):
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        while len(begun) < self.b:
            begun |= {output.request_id for output in self.engine.step()}

    def _watch(self) -> list[Any]:
        """A list that has the logits of the last step."""
        model = self.engine.model_executor.driver_worker.worker.model_runner.model
        seen: list[Any] = []
        compute = model.compute_logits

        def compute_logits(*arguments: Any, **options: Any) -> Any:
            logits = compute(*arguments, **options)
            seen[:] = [logits.clone()]  # the sampler masks them in place
            return logits

        model.compute_logits = compute_logits
        return seen

    def step(self) -> None:
        """One token of every sequence. Raises RuntimeError where some have none left."""
        if (got := len(self.engine.step())) != self.b:
            raise RuntimeError(f"a step of {self.b} sequences gave {got} of them a token")


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # What vLLM prints must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    job = json.loads(sys.stdin.readline())
    decoding = Decoding(job)
    decoding.step()
    torch.save(decoding.logits[0].float(), job["logits"])
    print(job["logits"], file=answers, flush=True)
    for line in sys.stdin:
        for _ in range(int(line)):
            decoding.step()
        print("done", file=answers, flush=True)


if __name__ == "__main__":
    main()
