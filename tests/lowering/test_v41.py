"""The block of DeepSeek-V4.1, compiled: what stands around attention is a kernel before it and one after it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import lowering
from flashmla_ops.nn import RowSource, rotated, v41_attention
from lowering.explain.program import Program
from tests.lowering.compiled import Compiled
from tests.lowering.generated import generate
from tests.support.v41 import BlockCase, BlockInputs, fault, inputs_of

AROUND = ["kernel", "flashmla", "kernel"]
CASES = [
    BlockCase(n_pages=200),
    BlockCase(n_pages=200, norm_eps=1e-6),
    BlockCase(n_pages=200, s_q=2, h_q=63, extra_format="fp8_v41"),
    BlockCase(n_pages=200, s_q=2, h_q=63, norm_eps=1e-6, extra_format=None),
    BlockCase(n_pages=200, b=1, h_q=5, dtype="float32"),
]
SLOW = pytest.mark.slow


def step(
    kv: Tensor,  # [b, s_q, 512]
    slots: Tensor,  # [b * s_q]
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    window: RowSource,
    *rest: Any,
    norm_eps: float | None = None,
) -> tuple[Tensor, Tensor]:
    """New tokens' rows go to the window, and then they are attended to."""
    rows = rotated(kv, cos, sin).flatten(0, 1)[:, None]
    torch.ops.flashmla.append_(window.cache, rows, slots, window.row_format)
    return v41_attention(q, cos, sin, window, *rest, norm_eps=norm_eps)


def new_rows(inputs: BlockInputs) -> tuple[Tensor, Tensor]:
    """Rows for slots that every query token names first."""
    b, s_q = inputs.q.shape[:2]
    kv = torch.randn(b, s_q, 512, generator=torch.Generator().manual_seed(b)).to(inputs.q.dtype)
    slots = torch.arange(b * s_q) * 3
    inputs.window.indices[..., 0] = slots.view(b, s_q)
    return kv, slots


def with_own_cache(inputs: BlockInputs) -> BlockInputs:
    return replace(inputs, window=inputs.window._replace(cache=inputs.window.cache.clone()))


def bytes_of(results: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [result.view(torch.uint8) for result in results]


def assert_nothing_is_copied(program: Program, inputs: BlockInputs) -> None:
    """No cache: nothing is as large. No query: of its size there is one buffer alone, with the queries turned."""
    sizes = [buffer.nbytes for buffer in program.buffers]
    assert max(sizes) == inputs.q.nbytes < inputs.window.cache.nbytes
    assert sizes.count(inputs.q.nbytes) == 1
    assert program.missed == 0


@pytest.mark.parametrize("case", [CASES[0], *(pytest.param(c, marks=SLOW) for c in CASES[1:4]), CASES[4]], ids=str)
def test_a_kernel_before_and_a_kernel_after(case: BlockCase) -> None:
    inputs = inputs_of(case)
    (source,) = generate(v41_attention, *inputs.arguments, norm_eps=case.norm_eps).ours
    program = Program.joined([source])
    assert [each.kind for each in program.steps] == AROUND
    assert_nothing_is_copied(program, inputs)


def by_complex(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as DeepSeek publishes it."""
    z = torch.view_as_complex(x[..., -64:].float().unflatten(-1, (-1, 2))) * torch.complex(cos, sin)
    return torch.cat([x[..., :-64], torch.view_as_real(z).flatten(-2).to(x.dtype)], dim=-1)


def by_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding as transformers has it."""
    cos, sin = cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)
    halves = torch.stack([-x[..., -63::2], x[..., -64::2]], dim=-1).flatten(-2)
    turned = x[..., -64:].float() * cos + halves.float() * sin
    return torch.cat([x[..., :-64], turned.to(x.dtype)], dim=-1)


def in_place(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x = x.clone()
    x[..., -64:] = by_halves(x[..., -64:], cos, sin)
    return x


def by_hand(rope: Any, q: Tensor, cos: Tensor, sin: Tensor, window: RowSource, extra: RowSource, sink: Tensor) -> Any:
    """The block in nobody's words: a norm, the embedding and a scale by logarithms, rounded after each step."""
    cos, sin = cos[:, :, None], sin[:, :, None]
    q = (q.float() * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + 1e-6)).to(q.dtype)
    first, second = (window.indices, 512, 0, None, "fp8_v41", sink, window.topk_length), (*extra[:3], extra[3])
    out, _ = torch.ops.flashmla.sparse_decode(rope(q, cos, sin), window.cache, None, *first, *second)
    groups = rope(out, cos, -sin).float().unflatten(-1, (-1, 32))
    scales = torch.exp2((groups.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448).log2().ceil())
    return (groups / scales).to(torch.float8_e4m3fn).flatten(-2), scales


@pytest.mark.parametrize("rope", [by_complex, *(pytest.param(f, marks=SLOW) for f in (by_halves, in_place))])
def test_a_block_by_hand_is_as_few_kernels(rope: Any) -> None:
    inputs = inputs_of(CASES[0])
    (source,) = generate(lambda *arguments: by_hand(rope, *arguments), *inputs.arguments).ours
    program = Program.joined([source])
    assert [each.kind for each in program.steps] == AROUND
    assert max(buffer.nbytes for buffer in program.buffers) == inputs.q.nbytes


@pytest.mark.parametrize("norm_eps", [None, pytest.param(1e-6, marks=SLOW)])
def test_nothing_is_compiled_again_for_other_values(norm_eps: float | None) -> None:
    """Indices, lengths and slots change. New rows are written by the kernel that turns the queries."""
    compiled = Compiled(step)
    for seed in range(3):
        check_step(compiled, BlockCase(n_pages=200, norm_eps=norm_eps, seed=seed))
    assert compiled.compilations == 1
    assert [each.kind for each in compiled.program.steps] == AROUND


@SLOW
@pytest.mark.parametrize("norm_eps", [None, 1e-6])
def test_one_graph_serves_every_size(norm_eps: float | None) -> None:
    compiled = Compiled(step, dynamic=True)
    for seed, (b, topk) in enumerate([(3, 42), (5, 66), (7, 42)]):
        check_step(compiled, BlockCase(b, 2, 16, norm_eps=norm_eps, topk=topk, n_pages=31, seed=seed))
    assert compiled.compilations == 1
    assert [each.kind for each in compiled.program.steps] == AROUND


def check_step(compiled: Compiled, case: BlockCase) -> None:
    """A step is what eager mode makes of it: to the bit without a norm, a sum that is taken in another order."""
    inputs = inputs_of(case)
    new = new_rows(inputs)
    theirs, ours = with_own_cache(inputs), with_own_cache(inputs)
    expected = step(*new, *theirs.arguments, norm_eps=case.norm_eps)
    actual = compiled(*new, *ours.arguments, norm_eps=case.norm_eps)
    assert torch.equal(ours.window.cache, theirs.window.cache)
    assert fault(*actual, theirs.expected()) is None
    if case.norm_eps is None:
        assert all(map(torch.equal, bytes_of(actual), bytes_of(expected)))


class Block(torch.nn.Module):
    """A package takes tensors; sources are made of them inside."""

    def forward(self, kv: Tensor, slots: Tensor, q: Tensor, cos: Tensor, sin: Tensor, *rest: Tensor) -> Any:
        window, compressed, sink = RowSource(*rest[:3]), RowSource(*rest[3:6], "fp4_v41"), rest[6]
        return step(kv, slots, q, cos, sin, window, compressed, sink, norm_eps=1e-6)


@SLOW
def test_a_package_appends_and_attends(tmp_path: Path) -> None:
    inputs = inputs_of(BlockCase(s_q=2, h_q=5, norm_eps=1e-6))
    new = new_rows(inputs)

    def tensors(of: BlockInputs) -> tuple[Tensor, ...]:
        return tuple(x for x in tree_leaves((new, of.arguments)) if isinstance(x, Tensor))

    theirs, ours = with_own_cache(inputs), with_own_cache(inputs)
    exported = torch.export.export(Block(), tensors(with_own_cache(inputs)))
    with lowering.active():
        path = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "block.pt2"))
    Block()(*tensors(theirs))
    codes, scales = torch._inductor.aoti_load_package(path)(*tensors(ours))
    assert torch.equal(ours.window.cache, theirs.window.cache)
    assert fault(codes, scales, theirs.expected()) is None
