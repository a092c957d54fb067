"""A decode step of a whole model as a benchmark case: the model, its cache, the exact logits and our step.

The geometry is DeepSeek-V2-Lite's in two dense layers. All implementations share one set of weights, far larger than
any cache, so that each step reads them from memory.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bench.runner import Problem, Work
from bench.suite import DTYPES, Bound, Peer, describe, make_problem

PAGE_SIZE = 64
#: The query weights are enlarged by this, so that attention picks tokens and a wrong one shows in the logits.
SHARPNESS = 5.0
PANELS = "panels"  # the group of cases whose linear layers have their weights in panels
#: Largest relative error of the logits. Four products follow each other in every layer, each rounded to bf16.
TOLERANCE = {"bf16": 6e-2, "fp32": 1e-3}


@dataclass(frozen=True)
class StepCase:
    s_kv: int  # tokens in the cache before the step
    dtype: str
    mode: str  # eager or compiled
    b: int = 1
    group: str = ""


@dataclass(frozen=True)
class StepInputs:
    case: StepCase
    model: Any  # of transformers, as it is, with SDPA
    rows: Sequence[tuple[Tensor, Tensor]]  # of each layer: latents [1, 1, s_kv, d_c], rotary keys [1, 1, s_kv, d_r]

    def sharing_weights(self) -> Any:
        """Another model over the same parameters, to be changed at will."""
        return copy.deepcopy(self.model, {id(parameter): parameter for parameter in self.model.parameters()})

    def fill(self, cache: Any) -> Any:
        for layer, (latent, rope) in enumerate(self.rows):
            cache.update(latent, rope, layer)
        return cache

    def step(self, forward: Callable[..., Any], cache: Any, undo: Callable[[], object]) -> Bound:
        """A step of a token a sequence that forgets it again: every call finds the cache as it was. Returns logits."""
        from flashmla_ops.integrations.transformers.versions import CACHE_ARGUMENT

        token, position = torch.full((self.case.b, 1), 5), torch.full((self.case.b, 1), self.case.s_kv)

        def step() -> Tensor:
            logits: Tensor = forward(token, position_ids=position, **{CACHE_ARGUMENT: cache}).logits
            undo()
            return logits

        return step


@functools.lru_cache(maxsize=1)
def model_in(dtype: torch.dtype) -> Any:
    from flashmla_ops.demo.steps import v2_lite  # transformers takes seconds to import, and no other suite needs it

    model = v2_lite().requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(SHARPNESS)
    return model.to(dtype)


def make_inputs(case: StepCase, model: Any) -> StepInputs:
    """Random rows: attention does not care which tokens they came from."""
    generator = torch.Generator().manual_seed(case.s_kv)
    config = model.config

    def states(width: int) -> Tensor:
        return torch.randn((case.b, 1, case.s_kv, width), generator=generator).to(model.dtype)

    rows = [(states(config.kv_lora_rank), states(config.qk_rope_head_dim)) for _ in range(config.num_hidden_layers)]
    return StepInputs(case, model, rows)


def exact(inputs: StepInputs) -> Tensor:
    """The logits in float64, where transformers does not itself compute in float32 (norms, angles)."""
    from transformers import DynamicCache

    model = copy.deepcopy(inputs.model).double()
    rows = [(latent.double(), rope.double()) for latent, rope in inputs.rows]
    doubled = StepInputs(inputs.case, model, rows)
    cache = doubled.fill(DynamicCache(config=model.config))
    return doubled.step(model.forward, cache, lambda: None)()


def bind_ours(inputs: StepInputs) -> Bound:
    return bind_flashmla(inputs, panels=inputs.case.group == PANELS)


def bind_flashmla(inputs: StepInputs, *, panels: bool = False) -> Bound:
    """Absorbed attention over a paged cache, and linears on `flashmla::gemm`; compiled by our backend, or eager."""
    from flashmla_ops.integrations.transformers import PagedLatentCache, StaticPagedLatentCache, enable
    from flashmla_ops.nn import fast_linear
    from lowering.backend import flashmla  # by name it is found only where the package is installed

    model = inputs.sharing_weights()
    enable(model)
    fast_linear(model, panels=panels)
    if inputs.case.mode == "eager":
        n_pages = inputs.case.b * (inputs.case.s_kv // PAGE_SIZE + 1)
        cache = inputs.fill(PagedLatentCache(model, n_pages=n_pages, page_size=PAGE_SIZE))
        return inputs.step(model.forward, cache, lambda: cache.crop(-1))
    static = inputs.fill(StaticPagedLatentCache(model, inputs.case.s_kv + 1, page_size=PAGE_SIZE))
    compiled = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=flashmla)
    return inputs.step(compiled, static, lambda: forget(static, inputs.case.s_kv))


def forget(cache: Any, length: int) -> None:
    """Cut a static cache to ``length`` tokens; what lies behind is overwritten by the next step."""
    for layer in cache.layers:
        layer.cumulative_length.fill_(length)


def step_bytes(inputs: StepInputs) -> int:
    """Bytes that a step must read: every weight but the embedding table, one row of that, and every layer's cache."""
    table = inputs.model.get_input_embeddings().weight
    weights: int = sum(parameter.nbytes for parameter in inputs.model.parameters()) - table.nbytes + table[0].nbytes
    return weights + sum(latent.nbytes + rope.nbytes for latent, rope in inputs.rows)


def step_flops(inputs: StepInputs) -> float:
    """Two for each weight of a product, and absorbed attention."""
    config, case = inputs.model.config, inputs.case
    table = inputs.model.get_input_embeddings().weight
    matrices = [parameter for parameter in inputs.model.parameters() if parameter.dim() == 2]
    weights: int = sum(matrix.numel() for matrix in matrices) - table.numel()
    widths: int = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    pairs: int = config.num_hidden_layers * config.num_attention_heads * (case.s_kv + 1)
    return 2.0 * case.b * (weights + pairs * widths)


def problem(
    suite: str,
    case: StepCase,
    peers: Sequence[Peer[StepInputs]],
    cold_bytes: int,
    model: Callable[[torch.dtype], Any] = model_in,
) -> Problem:
    """``cold_bytes`` does not matter: the weights are larger."""
    torch.compiler.reset()
    inputs = make_inputs(case, model(DTYPES[case.dtype]))
    work = Work(
        title=describe(case, suite),
        case=asdict(case),
        flops=step_flops(inputs),
        bytes=step_bytes(inputs),
        dtype=DTYPES[case.dtype],
        tolerance=TOLERANCE[case.dtype],
    )
    return make_problem(work, inputs, [()], bind_ours, peers, exact(inputs))
