"""Whoever can see how the result of a rewritten attention lies in memory sees what eager gives; nobody else pays."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lowering
from lowering.passes.strides import viewed_strides
from tests.lowering.compiled import Compiled
from tests.lowering.passes.attentions import eager, inputs, repeat_kv, sdpa
from tests.lowering.passes.graphs import Rewritten, assert_equal_to, dynamic_lengths, operators, rewrite, traced

Q, K, V = inputs(5, 9)
YES = torch.tensor(True)


@torch.library.custom_op("flashmla_tests::contiguous", mutates_args=())
def contiguous(x: Tensor) -> Tensor:
    """An operator that takes nothing else."""
    assert x.is_contiguous(), x.stride()
    return x * 2


@torch.library.custom_op("flashmla_tests::in_memory", mutates_args=())
def in_memory(x: Tensor) -> Tensor:
    """An operator that reads the elements in the order in which they lie."""
    return x.as_strided((x.numel(),), (1,)).clone()


contiguous.register_fake(torch.empty_like)
in_memory.register_fake(lambda x: x.new_empty(x.numel()))


def cond(x: Tensor, which: Tensor) -> Tensor:
    result: Tensor = torch.cond(which, torch.sin, torch.cos, (x,))
    return result


def loop(x: Tensor) -> Any:
    return torch._higher_order_ops.while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), x))


#: Readers of strides: directly, and behind operators that keep them.
READERS: dict[str, Callable[[Tensor], Any]] = {
    "output": lambda x: x,
    "output-moved": lambda x: x.sin().transpose(1, 2),
    "as_strided": lambda x: x.as_strided((4, 7), (3, 2), 5),
    "as_strided-later": lambda x: (x + 1).as_strided((4, 7), (3, 2), 5),
    "contiguous": lambda x: contiguous(x.contiguous()),
    "in_memory": in_memory,
    "in_memory-later": lambda x: in_memory(x.cos().transpose(1, 2)),
    "cond": lambda x: cond(x, YES),
    "loop": loop,
    "written": lambda x: (x.add_(1), x[:, :, 0].mul_(2), x),
    "nonzero": lambda x: torch.nonzero(x > 0),
    "selected": lambda x: x[x > 0],
    "rows": lambda x: x[torch.tensor([True, False])] * 2,
}


def check(function: Callable[..., Any], *tensors: Tensor, dynamic: bool = False, inductor: bool = False) -> None:
    """Compare with eager: with the passes alone, or through all of Inductor."""
    compiled: Compiled | Rewritten = Compiled(function) if inductor else Rewritten(function)
    given = tuple(x.clone() for x in tensors)
    if dynamic:
        dynamic_lengths(*given[:3])
    expected = function(*tensors)
    got = compiled(*given)
    for one, other in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, expected)), strict=True):
        if isinstance(other, Tensor):
            assert (one.stride(), one.storage_offset()) == (other.stride(), other.storage_offset())
            assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()
            assert_equal_to(one, other)
    if isinstance(compiled, Compiled):
        assert "flashmla.decode.default(" in compiled.sources[0]
    else:
        assert sum("flashmla.decode.default" in graph.print_readable(False) for graph in compiled.graphs) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", READERS)
def test_who_sees_strides_sees_those_of_eager(name: str, dynamic: bool) -> None:
    if dynamic and name == "loop":
        pytest.skip("stock torch does not trace it")
    read = READERS[name]
    check(lambda q, k, v: read(eager(q, k, v)), Q, K, V, dynamic=dynamic)


@pytest.mark.parametrize("name", ["output-moved", "in_memory-later", "cond"])
def test_generated_code_lays_it_out_so(name: str) -> None:
    read = READERS[name]
    check(lambda q, k, v: read(eager(q, k, v)), Q, K, V, inductor=True)


def test_a_size_that_depends_on_data() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        length = n.item()
        torch._check(length >= 2)
        torch._check(length <= 5)
        return eager(q, k, v)[:, :, :length] * 2

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(function, Q, K, V, torch.tensor(3), inductor=True)


def test_keys_of_a_length_that_depends_on_data() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, n: Tensor) -> Tensor:
        length = n.item()
        torch._check(length >= 2)
        torch._check(length <= 9)
        return eager(q, k[:, :, :length], v[:, :, :length])

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        check(function, Q, K, V, torch.tensor(6))


def test_a_view_behind_a_graph_break() -> None:
    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = eager(q, k, v)
        torch._dynamo.graph_break()
        return out.view(-1)

    compiled = torch.compile(function, backend="flashmla")
    assert_equal_to(compiled(Q, K, V), function(Q, K, V))


@pytest.mark.parametrize("attend", [eager, sdpa()])
def test_inside_a_branch(attend: Callable[..., Tensor]) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, which: Tensor) -> Tensor:
        result: Tensor = torch.cond(which, lambda q, k, v: attend(q, k, v).sin(), lambda q, k, v: q * 2, (q, k, v))
        return result

    check(function, Q, K, V, YES, inductor=True)


def test_behind_flex_attention_and_a_branch() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def function(q: Tensor, k: Tensor, v: Tensor, which: Tensor) -> Tensor:
        x = flex_attention(q, k, v)
        assert isinstance(x, Tensor)
        return eager(x, k, v) + cond(x, which)

    check(function, Q, K, V, YES, inductor=True)


def test_readers_by_index_take_no_copy() -> None:
    graph = traced(lambda q, k, v: eager(q, k, v).transpose(1, 2).reshape(2, 5, 64).sum(-1), Q, K, V)
    rewrite(graph)
    targets = [str(node.target) for node in graph.graph.nodes]
    assert operators(graph) == ["decode"]
    assert "aten.as_strided.default" not in targets


def test_a_copy_is_computed_with_its_reader() -> None:
    """The layout of the output differs, so elements are moved once: where they are computed with."""
    explained = lowering.explain(lambda q, k, v: eager(q, k, v).sin(), Q, K, V)
    assert [step.name.split("_")[0] for step in explained.after.steps] == ["cpp", "flashmla.decode.default", "cpp"]
    assert sum(buffer.shape == "2, 4, 5, 16" for buffer in explained.after.buffers) == 1


# Tensors that were computed in one order or another.

LAID_OUT: dict[str, Callable[..., Tensor]] = {
    "cast-transposed": lambda q, k, v: eager(q.bfloat16(), k.mT.bfloat16().mT, v.bfloat16()).float(),
    "shifted-transposed": lambda q, k, v: eager((q.mT + 1).mT, (k.mT + 1).mT, (v.mT - 1).mT),
    "copied": lambda q, k, v: eager(q.mT.clone().mT, k.transpose(1, 2).contiguous().transpose(1, 2) * 2, v),
}


@pytest.mark.parametrize("name", LAID_OUT)
def test_rows_that_are_computed_from_columns(name: str) -> None:
    compiled = Compiled(LAID_OUT[name])
    tolerance = 2e-2 if name.startswith("cast") else 2e-5
    assert_equal_to(compiled(Q, K, V), LAID_OUT[name](Q, K, V), tolerance=tolerance)
    assert "flashmla.decode" in compiled.sources[0]


def test_grouped_heads_under_autocast() -> None:
    """Eager attention of Llama is this under autocast."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            weights = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.25
            weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
            return torch.matmul(weights, repeat_kv(v, 2)).transpose(1, 2).contiguous()

    tensors = inputs(5, 9, h_kv=2)
    assert_equal_to(Compiled(function)(*tensors), function(*tensors), tolerance=3e-2)


def test_a_linear_layer_of_columns() -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear((x.T * 2).contiguous(), weight)

    x, weight = torch.randn(48, 3), torch.randn(32, 48)
    assert_equal_to(Compiled(function)(x, weight), function(x, weight))


def test_views_in_another_order_than_their_products() -> None:
    def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        return torch.bmm(torch.softmax(torch.bmm(q, k.mT) * 0.25, -1), v)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        first, second = folded(q, k, v), folded(q + 1, k, v)
        later = second.view(2, 4, 5, 16)
        return first.view(2, 4, 5, 16).sin(), later.sin()

    compiled = Rewritten(function)
    for one, other in zip(compiled(Q, K, V), function(Q, K, V), strict=True):
        assert_equal_to(one, other)
    assert operators(compiled.graphs[0]) == ["decode", "decode"]


EMPTY: dict[str, Callable[..., Tensor]] = {
    "queries": lambda q, k, v: eager(q[:, :, :0], k, v),
    "keys": lambda q, k, v: eager(q, k[:, :, :0], v[:, :, :0]),
    "d": lambda q, k, v: eager(q[..., :0], k[..., :0], v),
    "d_v": lambda q, k, v: eager(q, k, v[..., :0]),
    "sequences": lambda q, k, v: eager(q[:0], k[:0], v[:0]),
    "heads": lambda q, k, v: eager(q[:, :0], k[:, :0], v[:, :0]),
}


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_to_attend_to_or_with(name: str) -> None:
    graph = traced(EMPTY[name], Q, K, V)
    before = graph.code
    rewrite(graph)
    assert graph.code == before


def test_without_an_input() -> None:
    def function() -> Tensor:
        q, k = torch.arange(640.0).view(2, 4, 5, 16) / 640, torch.ones(2, 4, 9, 16)
        return eager(q, k, k * 2)

    graph = traced(function)
    rewrite(graph)
    assert operators(graph) == ["decode"]


class Two(torch.nn.Module):
    """Two projections of one input, which freezing puts together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(32, 16, bias=False), torch.nn.Linear(32, 48, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.first(x), self.second(x)


@pytest.mark.parametrize("rows", [1, 3])
def test_frozen_products_of_one_input_have_memory_of_their_own(rows: int) -> None:
    model, x = Two().eval(), torch.randn(rows, 32)
    with torch._inductor.config.patch(freezing=True):
        compiled = Compiled(model)
        results = compiled(x)
    assert compiled.sources[0].count("flashmla.gemm.out(") == 1
    for one, other in zip(results, model(x), strict=True):
        assert_equal_to(one, other)
        assert (one.stride(), one.storage_offset()) == (other.stride(), 0)
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes()


def test_a_view_of_four_symbolic_sizes_ends() -> None:
    """Torch's own proof that the transposed result cannot be flattened does not."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    try:
        rewritten = Rewritten(lambda q, k, v: F.scaled_dot_product_attention(q, k, v).flatten())
        for x in (copies := tuple(x.clone() for x in (Q, K, V))):
            torch._dynamo.mark_dynamic(x, [0, 1, 2, 3])
        assert_equal_to(rewritten(*copies), F.scaled_dot_product_attention(Q, K, V).flatten())
        assert "flashmla.decode.default" in rewritten.graphs[0].print_readable(False)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@given(data=st.data())
def test_strides_of_views_are_those_of_torch(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), max_size=4))
    x = torch.empty(sizes).permute(data.draw(st.permutations(range(len(sizes)))))
    if sizes and data.draw(st.booleans()):
        x = x.narrow(0, 0, (len(x) + 1) // 2)
    if data.draw(st.booleans()):
        x = x[None].expand(3, *x.shape)
    shape, rest = [], x.numel()
    while rest > 1:
        shape.append(data.draw(st.sampled_from([n for n in range(2, rest + 1) if rest % n == 0])))
        rest //= shape[-1]
    shape = data.draw(st.permutations(shape + [1] * data.draw(st.integers(0, 2))))
    try:
        expected = list(x.view(shape).stride())
    except RuntimeError:
        expected = None
    assert viewed_strides(x, shape) == expected
