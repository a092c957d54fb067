"""A tensor that an operator writes shares no memory with itself or with one that is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flashmla_ops.errors import ArgumentError, from_message
from flashmla_ops.ops._library import DEFINED, operator
from flashmla_ops.ops._overlap import overlap, overlaps_itself
from flashmla_ops.ops.append import APPEND_TWO
from tests.support.calls import CALLS, MUTATED

OVERLAPPING: list[Callable[[Tensor], Tensor]] = [
    lambda x: x[:1].expand(x.shape),
    lambda x: x[:, :1].expand(x.shape),
    lambda x: x.as_strided(x.shape, (x.stride(0) - 1, *x.stride()[1:])),
    lambda x: x.as_strided(x.shape, (*x.stride()[:-2], x.size(-1) - 1, 1)),
]


def check_refused(name: str, arguments: dict[str, object], argument: str, expected: str) -> None:
    """By the kernel, by the fake and by the reference, with the same words."""
    for call in (operator(name), DEFINED[name].reference):
        with pytest.raises(RuntimeError) as caught:
            call(**arguments)
        error = from_message(str(caught.value))
        assert isinstance(error, ArgumentError)
        assert (error.op, error.argument, error.expected) == (name.partition(".")[0], argument, expected)
    compiled = torch.compile(lambda **named: operator(name)(**named), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=f"argument '{argument}': expected {expected}"):
        compiled(**arguments)


@pytest.mark.parametrize("view", OVERLAPPING)
@pytest.mark.parametrize(("name", "argument"), MUTATED)
def test_a_written_tensor_that_overlaps_itself(name: str, argument: str, view: Callable[[Tensor], Tensor]) -> None:
    torch._dynamo.reset()
    arguments = CALLS[name].arguments()
    arguments[argument] = view(arguments[argument])
    check_refused(name, arguments, argument, "elements that share no memory")


def test_an_expanded_cache_of_a_dynamic_size() -> None:
    arguments = CALLS["append_"].arguments()
    arguments["kv_cache"] = arguments["kv_cache"][:1].expand(3, -1, -1, -1)
    compiled = torch.compile(lambda **named: operator("append_")(**named), dynamic=True, fullgraph=True)
    with pytest.raises(RuntimeError, match="elements that share no memory"):
        compiled(**arguments)


READ = [
    (name, argument, other)
    for name, argument in MUTATED
    for other, value in CALLS[name].arguments().items()
    if isinstance(value, Tensor) and other != argument
]


@pytest.mark.parametrize(("name", "argument", "other"), READ)
def test_a_written_tensor_that_overlaps_another(name: str, argument: str, other: str) -> None:
    torch._dynamo.reset()
    arguments = CALLS[name].arguments()
    written, read = arguments[argument], arguments[other]
    memory = torch.zeros(max(4 * written.numel(), read.numel() * read.itemsize) + 4, dtype=torch.uint8)
    n_bytes = written.numel() * written.itemsize
    arguments[argument] = memory[4 : 4 + n_bytes].view(written.dtype).view(written.shape)
    arguments[other] = memory[: read.numel() * read.itemsize].view(read.dtype).view(read.shape)
    mutual = {argument, other} <= set(CALLS[name].mutated)
    if mutual:  # the later of the two is named
        argument, other = CALLS[name].mutated[1], CALLS[name].mutated[0]
    check_refused(name, arguments, argument, f"memory apart from {other}")


def test_a_residual_may_be_written_in_place() -> None:
    arguments = CALLS["gemm"].arguments()
    expected = operator("gemm")(**arguments)
    for call in (operator("gemm.out"), DEFINED["gemm.out"].reference):
        x = arguments["residual"].clone()
        call(**arguments | {"residual": x}, out=x)
        torch.testing.assert_close(x, expected)


def test_halves_of_one_slab_are_apart() -> None:
    slab = torch.zeros(3, 4, 2, 48)
    rows = torch.randn(2, 2, 48)
    arguments = (slab[..., :40], slab[..., 40:], rows[..., :40], rows[..., 40:], torch.tensor([0, 5]))
    with FakeTensorMode(allow_non_fake_inputs=True):
        APPEND_TWO.fake(*arguments)
    for call in (operator("append_.two"), APPEND_TWO.reference):
        slab.zero_()
        call(*arguments)
        assert torch.equal(slab.view(-1, 2, 48)[[0, 5]], rows)


@st.composite
def views(draw: st.DrawFn) -> Tensor:
    """A small view into shared memory, in an order and with strides of any kind."""
    dtype = draw(st.sampled_from([torch.float32, torch.int16, torch.uint8]))
    dims = draw(st.integers(0, 4))
    sizes = draw(st.lists(st.integers(0, 4), min_size=dims, max_size=dims))
    strides = draw(st.lists(st.integers(0, 20), min_size=dims, max_size=dims))
    return MEMORY.view(dtype).as_strided(sizes, strides, draw(st.integers(0, 60)))


MEMORY = torch.zeros(400)


def addresses(tensor: Tensor) -> Iterator[int]:
    """The address of every byte of every element."""
    for index in product(*map(range, tensor.shape)):
        element = tensor.storage_offset() + sum(i * s for i, s in zip(index, tensor.stride(), strict=True))
        yield from range(element * tensor.itemsize, (element + 1) * tensor.itemsize)


@settings(max_examples=500)
@given(views(), views())
def test_overlap_is_found_exactly(a: Tensor, b: Tensor) -> None:
    first, second = list(addresses(a)), list(addresses(b))
    assert overlaps_itself(a) == (len(set(first)) < len(first))
    assert overlap(a, b) == bool(set(first) & set(second))


@settings(max_examples=300)
@given(st.data())
def test_the_kernels_find_what_python_finds(data: st.DataObject) -> None:
    batch, m, n, k = data.draw(st.tuples(*[st.integers(0, 4)] * 4))
    strides, offsets = st.tuples(*[st.integers(0, 20)] * 3), st.integers(0, 60)
    out = MEMORY.as_strided((batch, m, n), data.draw(strides), data.draw(offsets))
    a = MEMORY.as_strided((batch, m, k), data.draw(strides), data.draw(offsets))
    arguments = (a, torch.zeros(batch, k, n))
    if overlaps_itself(out) or overlap(out, a):
        with pytest.raises(RuntimeError, match="argument 'out'"):
            operator("bmm.out")(*arguments, out=out)
    else:
        expected = operator("bmm")(*arguments)
        operator("bmm.out")(*arguments, out=out)
        assert torch.equal(out, expected)
