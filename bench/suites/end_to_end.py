"""Suite ``end_to_end``: a decode step of a whole model at DeepSeek-V2-Lite's geometry, which its weights bound."""

from __future__ import annotations

import itertools
from functools import partial

from bench import steps
from bench.peers import transformers_mla
from bench.steps import StepCase, StepInputs
from bench.suite import Peer, Suite

NAME = "end_to_end"


def cases(quick: bool) -> list[StepCase]:
    if quick:
        return [StepCase(1024, "bf16", "eager")]
    shapes = itertools.product(("bf16", "fp32"), ("eager", "compiled"), (1024, 4096, 16384))
    batches = itertools.product(("bf16", "fp32"), ("eager", "compiled"))
    return [
        *(StepCase(s_kv, dtype, mode) for dtype, mode, s_kv in shapes),
        *(StepCase(1024, dtype, mode, 8, steps.PANELS) for dtype, mode in batches),
    ]


def rows_already(inputs: StepInputs) -> str | None:
    return None if inputs.case.group == steps.PANELS else "the case itself"


PEERS = (
    *transformers_mla.PEERS,
    Peer("flashmla, no panels", "weights as they were", steps.bind_flashmla, unfair=rows_already),
)
SUITE = Suite(NAME, "a decode step of a whole model", cases, partial(steps.problem, NAME), PEERS)
