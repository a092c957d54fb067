"""Suite ``dist``: attention and models on several processes of one thread each, beside one such process.

The parts of which a step on many ranks is made are timed too: attention with a rank's share of the heads, and what
ranks send to each other through gloo. `bench.scale` computes with them.
"""

from __future__ import annotations

import atexit
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench import paged, steps
from bench.paged import PagedCase, PagedInputs
from bench.runner import OURS, Problem, Work
from bench.steps import StepCase
from bench.suite import DTYPES, TOLERANCE, Peer, Suite, describe
from flashmla_ops.parallel import local

NAME = "dist"
#: Groups of cases.
OPERATOR, MODEL, HEADS, MESSAGES = "operator", "model", "heads of one rank", "messages"
ONE = "one process"
H_Q = 128
NEW_TOKENS, PROMPT = 16, 64

#: What a rank does at each call: made by a function of this module, kept in the rank's process.
Call = Callable[[], Tensor | None]


@dataclass(frozen=True)
class DistCase:
    way: str  # how work is cut, or what is sent
    ranks: int
    group: str
    b: int = 0
    h_q: int = 0
    s_kv: int = 0
    bytes: int = 0  # of a message
    times: int = 1  # calls that one measurement is made of
    dtype: str = "bf16"


def cases(quick: bool) -> list[DistCase]:
    lengths = (2048,) if quick else (4096, 16384)
    operators = [DistCase(way, 2, OPERATOR, 4, H_Q, s) for way in ("heads", "sequences", "pages") for s in lengths]
    models = [DistCase("model by heads", 2, MODEL, 4, s_kv=1024), DistCase("model by layers", 2, MODEL, 1, s_kv=PROMPT)]
    heads = [1, 16, H_Q] if quick else [1 << i for i in range(8)]
    parts = [DistCase("attention", 1, HEADS, 4, h, 4096, times=max(1, 16 // h)) for h in heads]
    sizes = (4096,) if quick else (4096, 65536, 1 << 20)
    messages = [
        DistCase(way, ranks, MESSAGES, bytes=size, times=20 if size < 1 << 20 else 5)
        for way in ("all_gather", "all_reduce", "send")
        for ranks in ((2,) if quick or way == "send" else (2, 4))
        for size in sizes
    ]
    return [*operators, *([] if quick else models), *parts, *messages]


def problem(case: DistCase, peers: Sequence[Peer[Any]], cold_bytes: int) -> Problem:
    """``cold_bytes`` does not matter: one process of ours is compared with several."""
    made = MAKERS[case.group](case)
    work = Work(describe(case, NAME), asdict(case), made.flops, made.bytes, DTYPES[case.dtype], made.tolerance)
    shared = {name: torch.zeros_like(made.expected, dtype=torch.float32).share_memory_() for name in made.makes}
    for name, (make, ranks) in made.makes.items():
        _ranks(case.ranks).run(_keep, name, make, case, shared[name], ranks=ranks)
    calls = {name: functools.partial(_measure, case, name, made.makes[name][1], shared[name]) for name in made.makes}
    return Problem(work, calls, {}, made.expected, crowded=case.ranks > 1)


@dataclass(frozen=True)
class Made:
    """What each implementation does, by name: the function that makes its call in a rank, and on how many ranks."""

    makes: Mapping[str, tuple[Callable[[DistCase], Call], int]]
    expected: Tensor  # float64
    flops: float
    bytes: float
    tolerance: float


@functools.cache
def _ranks(n: int) -> local.LocalRanks:
    """Started once: the processes of other numbers of ranks sleep meanwhile."""
    ranks = local.LocalRanks(n, patience=600)
    atexit.register(ranks.close)
    return ranks


def _measure(case: DistCase, name: str, ranks: int, shared: Tensor) -> Tensor:
    _ranks(case.ranks).run(_call, name, case.times, ranks=ranks)
    return shared


_KEPT: dict[str, tuple[Call, Tensor]] = {}  # in a rank's process


def _keep(name: str, make: Callable[[DistCase], Call], case: DistCase, shared: Tensor) -> None:
    torch.set_grad_enabled(False)
    _KEPT.pop(name, None)
    _KEPT[name] = make(case), shared


def _call(name: str, times: int) -> None:
    call, shared = _KEPT[name]
    for _ in range(times):
        result = call()
    if result is not None:
        shared.copy_(result)


def _operator(case: DistCase) -> Made:
    concrete, inputs = _inputs(case)
    ways = {"heads": _by_heads, "sequences": _by_sequences, "pages": _by_pages}
    makes = {ONE: (_alone, 1), OURS: (ways[case.way], case.ranks)}
    return Made(makes, paged.exact(inputs), concrete.flops, concrete.cache_bytes, TOLERANCE[case.dtype])


def _heads(case: DistCase) -> Made:
    concrete, inputs = _inputs(case)
    work = concrete.flops * case.times, concrete.cache_bytes * case.times
    return Made({OURS: (_alone, 1)}, paged.exact(inputs), *work, TOLERANCE[case.dtype])


def _inputs(case: DistCase) -> tuple[PagedCase, PagedInputs]:
    concrete = PagedCase(case.b, case.h_q, case.s_kv, case.dtype)
    return concrete, paged.make_inputs(concrete, 0)


def _alone(case: DistCase) -> Call:
    _, inputs = _inputs(case)
    decode = paged.bind_ours(inputs)
    return lambda: decode(*inputs.copies[0])


def _by_heads(case: DistCase) -> Call:
    return _as_dtensors(case, 2, None)


def _by_sequences(case: DistCase) -> Call:
    return _as_dtensors(case, 0, 0)


def _as_dtensors(case: DistCase, query: int, table: int | None) -> Call:
    """Cut in these dimensions; every rank gets the whole result."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    _, inputs = _inputs(case)
    mesh = _mesh(case)
    whole, cut = [Replicate()], [Replicate() if table is None else Shard(table)]
    q = distribute_tensor(inputs.q, mesh, [Shard(query)])
    kv_cache = distribute_tensor(inputs.copies[0][0], mesh, whole)
    block_table, lengths = (distribute_tensor(each, mesh, cut) for each in (inputs.block_table, inputs.cache_seqlens))

    def call() -> Tensor | None:
        out = torch.ops.flashmla.decode(q, kv_cache, None, block_table, lengths, 512, 0, inputs.softmax_scale)[0]
        return _first(out.full_tensor())

    return call


def _by_pages(case: DistCase) -> Call:
    import torch.distributed as dist

    from flashmla_ops.parallel import context_parallel_decode, local_table

    _, inputs = _inputs(case)
    # Each rank's own pages, in a cache of its own.
    table = local_table(inputs.block_table, case.ranks, dist.get_rank())
    cache = inputs.copies[0][0][table.flatten().long()].contiguous()
    own = torch.arange(table.numel(), dtype=torch.int32).view_as(table)

    def call() -> Tensor | None:
        scale = inputs.softmax_scale
        out, _ = context_parallel_decode(inputs.q, cache, None, own, inputs.cache_seqlens, 512, softmax_scale=scale)
        return _first(out)

    return call


def _first(result: Tensor) -> Tensor | None:
    """Every rank has the whole result; the first shows it."""
    import torch.distributed as dist

    return result if dist.get_rank() == 0 else None


def _mesh(case: DistCase) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (case.ranks,))


def _model(case: DistCase) -> Made:
    if case.way == "model by layers":
        makes = {ONE: (_one_by_one, 1), OURS: (_in_turns, case.ranks)}
        return Made(makes, torch.stack(_generated()).double(), 0.0, 0.0, 0.0)
    inputs = _step_inputs(case)
    work = steps.step_flops(inputs), steps.step_bytes(inputs)
    return Made({ONE: (_step, 1), OURS: (_step_by_heads, case.ranks)}, steps.exact(inputs), *work, 6e-2)


def _step_inputs(case: DistCase) -> steps.StepInputs:
    return steps.make_inputs(StepCase(case.s_kv, case.dtype, "eager", case.b), steps.model_in(DTYPES[case.dtype]))


def _step(case: DistCase) -> Call:
    return steps.bind_flashmla(_step_inputs(case))


def _step_by_heads(case: DistCase) -> Call:
    from flashmla_ops.parallel import tensor_parallel

    inputs = _step_inputs(case)
    tensor_parallel(inputs.model, _mesh(case))
    steps.model_in.cache_clear()  # it is no whole model any more
    step = steps.bind_flashmla(_OwnModel(inputs.case, inputs.model, inputs.rows))
    return lambda: _first(step())


class _OwnModel(steps.StepInputs):
    """Of which nobody else uses the weights; hooks that talk to a group of ranks cannot be copied."""

    def sharing_weights(self) -> Any:
        return self.model


def _small_model() -> tuple[Any, list[Tensor]]:
    """Eight layers, and two batches that are generated after each other or in turns."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    torch.manual_seed(0)
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16, "q_lora_rank": 384, "kv_lora_rank": 256}
    sizes = {"hidden_size": 768, "intermediate_size": 2048, "vocab_size": 1024, "num_hidden_layers": 8}
    config = DeepseekV3Config(**heads, **sizes, first_k_dense_replace=8, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = [torch.arange(PROMPT)[None] + 3 + i for i in range(2)]
    return model, prompts


def _generated() -> list[Tensor]:
    """By transformers alone."""
    model, prompts = _small_model()
    return [_generate(model, prompt) for prompt in prompts]


def _generate(model: Any, prompt: Tensor) -> Tensor:
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": NEW_TOKENS, "do_sample": False}
    tokens: Tensor = model.generate(prompt, pad_token_id=0, **options)
    return tokens


def _one_by_one(case: DistCase) -> Call:
    from flashmla_ops.integrations.transformers import enable

    model, prompts = _small_model()
    enable(model)
    return lambda: torch.stack([_generate(model, prompt) for prompt in prompts])


def _in_turns(case: DistCase) -> Call:
    from flashmla_ops.integrations.transformers import enable
    from flashmla_ops.parallel import generate_in_turns, pipeline_parallel

    model, prompts = _small_model()
    pipeline_parallel(model, _mesh(case))
    enable(model)
    return lambda: _first(torch.stack(generate_in_turns(model, prompts, NEW_TOKENS)))


def _messages(case: DistCase) -> Made:
    return Made({OURS: (_exchange, case.ranks)}, _message(case).double(), 0.0, 0.0, 1e-6)


def _message(case: DistCase) -> Tensor:
    return torch.ones(case.bytes // 4)


def _exchange(case: DistCase) -> Call:
    import torch.distributed as dist

    from flashmla_ops.parallel.collectives import added, gathered

    mine, theirs = _message(case), _message(case)
    rank = dist.get_rank()

    def call() -> Tensor | None:
        if case.way == "all_gather":
            return _first(gathered(mine, None)[-1])
        if case.way == "all_reduce":
            return _first(added(mine, None) / case.ranks)
        # There and back.
        for sender in range(2):
            dist.send(mine, 1 - rank) if rank == sender else dist.recv(theirs, 1 - rank)
        return _first(theirs)

    return call


MAKERS: dict[str, Callable[[DistCase], Made]] = {
    OPERATOR: _operator,
    MODEL: _model,
    HEADS: _heads,
    MESSAGES: _messages,
}
SUITE = Suite(NAME, "several processes beside one, and what they send", cases, problem, ())
