"""Every operator on the device: torch's own checks, float64, and the same through torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bench.gpu_check.report import Report, Row, one_paragraph
from flashmla_ops import reference
from flashmla_ops.cuda import loader
from lowering import backend

flashmla = torch.ops.flashmla
#: Largest distance from float64 over the largest element, by type: two roundings of the result.
TOLERANCE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 2e-6}
#: By name; ours itself, since only an installed package has entered its name.
BACKENDS: dict[str, Any] = {"inductor": "inductor", "flashmla": backend.flashmla}


@dataclass(frozen=True)
class Call:
    """A call of an operator. ``definition``: what float64 is computed by; None: the reference of the same name."""

    name: str
    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    definition: Callable[..., Any] | None = None

    def __call__(self) -> Any:
        return self.op(*self.args, **self.kwargs)


def calls(device: str) -> Iterator[Call]:
    """Small calls of every operator that returns its result, in every type."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device)

    for dtype in TOLERANCE:
        kind = str(dtype).removeprefix("torch.")
        a, weight, bias = normal(5, 128, dtype=dtype), normal(192, 128, dtype=dtype), normal(192, dtype=dtype)
        yield Call(f"gemm {kind}", flashmla.gemm.default, (a, weight))
        yield Call(f"gemm bias silu {kind}", flashmla.gemm.default, (a, weight, bias), {"activation": "silu"})
        yield Call(f"gemm silu_mul {kind}", flashmla.gemm.default, (a, weight), {"activation": "silu_mul"})
        heads = normal(4, 3, 64, dtype=dtype), normal(4, 64, 128, dtype=dtype)
        yield Call(f"bmm {kind}", flashmla.bmm.default, heads)
        yield Call(f"bmm transposed {kind}", flashmla.bmm.default, (heads[0], normal(4, 128, 64, dtype=dtype).mT))
        experts = normal(9, 64, dtype=dtype), normal(3, 128, 64, dtype=dtype), ints(0, 4, 4, 9)
        yield Call(f"grouped_gemm {kind}", flashmla.grouped_gemm.default, experts, definition=by_groups)
        q, cache = normal(2, 1, 16, 96, dtype=dtype), normal(6, 16, 1, 96, dtype=dtype)
        table, lengths = ints(5, 1, 3, 0, 2, 4).view(2, 3), ints(40, 0)
        yield Call(f"decode {kind}", flashmla.decode.default, (q, cache, None, table, lengths, 64))
        weight = normal(16, 64, 32, dtype=dtype)
        arguments = (q, cache, None, table, lengths, weight, 64)
        yield Call(f"decode_up {kind}", flashmla.decode_up.default, arguments, definition=up)
        rows = [normal(n, 4, d, dtype=dtype) for n, d in ((7, 48), (9, 48), (9, 32))]
        bounds = ints(0, 3, 7), ints(0, 4, 9)
        yield Call(f"prefill {kind}", flashmla.prefill.default, (*rows, *bounds, True))
        outs, lses = [normal(3, 4, 24, dtype=dtype) for _ in range(3)], [torch.rand(4, 3, device=device)] * 3
        yield Call(f"merge_states {kind}", flashmla.merge_states.default, (outs, lses))


def up(*arguments: Any) -> Any:
    *cached, weight, d_v = arguments
    return reference.decode_up(*cached, d_v, weight=weight)


def by_groups(a: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return reference.grouped_gemm(a, weight, list(pairwise(offsets.tolist())))


def check(report: Report, device: str, reserve: float) -> None:
    """Sections "operators" (opcheck and float64) and "compile", and in "choices" which kernels ran."""
    for call in report.until_late("operators", calls(device), reserve):
        report.add("operators", {"name": call.name} | attempt(partial(check_operator, call)))
    for call in report.until_late("compile", calls(device), reserve):
        for name, compiler in BACKENDS.items():
            row: Row = {"name": f"{call.name}, {name}"}
            report.add("compile", row | attempt(partial(check_compiled, call, compiler)))
    for line in loader.explain():
        report.add("choices", {"name": line.strip()})


def attempt(run: Callable[[], Row]) -> Row:
    """The row of a check, or the error that ended it."""
    try:
        return run()
    except Exception as error:  # any: a report of what does not work is what this is for
        return {"state": "failed", "why": f"{type(error).__name__}: {one_paragraph(error)}"}


def check_operator(call: Call) -> Row:
    found = torch.library.opcheck(call.op, call.args, call.kwargs, raise_exception=False)
    bad = {name: result for name, result in found.items() if result != "SUCCESS"}
    error, tolerance = relative_error(call)
    failures = [f"{name}: {str(result).splitlines()[0]}" for name, result in bad.items()]
    failures += [f"error {error:.3g} above {tolerance:.3g}"] if not error <= tolerance else []
    return {"state": "failed" if failures else "passed", "error": error, "why": "; ".join(failures)}


def relative_error(call: Call) -> tuple[float, float]:
    """The largest distance of the first result from float64, over its largest element; and what is allowed."""
    definition = call.definition or getattr(reference, call.op._schema.name.split("::")[1])
    expected = first(definition(*widened(call.args), **call.kwargs)).double()
    actual = first(call())
    error = float((actual.double() - expected).abs().max() / expected.abs().max())
    return error, TOLERANCE[actual.dtype]


def widened(value: Any) -> Any:
    """Floating-point tensors as float64, which the definitions compute in, too."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(widened(each) for each in value)
    return value


def first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def check_compiled(call: Call, compiler: Any) -> Row:
    """One graph, the same result; what follows the operator may be fused with it."""
    torch._dynamo.reset()

    def function(*args: Any, **kwargs: Any) -> Tensor:
        return first(call.op(*args, **kwargs)).sigmoid()

    expected = function(*call.args, **call.kwargs)
    with torch.no_grad():
        actual = torch.compile(function, backend=compiler, fullgraph=True)(*call.args, **call.kwargs)
    error = float((actual.double() - expected.double()).abs().max())
    allowed = 2 * TOLERANCE[expected.dtype]
    good = error <= allowed
    return {"state": "passed" if good else "failed", "error": error, "why": "" if good else f"above {allowed:.3g}"}
