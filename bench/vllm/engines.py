"""Processes with engines of vLLM, told what to do through a pipe."""

from __future__ import annotations

import json
import subprocess
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import timing, vllm


class Engine:
    """A process of `bench.vllm.engine` that has done one decoding step; ``logits`` [b, vocab_size] are that step's.

    It ends with the object. Raises RuntimeError where the process fails; what it said is in a file beside its logits.
    """

    def __init__(self, name: str, job: dict[str, Any], folder: Path, *, ours: bool) -> None:
        self.said = folder / f"{name}.log"
        path = folder / f"{name}.pt"
        log = self.said.open("w")
        self.process = subprocess.Popen(
            [vllm.python(), "-m", "bench.vllm.engine"],
            env=vllm.environment(torch.get_num_threads(), ours=ours),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        timing.OTHERS.add(self.process.pid)
        weakref.finalize(self, _end, self.process)
        self._ask(json.dumps(job | {"logits": str(path)}))
        self.logits: Tensor = torch.load(path)

    def steps(self, n: int) -> Tensor:
        """Decode n tokens of every sequence; returns the logits of the first step there was."""
        self._ask(str(n))
        return self.logits

    def _ask(self, line: str) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        if not self.process.stdout.readline():
            raise RuntimeError(f"vLLM failed:\n{self.said.read_text()[-3000:]}")


def _end(process: subprocess.Popen[str]) -> None:
    timing.OTHERS.discard(process.pid)
    process.kill()
    process.wait()
