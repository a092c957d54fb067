"""The report of `explain` on a step, as text and as a picture."""

from __future__ import annotations

import functools
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import lowering
from lowering import Explanation
from lowering.explain.figure import label
from lowering.explain.program import Buffer, Program, Step
from lowering.names import user_name
from lowering.passes import PASSES, Record
from tests.support.markdown import squeezed


def step(q: Tensor, cache: Tensor, rows: Tensor, slots: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    torch.ops.flashmla.append_(cache, rows * 2, slots)
    out, _ = torch.ops.flashmla.decode(q + 1, cache, None, table, lengths, 8)
    return (out * 2).sum(-1)


def arguments() -> tuple[Tensor, ...]:
    table, lengths = torch.tensor([[1, 0]], dtype=torch.int32), torch.tensor([5], dtype=torch.int32)
    return torch.ones(1, 1, 2, 8), torch.zeros(2, 4, 1, 8), torch.ones(1, 1, 8), torch.tensor([0]), table, lengths


@pytest.fixture(scope="module")
def explained() -> Iterator[tuple[Explanation, tuple[Tensor, ...]]]:
    def look(graph: torch.fx.Graph, record: Record) -> None:
        record.rewrote("a pattern", "a node")
        record.refused("another", "mul", "for a reason")

    PASSES.append(look)
    given = arguments()
    yield lowering.explain(step, *given), given
    PASSES.remove(look)


def test_steps_buffers_and_copies(explained: tuple[Explanation, tuple[Tensor, ...]]) -> None:
    result, _ = explained
    assert (result.graphs, result.compilations, result.breaks) == (1, 1, ())
    before, after = result.before, result.after
    assert [s.name for s in before.steps if s.kind == "flashmla"] == [
        "flashmla.append_.default",
        "flashmla.decode.default",
    ]
    assert [s.kind for s in after.steps] == ["kernel", "flashmla", "kernel"]
    assert len(after.buffers) < len(before.buffers)
    assert 0 < after.nbytes < before.nbytes
    assert (before.missed, after.missed, after.missed_bytes) == (0, 0, 0)


def test_decisions_and_reasons_are_in_the_text(explained: tuple[Explanation, tuple[Tensor, ...]]) -> None:
    result, _ = explained
    assert [str(d) for d in result.rewrites] == [
        "a pattern at a node: rewritten",
        "another at mul: left alone: for a reason",
    ]
    assert [(d.pattern, d.rewritten) for d in result.lowered] == [("append_ fused", True)]
    text = str(result)
    assert "graphs          1, breaks 0, compilations 1" in text
    assert "another at mul: left alone: for a reason" in text
    assert f"library calls {result.before.calls} {result.after.calls}" in squeezed(text)


def test_inputs_stay_as_they_are(explained: tuple[Explanation, tuple[Tensor, ...]]) -> None:
    _, given = explained
    assert all(map(torch.equal, given, arguments()))


def test_the_picture_is_xml_and_shows_every_step(explained: tuple[Explanation, tuple[Tensor, ...]]) -> None:
    result, _ = explained
    root = ElementTree.fromstring(result.svg())
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for step_ in (*result.before.steps, *result.after.steps):
        assert any(label(step_)[:49] in text for text in texts)
    assert {"Inductor", "flashmla", "cache copies"} <= set(texts)


def test_breaks_are_counted_with_their_reasons() -> None:
    def broken(x: Tensor) -> Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    result = lowering.explain(broken, torch.ones(3))
    assert result.graphs == 2
    assert len(result.breaks) == 1


SOURCE = """
cpp_fused_mul_0 = async_compile.cpp_pybinding(['const float*'], r'''
extern "C"  void  kernel(const float* in_ptr0)
''')

class Runner:
    def call(self, args):
        buf0 = empty_strided_cpu((s0, 8), (8, 1), torch.float32)
        cpp_fused_mul_0(arg0_1, buf0, s0)
        extern_kernels.mm(buf0, arg1_1, out=buf1)
        # Topologically Sorted Source Nodes: [decode]
        buf2 = torch.ops.flashmla.decode.default(buf1, arg2_1)
        del buf1
        return (buf2, )

runner = Runner(partitions=[])

# returned buf2: [1, 5] bfloat16"""


def test_reading_a_generated_module() -> None:
    program = Program.joined([SOURCE])
    assert program.steps == (
        Step("kernel", "cpp_fused_mul_0"),
        Step("library", "mm"),
        Step("flashmla", "flashmla.decode.default"),
    )
    assert program.buffers == (Buffer("buf0", "s0, 8", "float32"), Buffer("buf2", "1, 5", "bfloat16"))
    assert program.nbytes == 8 * 4 + 5 * 2


class Counting(torch.nn.Module):
    """State of every kind that a forward may change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("cache", torch.zeros(2, 4), persistent=False)
        self.row = self.cache[1]  # a view, and a plain attribute
        self.total, self.last = 0, None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.cache[0] = x[0]
        self.row.add_(1)
        self.total += 1
        self.last = x
        return self.linear(torch.nn.functional.dropout(x + self.cache.sum(), 0.5))


@pytest.mark.parametrize("form", ["module", "method", "function", "partial"])
def test_a_model_stays_as_it_was(form: str) -> None:
    model, x = Counting(), torch.ones(3, 4)
    buffers, state = dict(model.named_buffers()), torch.random.get_rng_state()
    forms = {
        "module": model,
        "method": model.forward,
        "function": lambda x: model(x),
        "partial": functools.partial(model, x),
    }
    lowering.explain(forms[form], *([] if form == "partial" else [x]))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (model.total, model.last) == (0, None)
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name]
        assert (buffer == 0).all()
    assert model.row.data_ptr() == model.cache[1].data_ptr()


def test_inputs_have_the_names_that_the_user_gave_them() -> None:
    """By position or keyword, of a function or a module; a module's weights by their path."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(16, 16)])

        def forward(self, q: Tensor, keys: Tensor, **kwargs: Tensor) -> Tensor:
            attended = F.scaled_dot_product_attention(q, keys, keys, attn_mask=kwargs["attention_mask"][:, None, None])
            return torch.bmm(self.layers[0](attended)[:, 0], self.layers[0].weight.expand(2, -1, -1))

    q, keys, mask = torch.randn(2, 1, 3, 16), torch.randn(2, 1, 9, 16), torch.ones(2, 9, dtype=torch.bool)
    text = str(lowering.explain(Masked(), q, keys, attention_mask=mask))
    assert "the mask depends on data: attention_mask" in text
    assert "the weight layers.0.weight is expanded" in text
    two_heads = (torch.randn(2, 2, n, 16) for n in (3, 9))
    text = str(lowering.explain(lambda q, keys: torch.softmax(q @ keys.mT, 2) @ keys, *two_heads))
    assert "keys has a matrix for each sequence" in text


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['attention_mask']", "attention_mask"),
        ("L['kwargs']['attention_mask']", "attention_mask"),
        ("L['batch']['mask']", "batch.mask"),
        ("L['args'][0]", "args[0]"),
        ("L['self']._modules['model']._modules['0']._parameters['weight']", "model.0.weight"),
        ("L['self']._modules['rotary']._buffers['inv_freq']", "rotary.inv_freq"),
        ("L['cache'].layers[0].keys", "cache.layers[0].keys"),
        ("arg0_1", "arg0_1"),
    ],
)
def test_names_of_sources(source: str, name: str) -> None:
    assert user_name(source) == name
