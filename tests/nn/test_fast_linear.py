"""fast_linear changes a model's speed and nothing else."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from flashmla_ops.nn import FastLinear, fast_linear, restore_linear


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 8, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
@torch.no_grad()
def test_the_same_output(dtype: torch.dtype, rows: int) -> None:
    model, x = mlp(dtype), torch.randn(2, rows, 24).to(dtype)
    expected = model(x)
    assert fast_linear(model) == 2
    rounding = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(model(x), expected, atol=rounding, rtol=rounding)


def test_swaps_and_restores_in_place() -> None:
    model = mlp()
    model.append(nn.Bilinear(2, 2, 2))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert fast_linear(model) == 2
    assert fast_linear(model) == 0
    assert isinstance(model[0], FastLinear)
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert restore_linear(model) == 2
    assert type(model[0]) is nn.Linear


def test_training_goes_through_the_original() -> None:
    model, x = mlp(), torch.randn(3, 24)
    model(x).sum().backward()
    expected = model[0].weight.grad.clone()
    model.zero_grad()
    fast_linear(model)
    model(x).sum().backward()
    assert torch.equal(model[0].weight.grad, expected)


@torch.no_grad()
def test_one_graph_for_any_number_of_rows() -> None:
    model = mlp()
    fast_linear(model)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 7, 31, 40, 100):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1
