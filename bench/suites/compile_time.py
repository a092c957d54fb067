"""Suite ``compile_time``: from a trained model to the first logits of its compiled decode step.

In a ``warm`` process everything is loaded and nothing of this step is compiled; ``cached``, Inductor's cache on disk
has it. A ``second`` process finds it there too, and its time is that of the whole process: it starts Python, imports
torch and transformers and loads the model.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import steps
from bench.peers import no_compiler, transformers_mla
from bench.runner import OURS, ROOT, Problem, Work
from bench.steps import StepCase, StepInputs
from bench.suite import Bound, Peer, Suite, describe, make_problem
from lowering import versions

NAME = "compile_time"
CONTEXT = 64
INDUCTOR = "transformers SDPA"
BINDERS: Mapping[str, Callable[[StepInputs], Bound]] = {
    OURS: steps.bind_ours,
    INDUCTOR: transformers_mla.bind_sdpa,
}


@dataclass(frozen=True)
class CompileCase:
    process: str  # warm, cached or second
    dtype: str = "fp32"


def tiny_inputs() -> StepInputs:
    """The trained model of the demo, with a cache of `CONTEXT` tokens."""
    from transformers import AutoModelForCausalLM

    from flashmla_ops.demo.text import MODEL

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="sdpa").eval()
    return steps.make_inputs(StepCase(CONTEXT, "fp32", "compiled"), model.requires_grad_(False))


def compiled_anew(inputs: StepInputs, bind: Callable[[StepInputs], Bound], *, cached: bool) -> Bound:
    def first_step() -> Any:
        torch.compiler.reset()
        with contextlib.nullcontext() if cached else versions.without_caches():
            return bind(inputs)()

    return first_step


def in_a_process(name: str) -> Bound:
    """The first step of a process of its own; from the second on, with a full cache."""
    folder = tempfile.TemporaryDirectory()  # as long as somebody may call

    def first_step() -> Tensor:
        logits = Path(folder.name) / "logits.pt"
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder.name}/cache"}
        words = [sys.executable, "-m", "bench.suites.compile_time", name, str(logits)]
        subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
        result: Tensor = torch.load(logits)
        return result

    return first_step


def bound(name: str, case: CompileCase) -> Callable[[StepInputs], Bound]:
    if case.process == "second":
        return lambda _: in_a_process(name)
    return lambda inputs: compiled_anew(inputs, BINDERS[name], cached=case.process == "cached")


def problem(case: CompileCase, peers: Sequence[Peer[Any]], cold_bytes: int) -> Problem:
    """``cold_bytes`` does not matter: compiling reads no memory to speak of."""
    inputs = tiny_inputs()
    work = Work(describe(case, NAME), asdict(case), flops=0, bytes=0, dtype=torch.float32, tolerance=1e-3)
    chosen = [Peer(p.name, p.description, bound(p.name, case), p.missing) for p in peers]
    return make_problem(work, inputs, [()], bound(OURS, case), chosen, steps.exact(inputs))


def cases(quick: bool) -> list[CompileCase]:
    return [CompileCase(process) for process in (("warm",) if quick else ("warm", "cached", "second"))]


PEERS = (Peer(INDUCTOR, "the model as it is, under Inductor alone", transformers_mla.bind_sdpa, missing=no_compiler),)
SUITE = Suite(NAME, "compiling a small model, with and without a cache", cases, problem, PEERS)


def main(name: str, logits: str) -> None:
    with torch.no_grad():
        torch.save(BINDERS[name](tiny_inputs())(), logits)


if __name__ == "__main__":
    main(*sys.argv[1:])
