"""wgmma: every type, operands in shared memory in every layout or in registers, and what asynchronous means."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, DivergentCollective, Hazard, Landing, Options, UnsupportedInstruction
from tests.cutlass_kernels.emulator.harness import Array, kernel, launch
from tests.cutlass_kernels.emulator.test_matrix import BITS, decoded, encoded

LANDINGS: tuple[Landing, ...] = get_args(Landing)
SHARED = ".shared .align 1024 .b8 tile[65536];"
SECOND = 32768
FENCE, COMMIT, WAIT = (
    "wgmma.fence.sync.aligned;",
    "wgmma.commit_group.sync.aligned;",
    "wgmma.wait_group.sync.aligned 0;",
)
START = """mov.u32 %r0, %tid.x; mov.u32 %r1, tile; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];
    ld.param.u64 %d2, [p2]; ld.param.u64 %d4, [p3]; mov.u32 %r2, 0;
    COPY: mad.lo.u32 %r3, %r2, 2048, 0; mad.lo.u32 %r3, %r0, 16, %r3; cvt.u64.u32 %d5, %r3; add.s64 %d6, %d0, %d5;
    ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d6]; add.u32 %r3, %r3, %r1; st.shared.v4.u32 [%r3], {%r4, %r5, %r6, %r7};
    add.u32 %r2, %r2, 1; setp.lt.u32 %p1, %r2, 32; @%p1 bra COPY; fence.proxy.async; bar.sync 0;"""


def descriptor(start: int, leading: int, stride: int, swizzle: int) -> int:
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {0: 0, 1: 3, 2: 2, 3: 1}[swizzle] << 62


def laid_out(matrix: Array, swizzle: int, by_rows: bool) -> tuple[Array, int, int]:
    """A matrix [rows, k] of bytes in one of the canonical layouts: bytes, leading offset, stride offset.

    k-major: 8 rows of 16 << swizzle bytes are a core. mn-major: the same of the transposed matrix. Without a swizzle,
    k-major cores are 8 rows of 16 bytes, the next k chunk behind all rows.
    """
    rows = matrix.T if by_rows else matrix
    raw = np.ascontiguousarray(rows).view(np.uint8)
    outer, inner = raw.shape
    span = 16 << swizzle
    chunks = inner // span
    # [outer cores, 8, chunks, span]: chunk-major, then cores of 8.
    blocks = raw.reshape(outer // 8, 8, chunks, span).transpose(2, 0, 1, 3)
    flat = np.ascontiguousarray(blocks).reshape(-1)
    if swizzle:
        where = np.arange(flat.size)
        moved = where ^ ((where >> 7 & ((1 << swizzle) - 1)) << 4)
        out = np.empty_like(flat)
        out[moved] = flat
        flat = out
    across, along = outer // 8 * 8 * span, 8 * span
    if by_rows:
        return flat, (along if swizzle == 0 else across), (across if swizzle == 0 else along)
    return flat, across, along


def run(
    opcode: str,
    a: Array,
    b: Array,
    c: Array,
    layouts: tuple[int, bool, int, bool],
    *,
    from_registers: Array | None = None,
    modifiers: str = "",
    landing: Landing = "late",
    sequence: str = "{fence} {product} {commit} {wait}",
    scale: int = 1,
) -> tuple[Array, tuple[Hazard, ...]]:
    """D = A B + C of one warpgroup; C and D as registers [128, n]."""
    swizzle_a, rows_a, swizzle_b, rows_b = layouts
    memory = np.zeros(65536, np.uint8)
    one, leading_a, stride_a = laid_out(a, swizzle_a, rows_a)
    two, leading_b, stride_b = laid_out(b, swizzle_b, rows_b)
    memory[: one.size], memory[SECOND : SECOND + two.size] = one, two
    descriptors = [descriptor(0, leading_a, stride_a, swizzle_a), descriptor(SECOND, leading_b, stride_b, swizzle_b)]
    count = c.shape[1]
    held = [f"%f{n}" for n in range(count)]
    first = "%d8"
    load_a = ""
    if from_registers is not None:
        names = [f"%r{20 + n}" for n in range(from_registers.shape[1])]
        first = "{" + ", ".join(names) + "}"
        load_a = f"mad.wide.u32 %d7, %r0, {4 * len(names)}, %d4;" + "".join(
            f"ld.global.u32 {name}, [%d7+{4 * n}];" for n, name in enumerate(names)
        )
    product = f"wgmma.mma_async.sync.aligned.{opcode} {{{', '.join(held)}}}, {first}, %d9, %p2{modifiers};"
    body = f"""{START} mad.wide.u32 %d1, %r0, {4 * count}, %d1; mad.wide.u32 %d2, %r0, {4 * count}, %d2;
        mov.b64 %d8, {descriptors[0]}; mov.b64 %d9, {descriptors[1]}; setp.eq.u32 %p2, {scale}, 1; {load_a}
        {" ".join(f"ld.global.f32 {name}, [%d1+{4 * n}];" for n, name in enumerate(held))}
        {sequence.format(fence=FENCE, product=product, commit=COMMIT, wait=WAIT)}
        {" ".join(f"st.global.f32 [%d2+{4 * n}], {name};" for n, name in enumerate(held))}"""
    device = Device("sm_90a", Options(landing=landing))
    arrays = [device.array(memory), device.array(c), device.empty(c.shape, np.uint32)]
    arrays.append(device.array(from_registers if from_registers is not None else np.zeros(4, np.uint32)))
    pointers = [array.pointer for array in arrays]
    report = launch(kernel(body, 4, shared=SHARED), pointers, device=device, block=(128, 1, 1))
    return arrays[2].numpy(), report.hazards


def accumulator(matrix: Array) -> Array:
    """[64, n] as registers [128, ...]: lane 4 g + t of warp w has rows 16 w + g and + 8, columns 8 i + 2 t and + 1."""
    n, rows = matrix.shape[1], []
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        row, column = 16 * warp + lane // 4, lane % 4 * 2
        rows.append(
            [matrix[row + 8 * half, 8 * i + column + e] for i in range(n // 8) for half in (0, 1) for e in (0, 1)]
        )
    return np.ascontiguousarray(np.array(rows, matrix.dtype)).view(np.uint32)


TYPES = [
    ("m64n16k16.f32.bf16.bf16", ", 1, 1, 0, 0"),
    ("m64n32k16.f32.f16.f16", ", 1, 1, 0, 0"),
    ("m64n16k16.f16.f16.f16", ", 1, 1, 0, 0"),
    ("m64n8k8.f32.tf32.tf32", ", 1, 1"),
    ("m64n16k32.f32.e4m3.e4m3", ", 1, 1"),
    ("m64n16k32.f32.e5m2.e4m3", ", 1, 1"),
    ("m64n16k32.s32.s8.s8", ""),
    ("m64n16k32.s32.u8.s8", ""),
]


def operands(opcode: str) -> tuple[Array, Array, Array, Array, Any]:
    """Random integers in the types of an opcode: A [64, k], B [n, k], C [64, n], exact D, and D's type."""
    shape, result, kind_a, kind_b = opcode.split(".")
    n, k = (int(part) for part in shape.removeprefix("m64n").split("k"))
    random = np.random.default_rng(n + k)
    low = 0 if "u8" in opcode else -4
    a = encoded(random.integers(low, 5, (64, k)).astype(np.float64), kind_a)
    b = encoded(random.integers(-4, 5, (n, k)).astype(np.float64), kind_b)
    dtype: Any = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[result]
    c = random.integers(-50, 50, (64, n)).astype(dtype)
    return a, b, c, (decoded(a, kind_a) @ decoded(b, kind_b).T).astype(dtype), dtype


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize(("opcode", "modifiers"), TYPES, ids=[opcode for opcode, _ in TYPES])
def test_types(opcode: str, modifiers: str, landing: Landing) -> None:
    a, b, c, product, _ = operands(opcode)
    for scale in (1, 0):
        found, hazards = run(
            opcode, a, b, accumulator(c), (0, False, 0, False), modifiers=modifiers, landing=landing, scale=scale
        )
        np.testing.assert_array_equal(found, accumulator(product + c if scale else product))
        assert hazards == ()


@pytest.mark.parametrize("swizzle_a", [0, 1, 2, 3])
@pytest.mark.parametrize("swizzle_b", [0, 1, 2, 3])
@pytest.mark.parametrize("major", [(False, False), (True, False), (False, True), (True, True)], ids=str)
def test_layouts(swizzle_a: int, swizzle_b: int, major: tuple[bool, bool]) -> None:
    """k is 64 for k-major operands, so that a row fills the widest swizzle; the product takes its first 16 columns."""
    opcode = "m64n64k16.f32.bf16.bf16"
    random = np.random.default_rng(swizzle_a)
    parts = []
    for by_rows in major:
        wide = random.integers(-4, 5, (64, 16 if by_rows else 64)).astype(np.float64)
        parts.append(wide)
    a, b = (encoded(part, "bf16") for part in parts)
    c = np.zeros((64, 64), np.float32)
    modifiers = f", 1, 1, {int(major[0])}, {int(major[1])}"
    found, hazards = run(opcode, a, b, accumulator(c), (swizzle_a, major[0], swizzle_b, major[1]), modifiers=modifiers)
    np.testing.assert_array_equal(found, accumulator((parts[0][:, :16] @ parts[1][:, :16].T).astype(np.float32)))
    assert hazards == ()


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize(
    ("opcode", "modifiers"),
    [
        ("m64n16k16.f32.bf16.bf16", ", 1, -1, 0"),
        ("m64n16k32.f32.e4m3.e4m3", ", -1, 1"),
        ("m64n8k8.f32.tf32.tf32", ", 1, 1"),
    ],
)
def test_a_from_registers_and_signs(opcode: str, modifiers: str, landing: Landing) -> None:
    a, b, c, product, dtype = operands(opcode)
    kind = opcode.split(".")[2]
    per, k = 32 // BITS[kind], a.shape[1]
    rows = []
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        row, column = 16 * warp + lane // 4, lane % 4 * per
        firsts = [(row + 8 * half, start + column) for start in range(0, k, 4 * per) for half in (0, 1)]
        rows.append(np.concatenate([a[r, f : f + per] for r, f in firsts]))
    packed = np.ascontiguousarray(rows).view(np.uint32)
    found, hazards = run(
        opcode, a, b, accumulator(c), (0, False, 0, False), from_registers=packed, modifiers=modifiers, landing=landing
    )
    sign = dtype(-1 if "-1" in modifiers else 1)
    np.testing.assert_array_equal(found, accumulator(sign * product + c))
    assert hazards == ()


MISTAKES = [
    ("no wait before the accumulators are read", "in flight", "{fence} {product} {commit} mov.f32 %f99, %f0; {wait}"),
    ("no wait at all", "unwaited", "{fence} {product} {commit}"),
    ("no fence after registers are written", "in flight", "{product} {commit} {wait}"),
    ("operands overwritten", "in flight", "{fence} {product} {commit} st.shared.u32 [tile], %r0; {wait}"),
    ("a generic write without a proxy fence", "proxy", "st.shared.u32 [%r3+-63488], %r0; bar.sync 0;"
     " {fence} {product} {commit} {wait}"),
    ("another warp's write without a barrier", "race", "setp.eq.u32 %p3, %r0, 127; @%p3 st.shared.u32 [tile], %r0;"
     " fence.proxy.async; {fence} {product} {commit} {wait}"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "sequence"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES])
def test_mistakes_are_hazards(kind: str, sequence: str) -> None:
    opcode, modifiers = TYPES[0]
    a, b, c, _, _ = operands(opcode)
    _, hazards = run(opcode, a, b, accumulator(c), (0, False, 0, False), modifiers=modifiers, sequence=sequence)
    assert kind in {hazard.kind for hazard in hazards}


def test_late_products_read_and_write_at_their_wait() -> None:
    """Without the wait "late" leaves the accumulators as they were, "early" has the product in them."""
    opcode, modifiers = TYPES[0]
    a, b, c, product, _ = operands(opcode)
    found = {
        landing: run(
            opcode,
            a,
            b,
            accumulator(c),
            (0, False, 0, False),
            modifiers=modifiers,
            landing=landing,
            sequence="{fence} {product} {commit}",
        )[0]
        for landing in ("late", "early")
    }
    np.testing.assert_array_equal(found["late"], accumulator(c))
    np.testing.assert_array_equal(found["early"], accumulator(product + c))


def test_groups_complete_in_order() -> None:
    opcode, modifiers = TYPES[0]
    a, b, c, product, _ = operands(opcode)
    twice = "{fence} {product} {commit} {product} {commit} wgmma.wait_group.sync.aligned 1; {wait}"
    found, hazards = run(opcode, a, b, accumulator(c), (0, False, 0, False), modifiers=modifiers, sequence=twice)
    np.testing.assert_array_equal(found, accumulator(2 * product + c))
    assert hazards == ()


def test_a_part_of_a_warpgroup_is_refused() -> None:
    body = "mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 64; @%p1 bra OVER; wgmma.fence.sync.aligned; OVER: bar.sync 0;"
    with pytest.raises(DivergentCollective):
        launch(kernel(body, 0), [], device=Device("sm_90a"), block=(128, 1, 1))


@pytest.mark.parametrize("opcode", ["m64n16k8.f32.bf16.bf16", "m64n16k16.f16.bf16.bf16", "m64n12k16.f32.f16.f16"])
def test_combinations_that_do_not_exist(opcode: str) -> None:
    body = f"wgmma.mma_async.sync.aligned.{opcode} {{%f0}}, %d0, %d1, %p0, 1, 1, 0, 0;"
    with pytest.raises(UnsupportedInstruction):
        launch(kernel(body, 0), [], device=Device("sm_90a"), block=(128, 1, 1))
