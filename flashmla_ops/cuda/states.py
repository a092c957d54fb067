"""``flashmla::merge_states`` and ``decode_schedule`` on CUDA: launches alone, which a graph can capture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cutlass_kernels.attention.around_config import MergeConfig, ScheduleConfig
from flashmla_ops.cuda.driver import Values
from flashmla_ops.cuda.engine import Engine
from flashmla_ops.cuda.served import ELEMENTS, are_multiples, divisor, in_int32, served, strides_of
from flashmla_ops.ops.check import dtype_name
from flashmla_ops.ops.merge import MERGE_STATES, MergeStates
from flashmla_ops.ops.schedule import DECODE_SCHEDULE, DecodeSchedule
from flashmla_ops.reference.schedule import HEADER, MIN_UNITS, UNIT, row_block

SCHEDULE = ScheduleConfig(UNIT, MIN_UNITS, HEADER)
#: Parameters of a part, in the order of strides.
PART = ("out", "out_batch", "out_token", "out_head", "lse", "lse_batch", "lse_head", "lse_token")


def merge_states(engine: Engine, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """``flashmla::merge_states``."""
    a: MergeStates = MERGE_STATES.bind(*args, **kwargs)
    first = a.outs[0]
    call = f"merge_states {dtype_name(first.dtype)} {len(a.outs)} parts"

    def launch(results: list[Tensor]) -> str:
        return merge(engine, a.outs, a.lses, *results)

    out, lse = served(engine, MERGE_STATES, a, call, first, launch)
    return out, lse


def merge(engine: Engine, outs: Sequence[Tensor], lses: Sequence[Tensor], out: Tensor, lse: Tensor) -> str:
    """Launch the kernel, several times if there are many parts; its name. Raises `Unserved`."""
    if out.dim() == 3:  # one sequence
        outs, lses = [part[None] for part in outs], [part[None] for part in lses]
    outs = [part if part.stride(-1) == 1 else part.contiguous() for part in outs]
    b, s_q, h_q, d_v = outs[0].shape
    rows = in_int32("rows", b * s_q * h_q)
    size = out.element_size()
    numbers = [number for part in outs for number in (part.data_ptr(), *strides_of(part)[:3])]
    whole = are_multiples(16, *numbers, d_v * size)
    config = merging(out.dtype, whole)
    if rows == 0:
        return config.name
    chained = len(outs) > config.parts
    shared: Values = {
        "out": out,
        "lse": lse,
        "sums": out.new_empty((rows, d_v), dtype=torch.float32) if chained else None,
        "logs": out.new_empty((rows, 2), dtype=torch.float32) if chained else None,
        "rows": rows,
        "d_v": d_v,
        **divisor("tokens", s_q),
        **divisor("heads", h_q),
    }
    for at in range(0, len(outs), config.parts):
        these = list(zip(outs, lses, strict=True))[at : at + config.parts]
        parts = {f"parts.p{i}.{name}": None for i in range(config.parts) for name in PART}
        own = {"count": len(these), "goes_on": at > 0, "ends": at + config.parts >= len(outs)}
        values = {**shared, **parts, **own, **parameters(these)}
        engine.run(config, (-(-rows // config.warps), 1, 1), values)
    return config.name


def merging(dtype: torch.dtype, whole: bool) -> MergeConfig:
    """The kernel for parts of a type; ``whole``: their rows are whole numbers of 16 bytes, at multiples of 16."""
    return MergeConfig(ELEMENTS[dtype], 16 // dtype.itemsize if whole else 1)


def parameters(parts: Sequence[tuple[Tensor, Tensor]]) -> Values:
    """Addresses and strides of a launch's parts."""
    found: dict[str, Tensor | int | float | None] = {}
    for i, (out, lse) in enumerate(parts):
        numbers: tuple[Tensor | int, ...] = (out, *strides_of(out)[:3], lse, *strides_of(lse))
        found |= {f"parts.p{i}.{name}": number for name, number in zip(PART, numbers, strict=True)}
    return found


def decode_schedule(engine: Engine, *args: Any, **kwargs: Any) -> Tensor:
    """``flashmla::decode_schedule``. A length below 0, for which the CPU raises, counts as 0."""
    a: DecodeSchedule = DECODE_SCHEDULE.bind(*args, **kwargs)
    b = a.cache_seqlens.size(0)
    block = row_block(b, a.s_q, a.h_q, a.h_kv, a.num_parts)
    items = a.h_kv * -(-a.s_q * (a.h_q // a.h_kv) // block) if block else 0

    def launch(results: list[Tensor]) -> str:
        in_int32("items", b * items)
        values: Values = {
            "lengths": a.cache_seqlens,
            "length": a.cache_seqlens.stride(0) * a.cache_seqlens.element_size(),
            "schedule": results[0],
            "b": b,
            "s_q": a.s_q,
            "h_q": a.h_q,
            "h_kv": a.h_kv,
            "parts": a.num_parts,
            "row_block": block,
            "items": items,
        }
        engine.run(SCHEDULE, (1, 1, 1), values)
        return SCHEDULE.name

    (schedule,) = served(engine, DECODE_SCHEDULE, a, "decode_schedule", a.cache_seqlens, launch)
    return schedule
