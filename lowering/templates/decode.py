"""`decode` as a C++ template: the library's own kernel, with the pointwise work that follows it in the same function.

The kernel calls back for each finished row [d_v] of (sequence, query token, head), and Inductor generates the epilogue
(gate, residual, cast, scale; views and transposes of the result; several users) into that callback, over a row that
still lies in L1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import sympy
import torch
from torch._inductor import cpu_vec_isa, ir
from torch._inductor import lowering as inductor
from torch._inductor.codegen.cpp_template import CppTemplate
from torch._inductor.codegen.cpp_template_kernel import CppTemplateKernel
from torch._inductor.codegen.cpp_utils import cexpr_index
from torch._inductor.virtualized import V, ops
from torch.utils._sympy.symbol import SymT, symbol_is_type

from flashmla_ops import cpu
from lowering.templates.source import header

TEMPLATE = r"""
{{template.header().getvalue()}}
{{target}}
#define FLASHMLA_ISA generated
{{headers}}
extern "C"
{{kernel.def_kernel(inputs=inputs, outputs={"out": Y}, aliases=aliases, extra_sizevars=symbols)}}
{
  {{kernel.maybe_codegen_profile()}}
  using T = {{element}};
  FlashmlaDecode call{};
  call.op = "decode";
  call.dtype = {{dtype}};
  call.causal = {{causal}}, call.levels = 3;
  call.b = {{size(q, 0)}}, call.s_q = {{size(q, 1)}}, call.h_q = {{size(q, 2)}}, call.d_qk = {{size(q, 3)}};
  call.h_kv = {{size(kv_cache, 2)}}, call.d_v = {{d_v}}, call.qk_start = {{qk_start}};
  call.softmax_scale = {{scale}}, call.softcap = {{softcap}};
  call.q = {{pointer(q)}};
{%- for i in range(4) %}
  call.q_stride[{{i}}] = {{stride(q, i)}};
{%- endfor %}
  call.kv = {{rows(kv_cache)}};
{%- if k_cache is not none %}
  call.k = {{rows(k_cache)}};
{%- endif %}
  call.n_pages = {{size(kv_cache, 0)}}, call.page_size = {{size(kv_cache, 1)}};
  call.block_table = {{pointer(block_table)}};
  call.block_table_stride[0] = {{stride(block_table, 0)}}, call.block_table_stride[1] = {{stride(block_table, 1)}};
  call.max_pages = {{size(block_table, 1)}};
  call.cache_seqlens = {{pointer(cache_seqlens)}}, call.cache_seqlens_stride = {{stride(cache_seqlens, 0)}};
{%- if attn_sink is not none %}
  call.attn_sink = {{pointer(attn_sink)}}, call.attn_sink_stride = {{stride(attn_sink, 0)}};
{%- endif %}
  const auto row_done = [&](int64_t at_b, int64_t at_s, int64_t at_h, const T* finished) {
    const auto row = reinterpret_cast<const {{kernel.dtype(q)}}*>(finished);
    {{epilogue()|indent(4, false)}}
  };
  flashmla::FLASHMLA_ISA::GeneratedDecode<T, {{d_v}}, decltype(row_done)>(call, row_done)
{%- if schedule is not none %}
      .run({{pointer(schedule)}}, {{size(schedule, 0)}});
{%- else %}
      .run(nullptr, 0);
{%- endif %}
}
"""

SIZES = (SymT.SIZE, SymT.PRECOMPUTED_SIZE, SymT.UNBACKED_INT)
ELEMENTS = {
    torch.float32: ("float", "FLASHMLA_F32"),
    torch.bfloat16: ("flashmla::FLASHMLA_ISA::bf16", "FLASHMLA_BF16"),
    torch.float16: ("flashmla::FLASHMLA_ISA::f16", "FLASHMLA_F16"),
}


Reindexer = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Arguments:
    """The constants of a call, and the names of its tensors, in order."""

    d_v: int
    qk_start: int
    softmax_scale: float | None
    causal: bool
    softcap: float
    tensors: tuple[str, ...]


class DecodeTemplate(CppTemplate):
    """``input_nodes``: the tensors that ``arguments`` names."""

    def __init__(self, input_nodes: Sequence[ir.IRNode], layout: ir.Layout, arguments: Arguments) -> None:
        super().__init__("flashmla_decode", list(input_nodes), layout, num_threads=torch.get_num_threads())
        self.arguments = arguments

    def render(  # type: ignore[override]
        self,
        kernel: CppTemplateKernel,
        template_buffer_node: Any = None,
        flag_template_buffer_has_other_users: bool | None = None,
        epilogue_nodes: list[Any] | None = None,
        **_: Any,
    ) -> str:
        a = self.arguments
        inputs = dict(zip(a.tensors, self.input_nodes, strict=True))
        q = inputs["q"]
        target = template_buffer_node if template_buffer_node is not None else self.output_node
        plan = EpiloguePlan.of(target, epilogue_nodes or [], bool(flag_template_buffer_has_other_users))

        def pointer(node: Any) -> str:
            """Where a tensor's first element is. Two tensors in one buffer share the argument."""
            offset = cexpr_index(kernel.rename_indexing(node.get_layout().offset))
            return f"{kernel.args.input_buffers[node.get_name()]} + {offset}"

        def rows(node: Any) -> str:
            """A cache as the C interface takes it."""
            strides = (str(kernel.stride(node, dim)) for dim in range(3))
            return f"{{{', '.join((pointer(node), *strides, str(kernel.size(node, 3))))}}}"

        element, dtype = ELEMENTS[q.get_dtype()]
        scale = "1 / std::sqrt(double(call.d_qk))" if a.softmax_scale is None else repr(float(a.softmax_scale))
        with contextlib.ExitStack() as stack:
            for fake in plan.fakes:
                stack.enter_context(patch.object(V.graph, "get_dtype", self._fake_get_dtype(fake)))
            return str(
                self._template_from_string(TEMPLATE).render(
                    template=self,
                    kernel=kernel,
                    target=instruction_set(),
                    headers=header("decode.h"),
                    inputs=inputs,
                    aliases=plan.aliases,
                    Y=plan.stored,
                    symbols=plan.symbols(),
                    element=element,
                    dtype=dtype,
                    causal=int(a.causal),
                    d_v=a.d_v,
                    qk_start=a.qk_start,
                    scale=f"float({scale})",
                    softcap=f"float({a.softcap!r})",
                    pointer=pointer,
                    rows=rows,
                    size=kernel.size,
                    stride=kernel.stride,
                    epilogue=lambda: plan.code(kernel, a.d_v),
                    **dict.fromkeys(("k_cache", "schedule", "attn_sink")) | inputs,
                )
            )


def instruction_set() -> str:
    """The kernels that the library runs here, ``FLASHMLA_CPU`` obeyed, as far as Inductor compiles for them.

    ``-march=native`` of an older compiler leaves products of bf16 pairs out although the processor has them.
    """
    active = cpu.STATE.active
    chosen = f"#define FLASHMLA_ON_{active}"
    if active == "avx512_bf16" and "avx512" in str(cpu_vec_isa.pick_vec_isa()):
        return f'{chosen}\n#pragma GCC target("avx512bf16")'
    return chosen


@dataclass
class EpiloguePlan:
    """How each finished row is stored: the nodes to compute from it, the last into ``stored``.

    With ``nodes`` empty, the row itself is stored. Inductor fuses a node only where it reads the result in the order in
    which it lies in memory, so that a node's index follows from the result's by linear position (`_reindexer`).
    """

    result: Any
    stored: Any
    nodes: list[Any]
    reindexers: list[Reindexer | None]
    aliases: dict[str, str]
    fakes: list[Any]

    @classmethod
    def of(cls, result: Any, nodes: list[Any], other_users: bool) -> EpiloguePlan:
        if not nodes:
            return cls(result, result, [], [], {}, [])
        stored, reindexers = nodes[-1], [_reindexer(node, result) for node in nodes]
        if not other_users:
            return cls(result, stored, nodes, reindexers, {result.get_name(): stored.get_name()}, [])
        # The result itself is wanted too: a copy of the row becomes the first thing to store.
        row = ir.Buffer(name=f"{result.get_name()}_row", layout=result.layout)
        load = row.make_loader()
        copy = ir.Pointwise(
            device=result.get_device_or_error(),
            dtype=result.layout.dtype,
            inner_fn=lambda index: ops.to_dtype(load(index), result.layout.dtype),
            ranges=result.get_size(),
        )
        first = ir.ComputedBuffer(name=result.get_name(), layout=result.layout, data=copy)
        return cls(row, stored, [first, *nodes], [None, *reindexers], {row.get_name(): stored.get_name()}, [row])

    def symbols(self) -> list[sympy.Expr]:
        """Every size that the epilogue may name. Inductor's own names for late ones collide with those given early."""
        found: set[sympy.Symbol] = set()
        for node in self.nodes:
            found |= set(node.get_free_symbol_uses())
            for buffer in map(V.graph.try_get_buffer, node.get_read_names()):
                layout = buffer.get_layout() if buffer is not None else None
                for size in (*layout.size, *layout.stride, layout.offset) if layout is not None else ():
                    found |= sympy.sympify(size).free_symbols
        return sorted((s for s in found if symbol_is_type(s, SIZES)), key=str)

    def code(self, kernel: CppTemplateKernel, d_v: int) -> str:
        """C++ for the row of (sequence, token, head)."""
        sizes = [sympy.Integer(1)] * 3 + [sympy.Integer(d_v)]
        row = ir.Buffer(name="row", layout=ir.FixedLayout(torch.device("cpu"), self.result.get_dtype(), sizes))
        kernel.local_buffers["row"] = row
        at: list[Any] = [("at_b", "at_b + 1"), ("at_s", "at_s + 1"), ("at_h", "at_h + 1"), ()]
        view = _same_shape(self.stored, self.result)
        stored: Any = kernel.slice_nd(view, at)
        offsets = ["at_b", "at_s", "at_h", 0]  # names that sympy has no meaning for
        return str(kernel.store_output(stored, row, self.result, self.nodes, offsets, self.reindexers))


def _memory_order(node: Any) -> list[int]:
    """Dimensions by decreasing stride."""
    strides = V.graph.sizevars.guarding_hints_or_throw(node.get_stride())
    sizes = V.graph.sizevars.guarding_hints_or_throw(node.get_size())
    return sorted(range(len(sizes)), key=lambda i: (strides[i], sizes[i]), reverse=True)


def _reindexer(node: Any, result: Any) -> Reindexer | None:
    """From an index of the result to the index of a node that has as many elements in the same memory order."""
    if list(node.get_size()) == list(result.get_size()) and list(node.get_stride()) == list(result.get_stride()):
        return None
    order = _memory_order(node)
    reshape = ir.View.dynamic_reshape_indexer([node.get_size()[i] for i in order], result.get_size())

    def reindex(index: list[Any]) -> list[Any]:
        position: dict[int, Any] = dict(zip(order, reshape(index), strict=True))
        return [position[i] for i in range(len(order))]

    return reindex


def _same_shape(stored: Any, result: Any) -> Any:
    """The stored buffer seen with the shape of the result."""
    if list(stored.get_size()) == list(result.get_size()) and list(stored.get_stride()) == list(result.get_stride()):
        return stored
    box = inductor.permute(ir.TensorBox.create(stored), _memory_order(stored))
    return inductor.view(box, result.get_size()).data
