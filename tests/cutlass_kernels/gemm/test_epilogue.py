"""The list of epilogues: names, and the functions that CUTLASS traces compute what the reference says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cutlass_kernels.gemm.epilogue import ACTIVATIONS, Epilogue
from flashmla_ops import reference

EPILOGUES = st.builds(
    Epilogue,
    row_scale=st.booleans(),
    col_scale=st.booleans(),
    bias=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    gate=st.booleans(),
    residual=st.booleans(),
).filter(lambda epilogue: not epilogue.problems())


def run(epilogue: Epilogue, **values: float) -> float:
    scope: dict[str, Any] = {
        "relu": lambda x: max(x, 0.0),
        "silu": lambda x: x / (1 + math.exp(-x)),
        "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    }
    exec(epilogue.source(), scope)
    function = scope["epilogue"]
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return float(function(**{name: values[name] for name in names}))


@given(EPILOGUES, st.lists(st.floats(-4, 4), min_size=6, max_size=6))
def test_the_traced_function_is_the_reference(epilogue: Epilogue, drawn: list[float]) -> None:
    if epilogue.plain:
        return
    accum, alpha, row, col, bias, c = drawn
    actual = run(epilogue, accum=accum, alpha=alpha, row_scale=row, col_scale=col, bias=bias, C=c)
    one = torch.ones(1, 1, dtype=torch.float64)
    scale = (col if epilogue.col_scale else 1.0) * (row if epilogue.row_scale else 1.0) * alpha
    expected = reference.gemm(
        one * accum,
        one,
        one[0] * bias if epilogue.bias else None,
        one * c if epilogue.residual else None,
        one[0] * scale,
        epilogue.activation,
    )
    if epilogue.gate:
        expected = expected * torch.nn.functional.silu(one * c)
    assert actual == pytest.approx(expected.item(), rel=1e-12, abs=1e-12)


@given(EPILOGUES, EPILOGUES)
def test_one_name_one_epilogue(first: Epilogue, second: Epilogue) -> None:
    assert (first.name == second.name) == (first == second)
