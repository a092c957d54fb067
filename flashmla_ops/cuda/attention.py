"""``flashmla::decode`` and ``sparse_decode`` on CUDA: which kernel of `cutlass_kernels.attention` serves a call, and
its launches.

Nothing waits for the device, and nothing is read from it: blocks find their part of the work themselves, so the grid
depends on sizes alone and a call can be captured in a graph. What no kernel takes runs as the float64 definition, and
`explain` says why. A page that the cache does not have is masked, a length outside the table is clamped to it, and a
schedule, which is for the parts of a CPU, only has to have the right form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from cutlass_kernels.attention.config import CallConfig, Codes, CombineConfig, DecodeConfig, DecodeSm90Config
from cutlass_kernels.attention.magic import magic_of
from cutlass_kernels.errors import ConfigError, MissingToolError
from cutlass_kernels.gemm.problem import Device
from flashmla_ops.cuda.engine import Engine, Plan, Unserved, signature
from flashmla_ops.cuda.served import INT32, divisor, strides_of
from flashmla_ops.formats import NATIVE, QUANTIZED, Grouped
from flashmla_ops.ops.check import Result, dtype_name
from flashmla_ops.ops.decode import DECODE, Decode
from flashmla_ops.ops.decode_up import DECODE_UP, DecodeUp
from flashmla_ops.ops.operator import Operator
from flashmla_ops.ops.sparse import SPARSE_DECODE, SparseDecode

#: Names of element types, as configurations have them.
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Tiles in shared memory, the best first.
STAGES = (3, 2)
#: Query rows of a block, the largest first.
ROWS = (64, 32, 16)
LOG2_E = math.log2(math.e)
#: Signatures of calls that an engine remembers; beyond, it begins anew.
MOST_PLANS = 1024
A = TypeVar("A", Decode, DecodeUp, SparseDecode)


@dataclass(frozen=True)
class Cache:
    """One source of a call: its tensors, and how many of the rows that ``index`` names count."""

    fields: tuple[str, ...]  # the arguments of the operator that the tensors are
    kv: Tensor  # [n_pages, page_size, h_kv, d]
    k: Tensor | None
    index: Tensor  # [b, max_pages], or [b, s_q, topk]
    lengths: Tensor | None  # [b]; None: all
    row_format: str

    @property
    def codes(self) -> Codes | None:
        return None if self.row_format == NATIVE else codes_of(self.row_format)

    def check(self) -> None:
        """Raises `Unserved` unless rows can be copied 16 bytes at a time."""
        for name, tensor in zip(self.fields, (self.kv, self.k), strict=False):
            apart = self.codes is not None and self.codes.tail > 0
            if tensor is not None and not in_sixteens(tensor, apart):
                raise Unserved(f"rows of {name} do not begin at multiples of 16 bytes")

    def tensors(self, source: str) -> Iterator[tuple[str, str, Tensor, Callable[[Tensor], Tensor] | None]]:
        """Parameter, argument, tensor, and what it has to go through."""
        index, fix = self.index, None
        if (index.size(-1) > 1 and index.stride(-1) != 1) or not self.has_lines:
            fix = torch.Tensor.contiguous
        for name, field_, tensor, by in (
            ("kv", self.fields[0], self.kv, None),
            ("k", self.fields[1], self.k, None),
            ("index", self.fields[2], index, fix),
            ("lengths", self.fields[3], self.lengths, torch.Tensor.contiguous),
        ):
            if tensor is not None:
                yield f"{source}.{name}", field_, tensor, by

    @property
    def has_lines(self) -> bool:
        """Whether lines of `index` lie at equal distances, whatever the sequence."""
        return self.index.dim() == 2 or self.index.stride(0) == self.index.size(1) * self.index.stride(1)

    def numbers(self, source: str, index: Tensor) -> dict[str, int | None]:
        """The parameters of a kernel's source, but for tensors; ``index`` as kernels get it."""
        n_pages, page_size = self.kv.shape[:2]
        magic, shift = magic_of(page_size)
        capacity = index.size(-1) * (page_size if index.dim() == 2 else 1)
        kv, k = strides_of(self.kv), (0, 0, 0, 0) if self.k is None else strides_of(self.k)
        if self.codes is not None and self.codes.tail:
            kv = (kv[0], self.codes.head, 0, 1)  # a page is one piece: the heads of its rows lie together
        found = {
            **dict.fromkeys(("k", "lengths")),
            **dict(zip(("kv_page", "kv_row", "kv_head"), kv, strict=False)),
            **dict(zip(("k_page", "k_row", "k_head"), k, strict=False)),
            "index_row": 4 * index.stride(-2),
            "n_pages": n_pages,
            "page_size": page_size,
            "page_magic": magic,
            "page_shift": shift,
            "capacity": min(capacity, INT32),
        }
        return {f"{source}.{name}": value for name, value in found.items()}


def codes_of(row_format: str) -> Codes:
    """A row format in the terms of kernels."""
    row = QUANTIZED[row_format]
    assert isinstance(row, Grouped)
    codes = {8: {False: "e4m3", True: "int8"}, 4: {False: "e2m1", True: "int4"}}
    scales = {4: "float32", 1: "e4m3" if row.bits == 4 else "e8m0"}
    return Codes(
        name=row.name,
        code=codes[row.bits][row.name.startswith("int")],
        bits=row.bits,
        values=row.values,
        group=row.group,
        scale=scales[row.scale_bytes],
        scales_at=row.scales_at,
        rope=row.rope,
        rope_at=row.rope_at,
        head=row.bytes - row.tail,
        tail=row.tail,
    )


@dataclass(frozen=True)
class Call:
    """What `decode` and `sparse_decode` have in common, as kernels see it."""

    op: str
    q: Tensor  # [b, s_q, h_q, d_qk]
    caches: Sequence[Cache]
    qk_start: int
    d_v: int
    softmax_scale: float | None
    causal: bool
    sink: Tensor | None
    source: str  # pages, or indices: then each query token is an item of its own
    whole: bool  # whether no item may be cut: then its bits are the same whatever else is in the batch
    unserved: str = ""  # an option that no kernel has

    @property
    def tokens(self) -> int:
        """Query tokens of a sequence that are items of their own, or one item."""
        return self.q.size(1) if self.source == "indices" else 1

    @property
    def s_q(self) -> int:
        """Query tokens of an item."""
        return self.q.size(1) // max(self.tokens, 1)

    @property
    def group(self) -> int:
        return self.q.size(2) // self.caches[0].kv.size(2)

    def tensors(self, unit: int) -> tuple[dict[str, Any], list[tuple[str, str, Tensor, Any]]]:
        """The numbers among a kernel's parameters that tensors have, and the tensors: see `Cache.tensors`.

        ``unit``: bytes that queries are loaded by.
        """
        q, fix = self.q, None
        steps = (q.data_ptr(), *(stride * q.element_size() for stride in q.stride()[:3]))
        if q.stride(-1) != 1 or any(step % unit for step in steps):
            fix = partial(torch.clone, memory_format=torch.contiguous_format)
            q = fix(q)
        found: list[tuple[str, str, Tensor, Any]] = [("q", "q", q, fix)]
        numbers: dict[str, Any] = {f"second.{name}": None for name in SOURCE}
        for source, cache in zip(("first", "second"), self.caches, strict=False):
            given = list(cache.tensors(source))
            found += given
            index, by = next((tensor, by) for parameter, _, tensor, by in given if parameter.endswith(".index"))
            numbers |= cache.numbers(source, index if by is None else by(index))
        if self.sink is not None:
            found.append(("to.sink", "attn_sink", self.sink, torch.Tensor.contiguous))
        scale = q.size(3) ** -0.5 if self.softmax_scale is None else self.softmax_scale
        numbers |= dict(zip(("q_batch", "q_token", "q_head"), strides_of(q), strict=False))
        numbers |= {"batch": q.size(0) * self.tokens, "s_q": self.s_q, "causal": self.causal, "scale": scale * LOG2_E}
        numbers["whole"] = self.whole
        return numbers, found

    def __str__(self) -> str:
        rows = " and ".join(
            cache.row_format
            if cache.codes
            else " + ".join(str(t.size(3)) for t in (cache.kv, cache.k) if t is not None)
            for cache in self.caches
        )
        heads = f"h_q {self.q.size(-2)} h_kv {self.caches[0].kv.size(2)}"
        return f"{self.op} {dtype_name(self.q.dtype)} s_q {self.q.size(-3)} {heads} rows {rows} d_v {self.d_v}"


def decode(engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """``flashmla::decode``."""
    a: Decode = DECODE.bind(*args, **kwargs)
    return serve(engine, DECODE, a, decode_call)


def decode_call(a: Decode) -> Call:
    fields = ("kv_cache", "k_cache", "block_table", "cache_seqlens")
    caches = [Cache(fields, a.kv_cache, a.k_cache, a.block_table, a.cache_seqlens, a.row_format)]
    options = (a.qk_start, a.d_v, a.softmax_scale, a.causal, a.attn_sink)
    given = {"window": a.window, "softcap": a.softcap, "cu_seqlens_q": a.cu_seqlens_q is not None}
    unserved = ", ".join(name for name, value in given.items() if value)
    return Call("decode", a.q, caches, *options, source="pages", whole=a.batch_invariant, unserved=unserved)


def decode_up(engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """``flashmla::decode_up``: `decode`, then a product for each head by torch."""
    return serve(engine, DECODE_UP, DECODE_UP.bind(*args, **kwargs), decode_call)


def project(a: DecodeUp, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """What was attended to [b, s_q, h_q, d_v] times the weight of each head [h_q, d_v, d_up]."""
    heads = torch.bmm(out.flatten(0, 1).transpose(0, 1), a.weight)
    return heads.transpose(0, 1).unflatten(0, out.shape[:2]).contiguous(), lse


def sparse_decode(engine: Engine, *args: Any, **kwargs: Any) -> Any:
    """``flashmla::sparse_decode``."""
    a: SparseDecode = SPARSE_DECODE.bind(*args, **kwargs)
    return serve(engine, SPARSE_DECODE, a, sparse_call)


def sparse_call(a: SparseDecode) -> Call:
    fields = ("kv_cache", "k_cache", "indices", "topk_length")
    caches = [Cache(fields, a.kv_cache, a.k_cache, a.indices, a.topk_length, a.row_format)]
    if a.extra_kv_cache is not None and a.extra_indices is not None:
        fields = ("extra_kv_cache", "", "extra_indices", "extra_topk_length")
        extra = (a.extra_kv_cache, None, a.extra_indices, a.extra_topk_length, a.extra_row_format)
        caches.append(Cache(fields, *extra))
    options = (a.qk_start, a.d_v, a.softmax_scale, False, a.attn_sink)
    return Call("sparse_decode", a.q, caches, *options, source="indices", whole=a.batch_invariant)


def serve(engine: Engine, operator: Operator[Any], a: A, call_of: Callable[[A], Call]) -> Any:
    """The results of a call, by kernels if they take it. What is known of its signature is not found out again."""
    key = signature(operator, a)
    if (plan := engine.plans.get(key)) is None:
        plan = planned(engine, operator, a, call_of)
        if len(engine.plans) >= MOST_PLANS:
            engine.plans.clear()
        engine.plans[key] = plan
    return operator.reference(*a.values()) if plan.reason else plan(a)


def planned(engine: Engine, operator: Operator[Any], a: A, call_of: Callable[[A], Call]) -> Plan:
    """Raises what the operator's contract does not allow."""
    results, finish = operator.results(a), None
    if isinstance(a, DecodeUp):
        results, finish = (Result([*a.q.shape[:-1], a.d_v], a.q.dtype), results[1]), project
    call = call_of(a)
    try:
        plan = launches(engine, call, choose(engine.device, call), results)
        plan = replace(plan, finish=finish)
    except (Unserved, MissingToolError) as reason:
        plan = Plan(str(reason))
    engine.remember(str(call), f"the float64 definition ({plan.reason})" if plan.reason else plan.config)
    return plan


def choose(device: Device, call: Call) -> CallConfig:
    """The kernel for a call. Raises `Unserved`."""
    if call.unserved:
        raise Unserved(f"no kernel has {call.unserved}")
    for cache in call.caches:
        cache.check()
    first, second = call.caches[0], call.caches[1] if len(call.caches) > 1 else None
    k = 0 if first.k is None else first.k.size(3)
    sizes = (first.kv.size(3), k, call.qk_start, call.d_v, call.s_q * call.group)
    return configured(device, call.q.dtype, sizes, call.source, first.row_format, second.row_format if second else "")


@lru_cache(maxsize=1024)
def configured(
    device: Device, dtype: torch.dtype, sizes: tuple[int, ...], source: str, row_format: str, second: str
) -> CallConfig:
    """The kernel for calls of these sizes: kv, k, qk_start, d_v, and the query rows of an item. Raises `Unserved`."""
    if device.capability < (8, 0):
        raise Unserved(f"compute capability 8.0 is needed, the device has {device.capability}")
    if dtype not in NAMES:
        raise Unserved(f"kernels compute in bfloat16 and float16, q is {dtype}")
    kv, k, qk_start, d_v, wanted = sizes
    codes, second_codes = (codes_of(name) if name in QUANTIZED else None for name in (row_format, second))
    what = (NAMES[dtype], codes.elements if codes else kv, k, qk_start, d_v, source, codes, bool(second), second_codes)
    problems: list[str] = []
    for make in candidates(device, wanted):
        try:
            config = make(*what)
        except ConfigError as error:
            problems += error.problems
            continue
        if config.shared_bytes <= device.shared_memory:
            return config
        problems.append(f"{config.shared_bytes} bytes of shared memory are needed, not {device.shared_memory}")
    raise Unserved("; ".join(dict.fromkeys(problems)))


def candidates(device: Device, wanted: int) -> Iterator[Callable[..., CallConfig]]:
    """Kernels for ``wanted`` query rows of an item, the best first."""
    if device.capability == (9, 0) and wanted > 32:
        yield DecodeSm90Config
    for rows in ROWS:
        if rows // 2 >= wanted and rows > ROWS[-1]:
            continue  # a smaller block has room for all
        for stages in STAGES:
            yield partial(DecodeConfig, rows=rows, stages=stages)


def in_sixteens(cache: Tensor, apart: bool) -> bool:
    """Whether every row begins at a multiple of 16 bytes. ``apart``: only pages have strides."""
    sizes, strides = cache.shape[: 1 if apart else 3], cache.stride()
    steps = [stride * cache.element_size() for size, stride in zip(sizes, strides, strict=False) if size > 1]
    return cache.data_ptr() % 16 == 0 and not any(step % 16 for step in steps)


def launches(engine: Engine, call: Call, config: CallConfig, results: Sequence[Result]) -> Plan:
    """The launches of two kernels, into results (out and lse)."""
    (out_shape, dtype), (lse_shape, lse_dtype) = results
    made = (("to.out", tuple(out_shape), dtype), ("to.lse", tuple(lse_shape), lse_dtype))
    if math.prod(out_shape) == 0:
        return Plan("", config.name, results=made)
    unit = 16 if isinstance(config, DecodeSm90Config) else 4  # bytes that queries are loaded by
    numbers, tensors = call.tensors(unit)
    h_kv, group = call.caches[0].kv.size(2), call.group
    items, rows = call.q.size(0) * call.tokens, call.s_q * group
    row_blocks = -(-rows // config.rows)
    parts = parts_of(items * h_kv, engine.device.multiprocessors // row_blocks)
    part_rows = row_blocks * config.rows
    workspace = (
        ("to.out_parts", (parts, 2, part_rows, call.d_v), torch.float32),
        ("to.lse_parts", (parts, 2, part_rows), torch.float32),
        ("to.spans", (items * h_kv, 2), torch.int32),
    )
    shared: dict[str, Tensor | int | float | None] = {
        **{name: call.q.new_empty(0) for name, _, _ in (*made, *workspace)},
        "to.sink": None,
        **dict(zip(("to.out_batch", "to.out_token", "to.out_head"), _of_shape(out_shape, dtype), strict=False)),
        **dict(zip(("to.lse_batch", "to.lse_head", "to.lse_token"), _of_shape(lse_shape, lse_dtype), strict=False)),
        "to.h_kv": h_kv,
        **divisor("to.tokens", call.tokens),
        **divisor("to.group", group),
        **numbers,
        **{parameter: tensor for parameter, _, tensor, _ in tensors},
    }
    work = [engine.prepare(config, (row_blocks, parts, 1), shared)]
    if not call.whole and parts > 1:  # something may be cut
        combine = CombineConfig(config.dtype, call.d_v)
        grid = (items * h_kv, -(-rows // combine.warps), 1)
        work.append(engine.prepare(combine, grid, {**shared, "rows": rows, "part_rows": part_rows}))
    given = tuple((parameter, name, fix) for parameter, name, _, fix in tensors)
    return Plan("", config.name, given, made, workspace, tuple(work))


def _of_shape(shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    """The strides of a contiguous tensor, in bytes."""
    return [math.prod(shape[i + 1 :]) * dtype.itemsize for i in range(len(shape))]


def parts_of(items: int, most: int) -> int:
    """Parts of the line of work: as many as run at once; or few less, if items of equal length are cut alike then.

    64 items in 66 parts would nearly all be cut, and merged; in 64 parts none is.
    """
    even = (
        parts for parts in range(most, most - most // 16 - 1, -1) if parts and not (items % parts and parts % items)
    )
    return max(1, next(even, most))


SOURCE = (
    *("kv", "k", "index", "lengths", "kv_page", "kv_row", "kv_head", "k_page", "k_row", "k_head", "index_row"),
    *("n_pages", "page_size", "page_magic", "page_shift", "capacity"),
)
