"""Matrix products of a warpgroup (wgmma, sm_90a) and mbarriers, as functions of CuTe DSL values.

An operand in shared memory consists of blocks of 64 rows of 128 bytes, whose 16-byte chunks are swizzled: chunk c of
row r lies at c ^ (r % 8). A descriptor names where it begins and how it goes on. Products run on their own until
`wait_products`; until then their registers must be left alone, so every function here that gets accumulators gives
them back, and their values may be read only behind a wait that they went through.
Formats: the PTX ISA manual, "Asynchronous Warpgroup Level Matrix Shared Memory Layout".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cutlass import Float32, Int64
from cutlass._mlir.dialects import llvm
from cutlass.cute.arch import inline_ptx

from cutlass_kernels.attention.config import PTX_TYPES

Value = Any

#: Elements of a block's row (128 bytes), bytes of a block, and elements of an instruction's depth.
BLOCK, BLOCK_BYTES, DEPTH = 64, 64 * 128, 16
#: A descriptor counts bytes in units of 16. The kind of swizzle (128 bytes) is in its two top bits.
_SWIZZLE = 1 << 62
_EIGHT_ROWS = 1024 // 16 << 32


def by_rows(address: Value) -> Value:
    """A descriptor of blocks whose rows are the operand's rows: the depth of the product goes along them."""
    return _descriptor(address, _SWIZZLE | _EIGHT_ROWS | 1 << 16)


def by_columns(address: Value) -> Value:
    """A descriptor of blocks whose rows are steps of depth: a row holds 64 columns, the next block the next ones."""
    return _descriptor(address, _SWIZZLE | _EIGHT_ROWS | BLOCK_BYTES // 16 << 16)


def _descriptor(address: Value, rest: int) -> Value:
    return Int64((address & 0x3FFFF) >> 4) | Int64(rest)


def _asm(lines: Sequence[str], sums: Sequence[Value], inputs: Sequence[Value], fresh: bool = False) -> list[Value]:
    """Instructions that change ``sums`` in place (``fresh``: that only write them): operands 0 on; then the inputs."""
    floats = [value.ir_value() for value in sums]
    others = [value.ir_value() for value in inputs]
    kinds = ["l" if isinstance(value, Int64) else "r" for value in inputs]
    kept = [] if fresh else [str(i) for i in range(len(floats))]
    constraints = ",".join(["=f"] * len(floats) + kinds + kept)
    result = llvm.inline_asm(
        llvm.StructType.get_literal([Float32.mlir_type] * len(floats)),
        [*others, *([] if fresh else floats)],
        "\n".join(lines),
        constraints,
        has_side_effects=True,
        is_align_stack=False,
    )
    return [Float32(llvm.extractvalue(Float32.mlir_type, result, [i])) for i in range(len(floats))]


def _registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(count)) + "}"


def _opcode(n: int, dtype: str) -> str:
    kind = PTX_TYPES[dtype]
    return f"wgmma.mma_async.sync.aligned.m64n{n}k{DEPTH}.f32.{kind}.{kind}"


def _wait_line(label: str, barrier: str, parity: str) -> list[str]:
    return [
        f"{label}: mbarrier.try_wait.parity.shared::cta.b64 ready, {barrier}, {parity};",
        f"@!ready bra {label};",
    ]


def multiply_blocks(
    a: Value, b: Value, blocks: int, barriers: Value, parity: Value, dtype: str, fences: int
) -> list[Value]:
    """Begin a [64, 64 blocks] times b [64, 64 blocks] transposed; a block of b is waited for on its own mbarrier.

    ``a`` and ``b`` are descriptors by rows. Products read through the asynchronous proxy, and copies (cp.async) write
    through the generic one, without a fence of their own: one stands behind the waits for the first ``fences`` blocks,
    at least one, since a is copied. Returns 32 sums: of rows r and r + 8 by turns, two columns each.
    """
    n = BLOCK // 2
    lines = ["{", ".reg .pred ready, keep;", ".reg .b64 left, right;", "setp.ne.b32 keep, 0, 0;"]
    lines += ["wgmma.fence.sync.aligned;"]
    for block in range(blocks):
        lines += _wait_line(f"WAIT{block}", f"[${n + 2}+{8 * block}]", f"${n + 3}")
        lines += ["fence.proxy.async.shared::cta;"] if block < fences else []
        for step in range(BLOCK // DEPTH):
            at = (block * BLOCK_BYTES + step * 2 * DEPTH) // 16
            lines += [f"add.s64 left, ${n}, {at};", f"add.s64 right, ${n + 1}, {at};"]
            lines += [f"{_opcode(BLOCK, dtype)} {_registers(0, n)}, left, right, keep, 1, 1, 0, 0;"]
            if block == 0 and step == 0:
                lines += ["setp.eq.b32 keep, 0, 0;"]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return _asm(lines, [Float32(0.0)] * n, [a, b, barriers, parity], fresh=True)


def add_product(sums: Sequence[Value], a: Value | Sequence[Value], b: Value, dtype: str) -> list[Value]:
    """Begin sums + a [64, 64] b [64, columns]; ``a``: a descriptor by rows, or 16 registers; ``b``: one by columns."""
    n, inline = len(sums), isinstance(a, (list, tuple))
    inputs = [*a, b] if inline else [a, b]
    lines = ["{", ".reg .pred keep;", ".reg .b64 left, right;", "setp.eq.b32 keep, 0, 0;", "wgmma.fence.sync.aligned;"]
    for step in range(BLOCK // DEPTH):
        lines += [f"add.s64 right, ${n + len(inputs) - 1}, {step * DEPTH * 128 // 16};"]
        if inline:
            left, major = _registers(n + 4 * step, 4), "1"
        else:
            lines += [f"add.s64 left, ${n}, {step * 2 * DEPTH // 16};"]
            left, major = "left", "0, 1"
        lines += [f"{_opcode(2 * n, dtype)} {_registers(0, n)}, {left}, right, keep, 1, 1, {major};"]
    lines += ["wgmma.commit_group.sync.aligned;", "}"]
    return _asm(lines, sums, inputs)


def wait_products(sums: Sequence[Value], still: int = 0) -> list[Value]:
    """Wait until at most ``still`` of the latest groups of products run on; ``sums``: of those that are done."""
    return _asm([f"wgmma.wait_group.sync.aligned {still};"], sums, [])


# mbarriers; an address is one of shared memory


def init_barrier(address: Value, count: int) -> None:
    text = f"{{ .reg .b32 count; mov.b32 count, {count}; mbarrier.init.shared::cta.b64 [{{$r0}}], count; }}"
    inline_ptx(text, read_only_args=[address])


def arrive(address: Value) -> None:
    """What this thread did before is seen by who waits for the barrier."""
    inline_ptx("mbarrier.arrive.shared::cta.b64 _, [{$r0}];", read_only_args=[address])


def arrive_with_copies(address: Value, offset: int = 0) -> None:
    """Arrive when this thread's copies (cp.async) up to here have landed."""
    inline_ptx(f"cp.async.mbarrier.arrive.noinc.shared::cta.b64 [{{$r0}}+{offset}];", read_only_args=[address])


def wait_barrier(address: Value, parity: Value) -> None:
    """Wait until the phase of this parity is complete."""
    text = (
        "{ .reg .pred ready; WAIT: mbarrier.try_wait.parity.shared::cta.b64 ready, [{$r0}], {$r1}; @!ready bra WAIT; }"
    )
    inline_ptx(text, read_only_args=[address, parity])


def fence_async() -> None:
    """Make this thread's accesses to shared memory up to here visible to products."""
    inline_ptx("fence.proxy.async.shared::cta;")


def more_registers(count: int) -> None:
    inline_ptx(f"setmaxnreg.inc.sync.aligned.u32 {count};")


def fewer_registers(count: int) -> None:
    inline_ptx(f"setmaxnreg.dec.sync.aligned.u32 {count};")
