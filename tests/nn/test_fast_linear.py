"""fast_linear changes a model's speed and nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.nn import FastLinear, PanelLinear, fast_linear, restore_linear


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.SiLU(), nn.Linear(48, 16, bias=False)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("panels", [False, True])
@torch.no_grad()
def test_the_same_output(dtype: torch.dtype, rows: int, panels: bool) -> None:
    model, x = mlp(dtype), torch.randn(2, rows, 24).to(dtype)
    expected = model(x)
    assert fast_linear(model, panels=panels) == 2
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


@pytest.mark.parametrize("panels", [False, True])
@torch.no_grad()
def test_one_graph_for_any_number_of_rows(panels: bool) -> None:
    model = mlp()
    fast_linear(model, panels=panels)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 7, 31, 40, 100):
        x = torch.randn(rows, 24)
        torch.testing.assert_close(compiled(x), model(x))
    assert counter.frame_count == 1


@torch.no_grad()
def test_panels_leave_the_state_as_it_was() -> None:
    model, x = mlp(), torch.randn(3, 24)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    assert fast_linear(model, panels=True) == 2
    assert type(model[0]) is type(model[2]) is PanelLinear
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    for assign in (False, True):
        model.load_state_dict({name: 2 * tensor for name, tensor in state.items()}, assign=assign)
        assert torch.equal(model[2].weight, 2 * state["2.weight"])
        model.load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state | {"2.weight": torch.ones(3, 3)})
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.double().float()):
        assert type(same[0]) is PanelLinear
        torch.testing.assert_close(same(x), expected)
    assert restore_linear(model) == 2
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()] == list(state)
    torch.testing.assert_close(model(x), expected)


def test_what_has_a_second_reader_is_not_packed() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(32, 8), "head": nn.Linear(8, 32, bias=False)})
    model["head"].weight = model["embedding"].weight
    model["kv_b_proj"], model["odd"] = nn.Linear(8, 16), nn.Linear(8, 17)
    assert fast_linear(model, panels=True) == 3
    assert {type(model[name]) for name in ("head", "kv_b_proj", "odd")} == {FastLinear}
    assert model["head"].weight is model["embedding"].weight


def test_panels_pass_gradients_to_their_input() -> None:
    model, x = mlp(), torch.randn(3, 24, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    fast_linear(model, panels=True)
    (actual,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(actual, expected)


def merge(weight: Tensor) -> None:
    weight.data += torch.ones_like(weight)


def into_the_first_row(weight: Tensor) -> None:
    weight[0] = 1.0


def through_data(weight: Tensor) -> None:
    weight.data = torch.ones_like(weight)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda w: w.mul_(2),
    "of a view": lambda w: w.T[:, 1].add_(1),
    "LoRA": merge,
    "data": through_data,
    "copy": lambda w: w.detach().copy_(torch.ones_like(w)),
    "index": into_the_first_row,
    "init": nn.init.xavier_uniform_,
    "init of a row": lambda w: nn.init.zeros_(w[0]),
    "out": lambda w: torch.add(w, 1, out=w),
    "foreach": lambda w: torch._foreach_add_([w], 1.0),
    "operator": lambda w: torch.ops.aten.add_.Tensor(w, w),
    "gradient": lambda w: w.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_write_into_panels_is_refused(write: str, mode: type) -> None:
    model = mlp()
    fast_linear(model, panels=True)
    before = model.state_dict()
    with mode(), pytest.raises(ArgumentError, match="a weight that is kept in panels"):
        WRITES[write](model[0].weight)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


@torch.no_grad()
def test_what_reads_a_weight_in_panels_gets_plain_tensors() -> None:
    model, plain = mlp(), mlp()[0].weight.detach()
    fast_linear(model, panels=True)
    weight = model[0].weight
    copies = (copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)))
    for read in (weight + 1, weight.clone(), weight.half(), weight.sum(), weight @ weight.T, *copies):
        assert type(read) is Tensor
    assert all(type(x) is Tensor for x in model.state_dict().values())
    assert torch.equal(weight, plain)
    assert torch.equal(plain.clone().add_(weight), 2 * plain)
    assert (weight.dtype, weight.shape, weight.device.type) == (plain.dtype, plain.shape, "cpu")


@pytest.mark.parametrize("parameter", [False, True])
@torch.no_grad()
def test_an_assigned_weight_is_computed_with(parameter: bool) -> None:
    model, x = mlp(), torch.randn(5, 24)
    fast_linear(model, panels=True)
    weight = torch.randn(48, 24)
    model[0].weight = nn.Parameter(weight) if parameter else weight
    assert type(model[0]) is PanelLinear
    torch.testing.assert_close(model[0](x), nn.functional.linear(x, weight, model[0].bias))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("panels", [False, True])
@torch.no_grad()
def test_quantize_dynamic_finds_the_layers(panels: bool) -> None:
    model, x = mlp(), torch.randn(5, 24)
    expected = torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear}, dtype=torch.qint8)
    fast_linear(model, panels=panels)
    actual = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert [type(layer) for layer in actual] == [type(layer) for layer in expected]
    assert torch.equal(actual(x), expected(x))
