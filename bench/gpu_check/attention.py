"""The attention operators on the device: right, as float64 has it, and how fast beside torch and the run's limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu_check import limits
from bench.gpu_check.gemms import COLD, rotating
from bench.gpu_check.operators import attempt
from bench.gpu_check.report import Report, Row
from bench.gpu_check.timing import interleaved
from cutlass_kernels.attention.config import CombineConfig, Config
from flashmla_ops.cuda import loader
from flashmla_ops.cuda.attention import NAMES, choose
from flashmla_ops.cuda.catalogue import DEVICES
from flashmla_ops.cuda.catalogue import cache as cache_of
from flashmla_ops.cuda.catalogue import call as call_of
from flashmla_ops.formats import NATIVE, QUANTIZED
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.ops.operator import Operator
from flashmla_ops.ops.sparse import SPARSE_DECODE

SECTION, SPEED = "attention", "attention speed"
DEVICE = "cuda"
D, D_V = 576, 512
#: Relative distance from float64 by Frobenius norm: weights and results are rounded to 8 or 11 bits.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}
LSE_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Case:
    """``lengths`` of a dense call; of a sparse one ``topk`` indices a query token, and a second cache of its own."""

    lengths: tuple[int, ...]
    h_q: int = 128
    h_kv: int = 1
    s_q: int = 1
    page_size: int = 64
    dtype: torch.dtype = torch.bfloat16
    row_format: str = NATIVE
    causal: bool = False
    sink: bool = False
    topk: int = 0
    extra: str = ""
    batch_invariant: bool = False
    d: int = D
    d_k: int = 0
    d_v: int = D_V
    qk_start: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        kind = f"sparse topk {self.topk}{' + ' + self.extra if self.extra else ''}" if self.topk else "dense"
        shape = f"b {len(self.lengths)} h_q {self.h_q} h_kv {self.h_kv} s_q {self.s_q} s_kv {max(self.lengths)}"
        rows = self.row_format
        if rows == NATIVE:
            rows = f"{self.d}{f'+{self.d_k}' if self.d_k else ''}/{self.d_v}"
        options = "".join(f" {name}" for name in ("causal", "sink", "batch_invariant") if getattr(self, name))
        return f"{kind} {rows} {str(self.dtype)[6:]} {shape} page {self.page_size}{options}"

    @property
    def elements(self) -> int:
        return self.d + self.d_k if self.row_format == NATIVE else QUANTIZED[self.row_format].elements

    @property
    def op(self) -> Any:
        return torch.ops.flashmla.sparse_decode.default if self.topk else torch.ops.flashmla.decode.default

    @property
    def flops(self) -> float:
        rows = sum(min(n, self.topk) if self.topk else n for n in self.lengths) * (2 if self.extra else 1)
        return 2.0 * rows * self.s_q * self.h_q * (self.elements - self.qk_start + self.d_v)

    @property
    def moved_bytes(self) -> int:
        """Rows once a sequence (query token, if sparse), queries and results once."""
        native = (self.d + self.d_k) * 2 * self.h_kv
        row = native if self.row_format == NATIVE else QUANTIZED[self.row_format].bytes
        row += QUANTIZED[self.extra].bytes if self.extra else 0
        rows = sum(min(n, self.topk) * self.s_q if self.topk else n for n in self.lengths)
        queries = len(self.lengths) * self.s_q * self.h_q * 2 * (self.elements - self.qk_start + self.d_v)
        return rows * row + queries + 4 * self.s_q * len(self.lengths) * self.topk


def arguments(case: Case) -> dict[str, Any]:
    """The operator's arguments: pages in any order, NaN in every row that nobody owns."""
    generator = torch.Generator(DEVICE).manual_seed(case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE).to(case.dtype)

    b, page_size = len(case.lengths), case.page_size
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=DEVICE)
    pages = max(-(-max(case.lengths) // page_size), 1)
    order = torch.randperm(b * pages + 1, generator=generator, device=DEVICE)
    table = order[1:].view(b, pages).int()
    owned = torch.zeros(b * pages + 1, page_size, dtype=torch.bool, device=DEVICE)
    owned[table.long()] = (torch.arange(pages * page_size, device=DEVICE) < lengths[:, None]).view(b, pages, -1)
    common = {
        "q": normal(b, case.s_q, case.h_q, case.elements - case.qk_start),
        "kv_cache": cache(case, case.row_format, owned, generator),
        "k_cache": native(normal, owned, case.h_kv, case.d_k) if case.d_k else None,
        "d_v": case.d_v,
        "qk_start": case.qk_start,
        "row_format": case.row_format,
        "attn_sink": torch.randn(case.h_q, generator=generator, device=DEVICE) if case.sink else None,
    }
    if not case.topk:
        return common | {"block_table": table, "cache_seqlens": lengths, "causal": case.causal}
    return common | chosen(case, table, generator)


def chosen(case: Case, table: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Indices of rows of each sequence, some of which name nothing; and a second cache, all of which are owned."""
    b, page_size = len(case.lengths), case.page_size
    rows = torch.rand(b, case.s_q, case.topk, generator=generator, device=DEVICE)
    positions = (rows * torch.tensor(case.lengths, device=DEVICE)[:, None, None]).long()
    slots = table.long().gather(1, (positions // page_size).flatten(1)).view_as(positions) * page_size
    indices = (slots + positions % page_size).int()
    indices[:, :, 5::97] = -1
    found: dict[str, Any] = {"indices": indices, "batch_invariant": case.batch_invariant}
    if case.extra:
        owned = torch.ones(len(case.lengths) * 2 + 1, 32, dtype=torch.bool, device=DEVICE)
        found["extra_kv_cache"] = cache(case, case.extra, owned, generator)
        found["extra_row_format"] = case.extra
        shape = (b, case.s_q, case.topk)
        found["extra_indices"] = torch.randint(
            owned.numel(), shape, generator=generator, device=DEVICE, dtype=torch.int32
        )
    return found


def native(normal: Callable[..., Tensor], owned: Tensor, h_kv: int, d: int) -> Tensor:
    rows = normal(*owned.shape, h_kv, d)
    rows[~owned] = torch.nan
    return rows


def cache(case: Case, row_format: str, owned: Tensor, generator: torch.Generator) -> Tensor:
    if row_format == NATIVE:
        return native(
            lambda *shape: torch.randn(shape, generator=generator, device=DEVICE).to(case.dtype),
            owned,
            case.h_kv,
            case.d,
        )
    row = QUANTIZED[row_format]
    # Few rows of each kind, many times: to quantise in float64 takes long, and memory is what is read anyway.
    some = row.quantize(torch.randn(1024, 1, row.elements, generator=generator, device=DEVICE))
    rows = some[torch.randint(0, 1024, owned.shape, generator=generator, device=DEVICE)]
    rows[~owned] = 0xFF
    made = torch.empty(*owned.shape, 1, row.bytes, dtype=torch.uint8, device=DEVICE)
    parts = row.parts(made)
    for part, piece in zip(parts, rows.split([part.size(-1) for part in parts], dim=-1), strict=True):
        part.copy_(piece)
    return made


def cases() -> Iterator[Case]:
    """Small ones: every sort of row, of heads and of lengths."""
    lengths = (300, 0, 65, 1, 1000)
    for h_q, s_q, causal in itertools.product((1, 16, 20, 64, 128), (1, 2), (False, True)):
        yield Case(lengths, h_q=h_q, s_q=s_q, causal=causal, sink=causal)
    for page_size in (1, 7, 16, 128):
        yield Case(lengths, page_size=page_size, s_q=2, causal=True, h_q=40)
    for dtype in TOLERANCE:
        for h_q in (8, 128):
            yield Case(lengths, dtype=dtype, h_q=h_q, d=512, d_k=64, s_q=2, causal=True)
            yield Case((300, 1, 65), dtype=dtype, h_q=h_q, topk=500, s_q=2, sink=True)
        yield Case(lengths, dtype=dtype, h_q=32, h_kv=4, d=256, d_v=128, qk_start=128)
        yield Case(lengths, dtype=dtype, h_q=12, h_kv=3, d=96, d_v=64)
    yield Case((40_000,), h_q=16)
    yield Case((100,) * 300, h_q=16)
    for name in QUANTIZED:
        for h_q in (8, 128):
            yield Case(lengths, h_q=h_q, row_format=name, causal=True, s_q=2)
            yield Case((300, 7, 65), h_q=h_q, row_format=name, topk=200, s_q=2, sink=True)
    yield Case((300, 7, 65), h_q=64, topk=200, s_q=2, sink=True, batch_invariant=True)
    for first, second in (("fp8_model1", "fp8_model1"), ("fp8_v41", "fp8_v41"), ("fp8_v41", "fp4_v41")):
        for h_q in (8, 128):
            yield Case((300, 7, 65), h_q=h_q, row_format=first, extra=second, topk=200, s_q=2)


def timed() -> Iterator[Case]:
    """A decode step at 4096 tokens."""
    for h_q, b in itertools.product((128, 64, 16), (1, 16, 64, 128)):
        yield Case((4096,) * b, h_q=h_q)
    yield Case((4096,) * 64, s_q=2, causal=True)
    for name in ("fp8_v32", "int8_g128"):
        yield from (Case((4096,) * 64, h_q=h_q, row_format=name) for h_q in (128, 16))
    for b in (16, 64, 128):
        yield from (Case((32768,) * b, h_q=h_q, row_format="fp8_v32", topk=2048) for h_q in (128, 64))
    yield Case((8192,) * 64, row_format="fp8_model1", extra="fp8_model1", topk=512, h_q=64)


def checked(arch: str) -> Iterator[Config]:
    """The kernels that the cases need."""
    for case in (*cases(), *timed()):
        source = "indices" if case.topk else "pages"
        dtype = case.dtype
        native = (dtype, case.d, case.d_k, case.h_kv) if case.row_format == NATIVE else ()
        first = cache_of(source, case.row_format, *native)
        caches = [first] + ([cache_of(source, case.extra)] if case.extra else [])
        call = call_of(*caches, heads=case.h_q, tokens=case.s_q, qk_start=case.qk_start, d_v=case.d_v, dtype=dtype)
        yield choose(DEVICES[arch], call)
        yield CombineConfig(NAMES[dtype], case.d_v)


def check(report: Report, reserve: float) -> None:
    """A row a case in section "attention"."""
    for case in report.until_late(SECTION, cases(), reserve):
        report.add(SECTION, {"name": case.name} | attempt(partial(check_one, case)))


def check_one(case: Case) -> Row:
    given = arguments(case)
    out, lse = case.op(**given)
    operator: Operator[Any] = SPARSE_DECODE if case.topk else DECODE
    expected, expected_lse = operator.reference(**given)
    error = float((out.double() - expected.double()).norm() / expected.double().norm())
    seen = torch.isfinite(expected_lse)
    lse_error = float((lse - expected_lse)[seen].abs().max())
    faults = [f"error {error:.3g} above {TOLERANCE[case.dtype]}"] if not error <= TOLERANCE[case.dtype] else []
    faults += [f"lse is off by {lse_error:.3g}"] if not lse_error <= LSE_TOLERANCE else []
    faults += ["lse is infinite elsewhere"] if not torch.equal(seen, torch.isfinite(lse)) else []
    served = next(reversed(loader.engine(torch.cuda.current_device()).chosen.values()))
    faults += [served] if "definition" in served else []
    state = "failed" if faults else "passed"
    return {"state": state, "error": error, "lse_error": lse_error, "kernel": served, "why": "; ".join(faults)}


def speed(report: Report, measured: dict[str, float], reserve: float) -> None:
    """A row a case in section "attention speed"."""
    for case in report.until_late(SPEED, timed(), reserve):
        report.add(SPEED, {"name": case.name} | attempt(partial(time_one, case, measured)))
        torch.cuda.empty_cache()


def time_one(case: Case, measured: dict[str, float]) -> Row:
    sets = max(1, min(8, COLD // case.moved_bytes))
    given = [arguments(case) for _ in range(sets)]
    calls: dict[str, Callable[[], object]] = {"ours": rotating([partial(case.op, **each) for each in given])}
    if (peer := sdpa(case)) is not None:
        calls["torch"] = peer
    found = interleaved(calls)
    ours = found["ours"]
    kind = "fp16" if case.dtype == torch.float16 else "bf16"
    least, binding = limits.bound(case.flops, case.moved_bytes, kind, measured)
    row: Row = {"us": ours.seconds * 1e6, "spread": ours.spread, "graph": ours.graph}
    row |= {"tflops": case.flops / ours.seconds / 1e12, "tbs": case.moved_bytes / ours.seconds / 1e12}
    row |= {"of_limit": least / ours.seconds, "limit": binding}
    if "torch" in found:
        row |= {"torch_us": found["torch"].seconds * 1e6, "times_torch": found["torch"].seconds / ours.seconds}
    return row


def sdpa(case: Case) -> Callable[[], object] | None:
    """torch's attention over as many rows that lie side by side, heads in the place of its query tokens."""
    if case.topk or case.row_format != NATIVE or case.s_q != 1 or case.h_kv != 1 or len(set(case.lengths)) != 1:
        return None
    b, n = len(case.lengths), case.lengths[0]
    q = torch.randn(b, 1, case.h_q, case.elements, dtype=case.dtype, device=DEVICE)
    rows = torch.randn(b, 1, n, case.elements, dtype=case.dtype, device=DEVICE)
    values = rows[..., : case.d_v]
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, rows, values)
