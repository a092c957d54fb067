"""A quantised linear layer is the linear layer of what its integers stand for."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashmla_ops.errors import ArgumentError
from flashmla_ops.nn import fast_linear
from flashmla_ops.quant import QuantizedLinear, dequantize, explain, quantize, report
from flashmla_ops.quant.weights import FORMATS, decode

#: Of the largest element, half a step of the integers, and the rounding of the scale to bfloat16.
STEP = {"int8": 0.5 / 127, **{name: 0.5 / 6 + 2.0**-8 for name in FORMATS if name.startswith("int4")}}
UNIT = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 32, bias=False)).to(dtype).eval()


@given(
    st.sampled_from([*FORMATS]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.sampled_from([*UNIT]),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
@torch.no_grad()
def test_equals_float64_of_what_it_keeps(
    name: str, panels: int, groups: int, dtype: torch.dtype, rows: int, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(128 * groups, 16 * panels, bias).to(dtype)
    before, a = layer.weight.detach().clone(), torch.randn(rows, 128 * groups).to(dtype)
    quantize(layer, name)
    kept = decode(layer.packed, layer.scale, torch.float64)
    assert torch.equal(layer.weight, kept.to(dtype))
    groups_of_scale = before.double().unflatten(1, (-1, FORMATS[name].group or before.shape[1]))
    largest = groups_of_scale.abs().amax(-1, keepdim=True)
    clipped = (kept.view_as(groups_of_scale) - groups_of_scale).abs() / largest
    assert clipped.square().mean().sqrt() <= STEP[name]
    expected = a.double() @ kept.T + (0 if layer.bias is None else layer.bias.double())
    scale = a.double().abs() @ kept.abs().T + 1
    assert bool(((layer(a).double() - expected).abs() <= UNIT[dtype] * scale).all())


@pytest.mark.parametrize("name", FORMATS)
def test_special_weights(name: str) -> None:
    """Groups of zeros, of one large element, and of numbers near the ends of the range."""
    weight = torch.zeros(16, 128)
    weight[1, 5], weight[2], weight[3], weight[4, ::2] = -3.0, 1e-40, 1e38, torch.tensor(2.0**-120)
    found = decode(*FORMATS[name].encode(weight), torch.float64)
    assert bool(found.isfinite().all())
    assert bool(((found - weight.double()).abs() <= 0.01 * weight.abs().amax(1, keepdim=True) + 2.0**-120).all())


@pytest.mark.parametrize("weights", ["int8", "int4", "int4_g32"])
@torch.no_grad()
def test_state_dict_goes_into_a_fresh_model(weights: str) -> None:
    model, x = mlp(), torch.randn(3, 64)
    found = quantize(model, weights)
    state, expected = model.state_dict(), model(x)
    assert list(state) == ["0.bias", "0.packed", "0.scale", "2.packed", "2.scale"]
    with torch.device("meta"):
        fresh = mlp()
    quantize(fresh, found.plan)
    fresh.load_state_dict(state, assign=True)
    other = mlp().bfloat16()
    quantize(other, found.plan)
    other.float().load_state_dict(state)
    for each in (fresh, other, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(x), expected)
    quantize(wrong := mlp(), "int8" if weights != "int8" else "int4")
    with pytest.raises(RuntimeError, match=r"0\.packed: expected torch\..*, got torch\.int"):
        wrong.load_state_dict(state)


@torch.no_grad()
def test_dtypes_and_repr() -> None:
    model, x = mlp(), torch.randn(3, 64)
    quantize(model, {"0": "int8", "2": "int4_g64"})
    expected = model(x)
    model.to(torch.bfloat16)
    assert (model[0].scale.dtype, model[2].scale.dtype) == (torch.float32, torch.bfloat16)
    assert model[0].weight.dtype == model(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(model(x.bfloat16()).float(), expected, atol=2e-2, rtol=2e-2)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(x).dtype == torch.bfloat16
    assert "out_features=32, bias=False, format=int4_g64" in repr(model[2])
    assert "float32 x int4_g64" in explain(model)


def test_the_gradient_of_an_input() -> None:
    model, x = mlp(), torch.randn(3, 64, requires_grad=True)
    quantize(model, "int4")
    model(x).sum().backward()
    found, x.grad = x.grad, None
    assert dequantize(model) == 2
    assert type(model[0]) is nn.Linear
    assert [*model.state_dict()] == ["0.weight", "0.bias", "2.weight"]
    model(x).sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_what_stays_and_why() -> None:
    class Odd(nn.Linear):
        pass

    tied, embedding = nn.Linear(64, 256, bias=False), nn.Embedding(256, 64)
    tied.weight = embedding.weight
    layers = {"short": nn.Linear(48, 32), "odd": Odd(64, 32), "few": nn.Linear(64, 24), "wide": nn.Linear(704, 16)}
    model = nn.ModuleDict({"embedding": embedding, "head": tied, **layers, "kv_b_proj": nn.Linear(64, 32)})
    model["f64"] = nn.Linear(64, 16).double()
    fast_linear(model["wide"])
    found = quantize(model, "int4")
    assert found.plan == {"short": "int8", "wide": "int4_g64"}
    notes = {layer.name: layer.note for layer in found.layers}
    assert notes == {
        "embedding": "no linear layer (Embedding)",
        "head": "its weight is also that of embedding",
        "short": "rows of 48, no multiple of 128",
        "odd": "a Odd, and no plain nn.Linear",
        "few": "24 rows, no multiple of 16",
        "wide": "rows of 704, no multiple of 128",
        "kv_b_proj": "named in keep: kv_b_proj",
        "f64": "no operator takes float64",
    }
    assert tied.weight is embedding.weight
    sizes = [(layer.before, layer.bytes) for layer in found.layers if layer.name in ("head", "wide")]
    assert sizes == [(0, 0), (4 * 704 * 16, 704 * 16 // 2 + 2 * 16 * 11)]
    assert report(model).bytes == found.bytes
    assert "| int4_g64 | 1 " in str(found)


@torch.no_grad()
def test_errors() -> None:
    model = mlp()
    with pytest.raises(ArgumentError, match=r"'weights': expected one of int4, int8.*, got int5"):
        quantize(model, "int5")
    with pytest.raises(ArgumentError, match=r"'weights\['0'\]': expected one of int4"):
        quantize(model, {"0": "int2"})
    with pytest.raises(ArgumentError, match=r"'weights': expected names of linear layers.*, got 1"):
        quantize(model, {"1": "int8"})
    with pytest.raises(ArgumentError, match=r"'model': expected a model that was quantised, got Sequential"):
        dequantize(model)
    model[2].weight[3, 3] = torch.nan
    with pytest.raises(ArgumentError, match=r"'2\.weight': expected finite elements"):
        quantize(model, "int4")
    assert type(model[0]) is type(model[2]) is nn.Linear
    model[2].weight[3, 3] = 0.0
    quantize(model, "int4")
    for write in ("weight.zero_()", "weight[0].mul_(2)"):
        with pytest.raises(ArgumentError, match=r"no write to a copy of a quantised weight \(call dequantize"):
            eval(f"layer.{write}", {"layer": model[0]})
    with pytest.raises(ArgumentError, match=r"no assignment to a quantised weight"):
        model[0].weight = nn.Parameter(torch.zeros(256, 64))
    with pytest.raises(RuntimeError, match=r"'a': expected rows of 64 elements, as weight, got 63"):
        model(torch.randn(2, 63))


@pytest.mark.parametrize("weights", ["int8", "int4"])
@torch.no_grad()
def test_one_graph_for_any_number_of_rows(weights: str) -> None:
    model = mlp()
    quantize(model, weights)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for rows in (2, 3, 40, 100):
        x = torch.randn(rows, 64)
        assert torch.equal(compiled(x), model(x))
    assert counter.frame_count == 1
    assert isinstance(model[0], QuantizedLinear)
