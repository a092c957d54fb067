"""Suite ``v41_block``: attention of DeepSeek-V4.1 with its norm, rotary embeddings and cast, generated around one call.

Ours is `flashmla_ops.nn.v41_attention`, compiled. A table beside the times says of what programs they are: kernels,
calls and bytes (`bench.programs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.blocks import QUICK, BlockCase, BlockInputs, exact, make_inputs, read
from bench.peers import no_compiler
from bench.runner import Problem, Work
from bench.suite import DTYPES, Bound, Peer, Suite, copies_of, describe, make_problem

NAME = "v41_block"
#: Largest relative error of a row. That of the cast alone, which has three bits behind the point, is 2.7e-2.
TOLERANCE = 5e-2


def bind_ours(inputs: BlockInputs) -> Bound:
    from lowering.backend import flashmla  # by name it is found only where the package is installed

    torch.compiler.reset()
    compiled: Bound = torch.compile(inputs.block, fullgraph=True, dynamic=False, backend=flashmla)
    return compiled


def bind_eager(inputs: BlockInputs) -> Bound:
    return inputs.block


def bind_plain(inputs: BlockInputs) -> Bound:
    compiled: Bound = torch.compile(inputs.plain, fullgraph=True, dynamic=False)
    return compiled


def problem(case: BlockCase, peers: Sequence[Peer[BlockInputs]], cold_bytes: int) -> Problem:
    inputs = make_inputs(case)
    work = Work(describe(case, NAME), asdict(case), case.flops, case.bytes, DTYPES[case.dtype], TOLERANCE)
    copies = copies_of(inputs.caches, cold_bytes)
    return make_problem(work, inputs, copies, bind_ours, peers, exact(inputs), read)


def cases(quick: bool) -> list[BlockCase]:
    if quick:
        return [QUICK]
    grid = [BlockCase(b) for b in (1, 4, 16, 64)]
    return [*grid, BlockCase(16, s_q=2), BlockCase(16, norm=True), BlockCase(16, extra_topk=2048)]


PEERS = (
    Peer("flashmla eager", "the same block without a compiler", bind_eager),
    Peer(
        "torch.compile",
        "gather the rows, dequantise, two products and a softmax, compiled with static shapes by Inductor",
        bind_plain,
        no_compiler,
    ),
)
SUITE = Suite(NAME, "attention of DeepSeek-V4.1 from the norm to the cast", cases, problem, PEERS)
