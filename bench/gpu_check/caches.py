"""What writes a cache and what goes around `decode`: `append_`, `merge_states` and `decode_schedule` on the device.

Results are compared with the definitions, computed on the CPU: caches and schedules bit for bit. Each call then runs
from a CUDA graph too, on inputs that were put in place after its capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bench.gpu_check.operators import TOLERANCE, attempt
from bench.gpu_check.report import Report, Row
from cutlass_kernels.attention.around_config import AppendConfig
from cutlass_kernels.attention.config import Config
from flashmla_ops import reference
from flashmla_ops.cuda import loader
from flashmla_ops.cuda.append import WIDTHS, quantising
from flashmla_ops.cuda.states import SCHEDULE, merging
from flashmla_ops.formats import NATIVE, QUANTIZED, Grouped

flashmla = torch.ops.flashmla
SECTION = "caches"


@dataclass(frozen=True)
class Call:
    """``run`` takes the tensors and returns what is to be compared; ``define`` is what it has to be."""

    name: str
    tensors: Sequence[Tensor]  # on the CPU
    run: Callable[..., Sequence[Tensor]]
    define: Callable[..., Sequence[Tensor]]
    tolerance: float = 0.0  # of the largest element; 0: the same bits


def calls(past_the_end: bool) -> Iterator[Call]:
    """``past_the_end``: with slots that the cache does not have, which a CPU refuses."""
    generator = torch.Generator().manual_seed(0)

    def slots(n: int, capacity: int) -> Tensor:
        """Some of them twice, negative, or past the end."""
        found = torch.randint(-capacity // 8, capacity, (n,), generator=generator)
        found[::7] = found[0]
        if past_the_end:
            found[3::11] = capacity + torch.arange(len(found[3::11])) ** 5
        return found

    for dtype in TOLERANCE:
        kind = str(dtype).removeprefix("torch.")
        for n, n_pages, page_size, heads, d in ((1, 1, 64, 1, 576), (300, 9, 16, 8, 128), (9000, 64, 64, 1, 37)):
            cache = torch.zeros(n_pages, page_size, heads, d, dtype=dtype)
            rows = torch.randn(n, heads, d, generator=generator).to(dtype)
            tensors = (cache, rows, slots(n, n_pages * page_size))
            name = f"append_ {kind} {n} rows of {heads}x{d}"
            yield Call(name, tensors, append, partial(define_append, NATIVE))
            k_rows = rows[..., : d // 2].contiguous()
            two = (cache, cache[..., : d // 2].contiguous(), rows, k_rows, tensors[2])
            yield Call(name.replace("append_", "append_.two"), two, append_two, define_append_two)
        for name, row in QUANTIZED.items():
            assert isinstance(row, Grouped)
            cache = torch.zeros(5, 64, 1, row.bytes, dtype=torch.uint8)
            tensors = (cache, hard_rows(row, 200, dtype, generator), slots(200, 320))
            run, define = partial(append, row_format=name), partial(define_append, name)
            yield Call(f"append_ {kind} to {name}", tensors, run, define)
        for parts, shape in ((2, (3, 2, 16, 512)), (9, (5, 3, 24)), (1024, (1, 2, 64))):
            outs, lses = states(parts, shape, dtype, generator)
            run, define = partial(merge, parts), partial(define_merge, parts)
            yield Call(f"merge_states {kind} {parts} parts", (*outs, *lses), run, define, TOLERANCE[dtype])
    for b, parts in ((0, 3), (1, 132), (77, 132), (5000, 1024)):
        lengths = torch.randint(0, 9000, (b,), generator=generator, dtype=torch.int32)
        run, define = partial(schedule, parts), partial(define_schedule, parts)
        yield Call(f"decode_schedule of {b} sequences in {parts} parts", (lengths,), run, define)


def checked() -> Iterator[Config]:
    """The kernels that the calls need."""
    yield from map(AppendConfig, WIDTHS)
    for dtype in TOLERANCE:
        yield from (quantising(name, dtype, 16) for name in QUANTIZED)
        yield merging(dtype, True)
    yield SCHEDULE


def append(cache: Tensor, rows: Tensor, slot_mapping: Tensor, row_format: str = NATIVE) -> tuple[Tensor, ...]:
    flashmla.append_(cache, rows, slot_mapping, row_format)
    return (cache,)


def define_append(row_format: str, cache: Tensor, rows: Tensor, slot_mapping: Tensor) -> tuple[Tensor, ...]:
    capacity = cache.size(0) * cache.size(1)
    reference.append(cache, rows, slot_mapping.where(slot_mapping < capacity, -1), row_format)
    return (cache,)


def append_two(*tensors: Tensor) -> tuple[Tensor, ...]:
    flashmla.append_.two(*tensors)
    return tensors[:2]


def define_append_two(
    cache: Tensor, k_cache: Tensor, rows: Tensor, k_rows: Tensor, slots: Tensor
) -> tuple[Tensor, ...]:
    return (*define_append(NATIVE, cache, rows, slots), *define_append(NATIVE, k_cache, k_rows, slots))


def merge(parts: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    found: tuple[Tensor, ...] = flashmla.merge_states(list(tensors[:parts]), list(tensors[parts:]))
    return found


def define_merge(parts: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return reference.merge_states(tensors[:parts], tensors[parts:])


def schedule(parts: int, lengths: Tensor) -> tuple[Tensor, ...]:
    return (flashmla.decode_schedule(lengths, 1, 128, 1, parts),)


def define_schedule(parts: int, lengths: Tensor) -> tuple[Tensor, ...]:
    return (reference.decode_schedule(lengths, 1, 128, 1, parts),)


def hard_rows(row: Grouped, n: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Rows of all sizes, among them zeros, numbers halfway between codes, subnormal ones, infinities and NaN."""
    x = torch.randn(n, 1, row.elements // 16, 16, generator=generator)
    x *= torch.exp2(torch.randint(-30, 15, (*x.shape[:-1], 1), generator=generator).float())
    kind = torch.randint(0, 12, (*x.shape[:-1], 1), generator=generator)
    x = torch.where(kind == 0, 0.0, x)
    x = torch.where(kind == 1, x.sign() * torch.randint(0, 17, x.shape, generator=generator) / 8, x)
    x = torch.where(kind == 2, x * 2.0**-100, x)
    x[::3, :, 1, 5], x[::6, :, -1, 3], x[1::6, :, 2, 0] = torch.nan, torch.inf, -torch.inf
    x = x.flatten(-2).to(dtype)
    x[::9] = torch.copysign(x[::9], torch.tensor(-1.0, dtype=dtype))  # NaN of either sign
    return x


def states(
    parts: int, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of parts, a third of whose rows saw nothing."""
    outs, lses = [], []
    for _ in range(parts):
        lse = torch.randn(*shape[:-3], shape[-2], shape[-3], generator=generator) * 5
        nothing = torch.rand(lse.shape, generator=generator) < 0.3
        out = torch.randn(shape, generator=generator)
        outs.append(torch.where(nothing.transpose(-1, -2)[..., None], torch.nan, out).to(dtype))
        lses.append(torch.where(nothing, torch.where(lse > 0, torch.inf, -torch.inf), lse))
    return outs, lses


def check(report: Report, device: str, reserve: float) -> None:
    """A row a call in section "caches"."""
    for call in report.until_late(SECTION, calls(past_the_end=device != "cpu"), reserve):
        report.add(SECTION, {"name": call.name} | attempt(partial(check_one, call, device)))
    if device != "cpu":
        chosen = loader.engine(torch.cuda.current_device()).chosen.items()
        unserved = [f"{name}: {served}" for name, served in chosen if "definition" in served]
        report.add(
            SECTION, {"name": "kernels", "state": "failed" if unserved else "passed", "why": "; ".join(unserved)}
        )


def check_one(call: Call, device: str) -> Row:
    expected = call.define(*copies(call.tensors, "cpu"))
    wrong = differences(call.run(*copies(call.tensors, device)), expected, call.tolerance)
    if device != "cpu":
        replayed = from_graph(call, device)
        wrong += [f"from a graph: {each}" for each in differences(replayed, expected, call.tolerance)]
    return {"state": "failed" if wrong else "passed", "why": "; ".join(wrong)}


def copies(tensors: Sequence[Tensor], device: str) -> list[Tensor]:
    return [tensor.to(device, copy=True) for tensor in tensors]


def from_graph(call: Call, device: str) -> Sequence[Tensor]:
    """The results of a replay; while the call was captured, its inputs were zeros."""
    tensors = [torch.zeros_like(tensor, device=device) for tensor in call.tensors]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call.run(*tensors)
    for tensor, value in zip(tensors, call.tensors, strict=True):
        tensor.copy_(value)
    graph.replay()
    return results


def differences(actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> list[str]:
    found = []
    for number, (x, y) in enumerate(zip(actual, expected, strict=True)):
        x = x.cpu()
        if tolerance == 0:
            bad = (
                (x.contiguous().view(torch.uint8) != y.contiguous().view(torch.uint8)).sum().item() if x.numel() else 0
            )
            found += [f"{bad} bytes of result {number} differ"] if bad else []
            continue
        same = (x == y) | (x.isnan() & y.isnan())
        error = (x.double() - y.double()).abs().where(~same, 0.0).max().item()
        limit = tolerance * y.double().where(y.isfinite(), 0.0).abs().max().item()
        found += [] if error <= limit else [f"result {number}: error {error:.3g} above {limit:.3g}"]
    return found
