"""A decode step of a whole model as a benchmark case: the model, its cache, the exact logits and our step.

Where nothing else is said the geometry is DeepSeek-V2-Lite's in two dense layers. All implementations share one set of
weights, far larger than any cache, so that each step reads them from memory.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
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
#: Largest relative error of the logits after two layers; it grows as the root of their number. Four products follow
#: each other in every layer, each rounded to bf16.
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
    #: Of each layer: latents and rotary keys [b, 1, s_kv, d], or keys and values [b, h_kv, s_kv, d].
    rows: Sequence[tuple[Tensor, Tensor]]

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
    return sharpened(model).to(dtype)


def sharpened(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.mul_(SHARPNESS)
    return model


def row_shapes(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Heads and elements of the two states of a token that a layer caches, in the order in which it hands them over."""
    if hasattr(config, "kv_lora_rank"):
        return (1, config.kv_lora_rank), (1, config.qk_rope_head_dim)
    return ((config.num_key_value_heads, config.head_dim),) * 2


def make_inputs(case: StepCase, model: Any) -> StepInputs:
    """Random rows: attention does not care which tokens they came from."""
    generator = torch.Generator().manual_seed(case.s_kv)
    first, second = row_shapes(model.config)

    def states(heads: int, width: int) -> Tensor:
        return torch.randn((case.b, heads, case.s_kv, width), generator=generator).to(model.dtype)

    rows = [(states(*first), states(*second)) for _ in range(model.config.num_hidden_layers)]
    return StepInputs(case, model, rows)


def exact(inputs: StepInputs) -> Tensor:
    """The logits in float64, where transformers does not itself compute in float32 (norms, angles)."""
    from transformers import DynamicCache

    rows = [(first.double(), second.double()) for first, second in inputs.rows]
    doubled = StepInputs(inputs.case, inputs.model, rows)
    cache = doubled.fill(DynamicCache(config=inputs.model.config))
    with _in_float64(inputs.model):
        logits: Tensor = doubled.step(inputs.model.forward, cache, lambda: None)()
    return logits


@contextlib.contextmanager
def _in_float64(model: Any) -> Iterator[None]:
    """Each module's weights are float64 while it runs, and only then: a copy of all would not fit beside the model."""
    kept: dict[int, Tensor] = {}

    def widen(module: Any, args: Any) -> None:
        for parameter in module.parameters(recurse=False):
            kept[id(parameter)] = parameter.data
            parameter.data = parameter.data.double()

    def narrow(module: Any, args: Any, out: Any) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data = kept.pop(id(parameter))

    owners = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [
        hook for each in owners for hook in (each.register_forward_pre_hook(widen), each.register_forward_hook(narrow))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
    weights: int = sum(parameter.nbytes for parameter in inputs.model.parameters())
    if not _is_tied(inputs.model):
        weights += table[0].nbytes - table.nbytes
    return weights + sum(first.nbytes + second.nbytes for first, second in inputs.rows)


def _is_tied(model: Any) -> bool:
    """Whether the embedding table is the weight of the last product too, which reads all of it."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def step_flops(inputs: StepInputs) -> float:
    """Two for each weight of a product, and attention, which is absorbed where the cache has latents."""
    config, case = inputs.model.config, inputs.case
    table = inputs.model.get_input_embeddings().weight
    matrices = [parameter for parameter in inputs.model.parameters() if parameter.dim() == 2]
    weights: int = sum(matrix.numel() for matrix in matrices) - (0 if _is_tied(inputs.model) else table.numel())
    (_, first), (_, second) = row_shapes(config)
    widths = 2 * first + second if hasattr(config, "kv_lora_rank") else first + second
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
        tolerance=TOLERANCE[case.dtype] * (inputs.model.config.num_hidden_layers / 2) ** 0.5,
    )
    return make_problem(work, inputs, [()], bind_ours, peers, exact(inputs))
