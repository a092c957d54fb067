"""The attention kernels that are worth building ahead of their first use: those of DeepSeek's models.

``python -m flashmla_ops build --cuda sm_90a`` builds them; whatever else a call needs is built when it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cutlass_kernels.attention import libraries
from cutlass_kernels.attention.around_config import AppendConfig
from cutlass_kernels.attention.config import CombineConfig, Config
from cutlass_kernels.errors import CutlassKernelsError
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.append import quantising
from flashmla_ops.cuda.attention import NAMES, Cache, Call, choose
from flashmla_ops.cuda.states import SCHEDULE, merging
from flashmla_ops.errors import BuildError
from flashmla_ops.formats import NATIVE, QUANTIZED

#: Query heads for which blocks differ.
HEADS = (16, 32, 128)
#: Second caches beside a first one.
PAIRS = (("fp8_model1", "fp8_model1"), ("fp8_v41", "fp8_v41"), ("fp8_v41", "fp4_v41"))
#: What a block may use of shared memory (CUDA C++ programming guide, "Technical Specifications").
DEVICES = {
    "sm_80": Device((8, 0), 108, 166_912),
    "sm_86": Device((8, 6), 84, 101_376),
    "sm_89": Device((8, 9), 128, 101_376),
    "sm_90a": Device((9, 0), 132, 232_448),
}


def shipped(arch: str) -> list[Config]:
    """The kernels of an architecture."""
    found: dict[Config, None] = {CombineConfig(name, 512): None for name in NAMES.values()}
    for call in calls():
        found.setdefault(choose(DEVICES[arch], call))
    return [*found, *around()]


def around() -> Iterator[Config]:
    """What appends to caches, merges and makes schedules."""
    yield from (AppendConfig(16), SCHEDULE)
    yield from (quantising(name, torch.bfloat16, 16) for name in QUANTIZED)
    yield from (merging(dtype, True) for dtype in NAMES)


def build(archs: Sequence[str]) -> Iterator[str]:
    """Build the kernels of architectures; a line each. Raises `BuildError`."""
    for arch in archs:
        for config in shipped(arch):
            try:
                built = libraries.build(config, arch)
            except CutlassKernelsError as error:
                raise BuildError(str(error)) from error
            yield f"{config.name:<64} {arch:<7} {built.registers:>3} registers  {built.folder}"


def calls() -> Iterator[Call]:
    for heads in HEADS:
        for dtype in NAMES:
            for source in ("pages", "indices"):
                yield call(cache(source, NATIVE, dtype, 576), heads=heads, dtype=dtype)
            yield call(cache("pages", NATIVE, dtype, 512, 64), heads=heads, dtype=dtype)
        for name in QUANTIZED:
            for source in ("pages", "indices"):
                yield call(cache(source, name), heads=heads)
        for pair in PAIRS:
            yield call(*(cache("indices", name) for name in pair), heads=heads)


def call(
    *caches: Cache,
    heads: int,
    tokens: int = 1,
    qk_start: int = 0,
    d_v: int = 512,
    dtype: torch.dtype = torch.bfloat16,
) -> Call:
    """A call as kernels are chosen for it: by shapes, without memory."""
    first = caches[0]
    d = first.codes.elements if first.codes else first.kv.size(3) + (0 if first.k is None else first.k.size(3))
    q = _empty(1, tokens, heads, d - qk_start, dtype=dtype)
    source = "pages" if first.index.dim() == 2 else "indices"
    return Call("", q, caches, qk_start, d_v, None, False, None, source, whole=False)


def cache(
    source: str, row_format: str, dtype: torch.dtype = torch.uint8, d: int = 0, d_k: int = 0, h_kv: int = 1
) -> Cache:
    """One of rows of ``row_format``; ``d`` and ``d_k`` elements in each tensor, if it is native."""
    index = _empty(1, 1, dtype=torch.int32) if source == "pages" else _empty(1, 1, 1, dtype=torch.int32)
    k = _empty(1, 64, h_kv, d_k, dtype=dtype) if d_k else None
    kv = _empty(1, 64, h_kv, d or QUANTIZED[row_format].bytes, dtype=dtype)
    return Cache(("",) * 4, kv, k, index, None, row_format)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
