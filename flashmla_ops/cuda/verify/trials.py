"""What each kernel is verified on: calls of the operators that it serves, and how far results may be from float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.around_config import AppendConfig, MergeConfig, ScheduleConfig
from cutlass_kernels.attention.config import CallConfig, CombineConfig, Config, DecodeConfig
from flashmla_ops import reference
from flashmla_ops.cuda import append, attention, states
from flashmla_ops.cuda.engine import Engine
from flashmla_ops.cuda.served import ELEMENTS
from flashmla_ops.cuda.verify import memory
from flashmla_ops.formats import NATIVE, QUANTIZED
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.ops.sparse import SPARSE_DECODE

DTYPES = {name: dtype for dtype, name in ELEMENTS.items()}
#: How far the result of a query token and head may be from float64, over its norm: weights and results are rounded.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
#: Distance of its LSE, for queries of a standard deviation of 1: scores are float32 sums.
LSE_TOLERANCE = 1e-4
#: Standard deviation of queries whose maxima rise from tile to tile, so that sums are rescaled.
STEEP = 8.0
#: Softmax scales beside the default: of 0 all rows that are seen weigh the same, and the others still nothing.
SCALES = (0.0, -0.25)
#: Tiles of a call whose cost is counted.
COUNTED = 8
#: Query heads that lead to a kernel, by its query rows.
HEADS = {16: 16, 32: 20, 64: 40}


@dataclass(frozen=True)
class Trial:
    """A call on a device of few multiprocessors. ``check`` runs it on an ``engine``."""

    name: str
    multiprocessors: int
    check: Callable[..., float]

    def run(self, engine: Engine) -> float:
        """The largest error over what is allowed: right up to 1."""
        return self.check(engine=engine)


def trials_of(config: Config) -> list[Trial]:
    """The trials of a kernel; the first one goes through all of its synchronisation."""
    if isinstance(config, CallConfig):
        return dense(config) if config.source == "pages" else sparse(config)
    if isinstance(config, CombineConfig):
        return combined(config)
    if isinstance(config, AppendConfig):
        return appended(config)
    if isinstance(config, MergeConfig):
        return merged(config)
    assert isinstance(config, ScheduleConfig)
    return scheduled()


def counted(config: CallConfig) -> Trial:
    """One block, whose query rows are all used, on `COUNTED` whole tiles of each source."""
    rows = COUNTED * config.tile
    if config.source == "pages":
        return Trial("counted", 1, partial(decode, config, (rows,), config.rows, 1, 64))
    return Trial("counted", 1, partial(sparse_decode, config, (rows,), rows, config.rows, 1, True))


def lengths_of(tile: int) -> tuple[int, ...]:
    """None, one, and what lies around the borders of tiles."""
    return (3 * tile + 5, 0, 1, tile - 1, tile, tile + 1, 2 * tile)


def dense(config: CallConfig) -> list[Trial]:
    t, heads = config.tile, HEADS[config.rows]
    few = heads if config.rows == 64 else heads // 2  # of 64 query rows, two blocks
    return [
        Trial("lengths", 3, partial(decode, config, lengths_of(t), heads, 1, 16)),
        Trial("causal, two query tokens", 4, partial(decode, config, (t + 1, 0, 1, 2 * t), few, 2, 2, True)),
        Trial("one sequence in parts", 5, partial(decode, config, (17 * t + 3,), heads, 1, 64, spread=STEEP)),
        *(Trial(f"a scale of {x}", 2, partial(decode, config, (t + 5, 0), heads, 1, 16, scale=x)) for x in SCALES),
    ]


def sparse(config: CallConfig) -> list[Trial]:
    t, heads = config.tile, HEADS[config.rows]
    return [
        Trial("lengths", 3, partial(sparse_decode, config, lengths_of(t), 3 * t + 7, heads, 1)),
        Trial("two query tokens, no lengths", 4, partial(sparse_decode, config, None, t + 9, heads, 2)),
        Trial("few slots, in parts", 5, partial(sparse_decode, config, (9 * t + 3,), 10 * t, heads, 1, spread=STEEP)),
        *(Trial(f"a scale of {x}", 2, partial(sparse_decode, config, (9, 0), t, heads, 1, scale=x)) for x in SCALES),
    ]


def combined(config: CombineConfig) -> list[Trial]:
    call = DecodeConfig(config.dtype, 576, 0, 0, config.d_v, "pages", None, False, None, rows=16)
    return [
        Trial("one sequence in parts", 5, partial(decode, call, (550,), 16, 1, 16)),
        Trial("some sequences in parts", 3, partial(decode, call, (200, 0, 1, 150), 5, 2, 64, True)),
    ]


def decode(
    config: CallConfig,
    lengths: tuple[int, ...],
    heads: int,
    tokens: int,
    page_size: int,
    causal: bool = False,
    *,
    spread: float = 1.0,
    scale: float | None = None,
    engine: Engine,
) -> float:
    """``flashmla::decode``; with causal also attention sinks."""
    generator, dtype = torch.Generator().manual_seed(len(lengths)), DTYPES[config.dtype]
    table, owned = memory.pages(lengths, page_size, generator)
    row_format = config.codes.name if config.codes else NATIVE
    given: dict[str, Any] = {
        "q": (torch.randn(len(lengths), tokens, heads, config.d_qk, generator=generator) * spread).to(dtype),
        "kv_cache": memory.cache(row_format, dtype, config.kv, owned, generator),
        "k_cache": memory.cache(NATIVE, dtype, config.k, owned, generator) if config.k else None,
        "block_table": table,
        "cache_seqlens": torch.tensor(lengths, dtype=torch.int32),
        "d_v": config.d_v,
        "qk_start": config.qk_start,
        "softmax_scale": scale,
        "causal": causal,
        "attn_sink": torch.randn(heads, generator=generator) if causal else None,
        "row_format": row_format,
    }
    found = attention.decode(engine, **given)
    return attended(found, DECODE.reference(**as_multiplied(given)), spread)


def sparse_decode(
    config: CallConfig,
    lengths: tuple[int, ...] | None,
    topk: int,
    heads: int,
    tokens: int,
    valid: bool = False,
    *,
    spread: float = 1.0,
    scale: float | None = None,
    engine: Engine,
) -> float:
    """``flashmla::sparse_decode``, with a second cache if the kernel is for two; without lengths also sinks, and uncut.

    ``valid``: all indices name rows.
    """
    generator, dtype = torch.Generator().manual_seed(topk), DTYPES[config.dtype]
    b, page_size = len(lengths) if lengths else 2, 16
    counts = None if lengths is None else torch.tensor(lengths, dtype=torch.int32)

    def source(codes: Any, topk: int, counts: Tensor | None) -> tuple[str, Tensor, Tensor]:
        row_format = codes.name if codes else NATIVE
        chosen, owned = memory.indices((b, tokens, topk), counts, 6 * page_size, generator, valid)
        if counts is None and not valid:
            chosen[-1, -1] = -1  # a query token with nothing to attend to
        return row_format, memory.cache(row_format, dtype, config.d, owned.view(-1, page_size), generator), chosen

    row_format, cache, chosen = source(config.codes, topk, counts)
    given: dict[str, Any] = {
        "q": (torch.randn(b, tokens, heads, config.d_qk, generator=generator) * spread).to(dtype),
        "kv_cache": cache,
        "k_cache": None,
        "indices": chosen,
        "topk_length": counts,
        "d_v": config.d_v,
        "qk_start": config.qk_start,
        "softmax_scale": scale,
        "attn_sink": torch.randn(heads, generator=generator) if counts is None else None,
        "row_format": row_format,
        "batch_invariant": counts is None,
    }
    if config.second:
        others = None if counts is None or valid else counts.flip(0).clamp(max=config.tile + 9)
        name, cache, chosen = source(config.second_codes, topk if valid else config.tile + 9, others)
        given |= {"extra_kv_cache": cache, "extra_indices": chosen, "extra_row_format": name}
        given["extra_topk_length"] = others
    found = attention.sparse_decode(engine, **given)
    return attended(found, SPARSE_DECODE.reference(**as_multiplied(given)), spread)


def as_multiplied(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with rows of integers in bfloat16, which kernels hold them in: a scale makes them longer."""
    if not given["row_format"].startswith("int"):
        return given
    row = QUANTIZED[given["row_format"]]
    rows = row.dequantize(torch.cat(row.parts(given["kv_cache"]), dim=-1)).bfloat16()
    return given | {"kv_cache": rows, "row_format": NATIVE}


def attended(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], spread: float) -> float:
    """The largest error of out and lse over what is allowed; infinite where nothing may be off."""
    (out, lse), (right, right_lse) = found, expected
    error = (out.double() - right.double()).norm(dim=-1) / right.double().norm(dim=-1).clamp(min=1e-30)
    seen = torch.isfinite(right_lse)
    exact = torch.equal(lse[~seen], right_lse[~seen].float()) and not bool(out.transpose(1, 2)[~seen].any())
    distance = (lse - right_lse)[seen].abs().double() / (LSE_TOLERANCE * spread)
    worst = torch.cat([(error / TOLERANCE[out.dtype]).flatten(), distance, torch.zeros(1).double()]).max()
    return float(worst.nan_to_num(math.inf)) if exact else math.inf


def appended(config: AppendConfig) -> list[Trial]:
    return [
        Trial("rows of several blocks", 2, partial(written, config, 90)),
        Trial("one row", 2, partial(written, config, 1)),
    ]


def written(config: AppendConfig, n: int, *, engine: Engine) -> float:
    """``flashmla::append_``, bit for bit: slots twice, negative ones, and such that lie past the end."""
    generator, row_format = torch.Generator().manual_seed(n), config.codes.name if config.codes else NATIVE
    d = QUANTIZED[row_format].elements if config.codes else 576
    rows = torch.randn(n, 1, d, generator=generator).to(DTYPES[config.dtype or "bf16"])
    owned = torch.ones(4, 16, dtype=torch.bool)
    cache = memory.cache(row_format, rows.dtype, d, owned, generator)
    slots = torch.randint(0, 64, (n,), generator=generator)
    slots[3::7], slots[5::11] = -1, 64
    expected = copy.deepcopy(cache)
    reference.append(expected, rows, slots.where(slots < 64, -1), row_format)
    append.append(engine, cache, rows, slots, row_format)
    return 0.0 if torch.equal(cache.view(torch.uint8), expected.view(torch.uint8)) else math.inf


def merged(config: MergeConfig) -> list[Trial]:
    return [Trial(f"{parts} parts", 2, partial(merge, config, parts)) for parts in (11, 2)]


def merge(config: MergeConfig, parts: int, *, engine: Engine) -> float:
    """``flashmla::merge_states``: some parts have seen nothing of some rows, and all of one row."""
    generator, dtype = torch.Generator().manual_seed(parts), DTYPES[config.dtype]
    outs = [torch.randn(2, 3, 5, 512, generator=generator).to(dtype) for _ in range(parts)]
    lses = [torch.randn(2, 5, 3, generator=generator) * 3 for _ in range(parts)]
    for i, lse in enumerate(lses):
        lse[torch.rand(lse.shape, generator=generator) < 0.2] = torch.inf if i % 2 else -torch.inf
        lse[1, 2, 0] = torch.inf
        outs[i][~torch.isfinite(lse).transpose(1, 2)] = torch.nan
    return attended(states.merge_states(engine, outs, lses), reference.merge_states(outs, lses), 1.0)


def scheduled() -> list[Trial]:
    return [Trial(f"{b} sequences", 2, partial(schedule, b)) for b in (1500, 1)]


def schedule(b: int, *, engine: Engine) -> float:
    """``flashmla::decode_schedule``, bit for bit."""
    lengths = torch.randint(0, 300, (b,), generator=torch.Generator().manual_seed(b), dtype=torch.int32)
    given = (lengths, 2, 40, 1, 37)
    same = torch.equal(states.decode_schedule(engine, *given), reference.decode_schedule(*given))
    return 0.0 if same else math.inf
