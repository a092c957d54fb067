"""Runs a case through the operator, then through the float64 reference, and compares.

    python -m tests.support.oracle "DecodeCase(lengths=(3, 0), h_q=9)"

repeats one case; every failing case prints that line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from flashmla_ops import cpu, reference
from tests.support.cases import DecodeCase, DecodeInputs, build
from tests.support.compare import OFFICIAL_LSE, OFFICIAL_OUT, Tolerance, difference
from tests.support.threads import threads

Decode = Callable[..., tuple[Tensor, Tensor]]


def score_error(case: DecodeCase, inputs: DecodeInputs) -> float:
    """How far a score computed in float32 may be off: 4 units in the last place of |scale| |q| |k|."""
    keys = [inputs.kv_cache[..., case.qk_start :]] + ([] if inputs.k_cache is None else [inputs.k_cache])
    key_norms = sum(key.float().nan_to_num(0.0).square().sum(-1) for key in keys)
    q_norms = inputs.q.float().square().sum(-1)
    largest = [float(norms.max()) if norms.numel() else 0.0 for norms in (q_norms, key_norms)]
    return 2.0**-22 * abs(case.scale) * (largest[0] * largest[1]) ** 0.5


#: These multiply pairs of bf16, and so round the weights, as the official kernels do.
ROUND_WEIGHTS = ("avx512_bf16", "emulated")
#: Rounding a weight is one error for all heads of a column: a cosine of fewer columns is no average.
FEW_COLUMNS = 64


def of_columns(tolerance: Tolerance, dtype: str, columns: int) -> Tolerance:
    """What results of so many columns, all sequences and KV heads together, may be off by."""
    if dtype == "bfloat16" and cpu.STATE.active in ROUND_WEIGHTS and columns < FEW_COLUMNS:
        return replace(tolerance, cosine=max(8.0, FEW_COLUMNS / max(columns, 1)) * tolerance.cosine)
    return tolerance


def tolerances(case: DecodeCase, inputs: DecodeInputs) -> tuple[Tolerance, Tolerance]:
    """For out and lse. The official bounds assume the official data (scores far below 1); larger scores widen lse's."""
    if case.dtype == "float32":
        error = score_error(case, inputs)
        values = inputs.kv_cache[..., : case.d_v].nan_to_num(0.0)
        largest = float(values.abs().max()) if values.numel() else 0.0
        out = Tolerance(absolute=(2.0**-19 + 2 * error) * largest, relative=0.0, cosine=1e-9)
        return out, Tolerance(absolute=2.0**-20 + error, relative=2.0**-21, cosine=1e-9)
    columns = sum(length > 0 for length in case.lengths) * case.h_kv * case.d_v
    out = of_columns(OFFICIAL_OUT, case.dtype, columns)
    if case.q_spread <= 0.1 and case.softmax_scale is None:
        return out, OFFICIAL_LSE
    return out, replace(OFFICIAL_LSE, absolute=max(OFFICIAL_LSE.absolute, score_error(case, inputs)))


def mismatch(
    case: DecodeCase,
    inputs: DecodeInputs,
    actual: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor],
) -> str | None:
    """The fault of ``actual`` (out, lse), in one line that also says how to repeat it; None if it has none."""
    dtype = getattr(torch, case.dtype)
    out, lse = actual
    if out.dtype != dtype or lse.dtype != torch.float32:
        problem: str | None = f"dtypes {out.dtype} and {lse.dtype}"
    else:
        out_tolerance, lse_tolerance = tolerances(case, inputs)
        # The official tests too compare with what the output's dtype can hold.
        problem = difference("out", out, expected[0].to(dtype), out_tolerance)
        problem = problem or difference("lse", lse, expected[1].to(torch.float32), lse_tolerance)
    return problem and f'{problem} | python -m tests.support.oracle "{case!r}"'


def check_decode(case: DecodeCase, decode: Decode = torch.ops.flashmla.decode) -> None:
    """Assert that ``decode`` agrees with the float64 reference, which runs second: it cannot hide a bad write."""
    inputs = build(case)
    actual = decode(**inputs.kwargs())
    with threads(1 if case.small else torch.get_num_threads()):
        problem = mismatch(case, inputs, actual, reference.decode(**inputs.reference_kwargs()))
    assert problem is None, problem


if __name__ == "__main__":
    check_decode(eval(sys.argv[1], {"DecodeCase": DecodeCase, "inf": torch.inf}))
    print("passed")
