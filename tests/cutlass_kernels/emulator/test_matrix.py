"""Matrix fragments and tensor-core instructions, against products of whole matrices.

The layouts below are written down from the tables of the PTX ISA, lane by lane and register by register.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cutlass_kernels.emulator import Device, UnsupportedInstruction, from_bf16, to_bf16
from cutlass_kernels.emulator.formats import FP8, to_fp8, truncate_tf32
from tests.cutlass_kernels.emulator.harness import Array, kernel, launch, samples

BITS = {"bf16": 16, "f16": 16, "tf32": 32, "s8": 8, "u8": 8, "e4m3": 8, "e5m2": 8}


def encoded(values: Array, kind: str) -> Array:
    """Numbers as bit patterns of a type."""
    if kind == "bf16":
        return to_bf16(values)
    if kind in FP8:
        return to_fp8(values, kind)
    dtype: Any = {"f16": np.float16, "tf32": np.float32, "s8": np.int8, "u8": np.uint8}[kind]
    return values.astype(dtype).view(f"u{BITS[kind] // 8}")


def decoded(patterns: Array, kind: str) -> Array:
    """Bit patterns as float64."""
    if kind == "bf16":
        return from_bf16(patterns).astype(np.float64)
    if kind in FP8:
        return FP8[kind][patterns].astype(np.float64)
    if kind == "tf32":
        return truncate_tf32(patterns.view(np.float32)).astype(np.float64)
    return patterns.view({"f16": np.float16, "s8": np.int8, "u8": np.uint8}[kind]).astype(np.float64)


def fragments_a(a: Array, kind: str) -> Array:
    """A [16, k] as registers [32, n]: rows g and g + 8, then the second half of the columns."""
    per = 32 // BITS[kind]
    k, packed = a.shape[1], []
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for half in range(max(k // (4 * per), 1)):
            for row in (group, group + 8):
                first = half * 4 * per + thread * per
                packed.append(a[row, first : first + per])
    return np.ascontiguousarray(packed).view(np.uint32).reshape(32, -1)


def fragments_b(b: Array, kind: str) -> Array:
    """B [k, 8] as registers [32, n]."""
    per = 32 // BITS[kind]
    k, packed = b.shape[0], []
    for lane in range(32):
        group, thread = divmod(lane, 4)
        for half in range(max(k // (4 * per), 1)):
            first = half * 4 * per + thread * per
            packed.append(b[first : first + per, group])
    return np.ascontiguousarray(packed).view(np.uint32).reshape(32, -1)


def fragments_c(c: Array) -> Array:
    """C [16, 8] of 32-bit or 16-bit elements as registers [32, n]."""
    packed = []
    for lane in range(32):
        group, thread = divmod(lane, 4)
        packed.append([c[row, 2 * thread + n] for row in (group, group + 8) for n in range(2)])
    return np.ascontiguousarray(np.array(packed, c.dtype)).view(np.uint32).reshape(32, -1)


def multiply(instruction: str, a: Array, b: Array, c: Array, outputs: int) -> Array:
    """Run an mma on register fragments [32, n] each."""
    counts = [part.shape[1] for part in (a, b, c)]
    names, lines, first = [], ["mov.u32 %r0, %tid.x;"], 1
    for n, count in enumerate(counts):
        mine = [f"%r{first + i}" for i in range(count)]
        lines.append(f"ld.param.u64 %d{n}, [p{n}]; mad.wide.u32 %d{n}, %r0, {4 * count}, %d{n};")
        lines += [f"ld.global.u32 {register}, [%d{n}+{4 * i}];" for i, register in enumerate(mine)]
        names.append("{" + ", ".join(mine) + "}")
        first += count
    out = [f"%r{first + i}" for i in range(outputs)]
    lines.append(f"{instruction} {{{', '.join(out)}}}, {names[0]}, {names[1]}, {names[2]};")
    lines.append(f"ld.param.u64 %d3, [p3]; mad.wide.u32 %d3, %r0, {4 * outputs}, %d3;")
    lines += [f"st.global.u32 [%d3+{4 * i}], {register};" for i, register in enumerate(out)]
    device = Device("sm_90a")
    arrays = [device.array(np.ascontiguousarray(part)) for part in (a, b, c)]
    result = device.empty((32, outputs), np.uint32)
    report = launch(
        kernel("\n".join(lines), 4), [array.pointer for array in (*arrays, result)], device=device, block=(32, 1, 1)
    )
    assert report.hazards == ()
    shape = instruction.split(".")[3]
    m, n, k = (int(part) for part in shape.replace("m", " ").replace("n", " ").replace("k", " ").split())
    assert report.counters.mma == m * n * k
    return result.numpy()


MMA = [
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32",
    "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32",
    "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32",
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32",
    "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e5m2.f32",
]


@pytest.mark.parametrize("fill", ["integers", "random", "extreme"])
@pytest.mark.parametrize("instruction", MMA)
def test_mma(instruction: str, fill: str) -> None:
    parts = instruction.split(".")
    k, (result, kind_a, kind_b, _) = int(parts[3].partition("k")[2]), parts[-4:]
    random = np.random.default_rng(k)
    draw = {
        "integers": lambda *shape: random.integers(-4, 5, shape).astype(np.float64),
        "random": lambda *shape: random.standard_normal(shape),
        "extreme": lambda *shape: random.choice([-64.0, 63.0, 0.0, 1.0], shape),
    }[fill]
    positive_a, positive_b = kind_a == "u8", kind_b == "u8"
    a, b = draw(16, k), draw(k, 8)
    a, b = np.abs(a) if positive_a else a, np.abs(b) if positive_b else b
    a, b = encoded(a, kind_a), encoded(b, kind_b)
    dtype: Any = {"f32": np.float32, "f16": np.float16, "s32": np.int32}[result]
    c = (np.round(draw(16, 8)) if fill != "random" or result == "s32" else draw(16, 8)).astype(dtype)
    exact = decoded(a, kind_a) @ decoded(b, kind_b) + c.astype(np.float64)
    found = multiply(
        instruction, fragments_a(a, kind_a), fragments_b(b, kind_b), fragments_c(c), 2 if result == "f16" else 4
    )
    wanted = fragments_c(exact.astype(dtype))
    if fill != "random" or result == "s32":
        np.testing.assert_array_equal(found, wanted)
        return
    scale = np.abs(decoded(a, kind_a)) @ np.abs(decoded(b, kind_b)) + np.abs(c)
    limit = fragments_c((scale * (2.0**-20 if result == "f32" else 2.0**-9)).astype(dtype)).view(dtype)
    assert (np.abs(found.view(dtype).astype(np.float64) - fragments_c(exact.astype(dtype)).view(dtype)) <= limit).all()


@pytest.mark.parametrize("saturate", [False, True], ids=["wrap", "saturate"])
def test_integer_accumulators_at_their_limit(saturate: bool) -> None:
    a, b = np.full((16, 32), 127, np.int8).view(np.uint8), np.full((32, 8), 127, np.int8).view(np.uint8)
    c = np.full((16, 8), 2**31 - 1, np.int32)
    found = multiply(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32" + ".satfinite" * saturate,
        fragments_a(a, "s8"),
        fragments_b(b, "s8"),
        fragments_c(c),
        4,
    )
    assert (found.view(np.int32) == (2**31 - 1 if saturate else 32 * 127 * 127 - 2**31 - 1)).all()


def test_mma_of_doubles() -> None:
    random = np.random.default_rng(0)
    a, b, c = random.standard_normal((8, 4)), random.standard_normal((4, 8)), random.standard_normal((8, 8))
    body = """mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2];
        mad.wide.u32 %d0, %r0, 8, %d0; mad.wide.u32 %d1, %r0, 8, %d1; mad.wide.u32 %d2, %r0, 16, %d2;
        ld.global.f64 %d3, [%d0]; ld.global.f64 %d4, [%d1]; ld.global.v2.f64 {%d5, %d6}, [%d2];
        mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d7, %d8}, {%d3}, {%d4}, {%d5, %d6};
        st.global.v2.f64 [%d2], {%d7, %d8};"""
    device = Device()
    # Lane 4 g + t holds A[g, t], B[t, g] and C[g, 2 t], C[g, 2 t + 1].
    given = [device.array(part) for part in (a, np.ascontiguousarray(b.T), c)]
    launch(kernel(body, 3), [array.pointer for array in given], device=device)
    np.testing.assert_allclose(given[2].numpy(), a @ b + c, rtol=1e-14)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Lane 4 g + t gets elements (g, 2 t) and (g, 2 t + 1) of each matrix; stmatrix puts them back."""
    data = samples("u16", 64 * count).reshape(count, 8, 8)
    forms = ["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16"]
    load, store = (form.replace("x4", f"x{count}").replace(".trans", ".trans" * transposed) for form in forms)
    names = "{" + ", ".join(f"%r{10 + n}" for n in range(count)) + "}"
    body = f"""mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1]; ld.param.u64 %d2, [p2];
        setp.lt.u32 %p1, %r0, {8 * count}; mov.u32 %r1, tile; mad.lo.u32 %r2, %r0, 16, %r1; and.b32 %r3, %r0, 7;
        mad.wide.u32 %d3, %r0, 16, %d0; mad.wide.u32 %d4, %r0, 16, %d1;
        @%p1 ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%d3]; @%p1 st.shared.v4.u32 [%r2], {{%r4, %r5, %r6, %r7}};
        bar.warp.sync -1;
        {load} {names}, [%r2];
        mad.wide.u32 %d5, %r0, {4 * count}, %d2;
        {" ".join(f"st.global.u32 [%d5+{4 * n}], %r{10 + n};" for n in range(count))}
        {store} [%r2+512], {names};
        @%p1 ld.shared.v4.u32 {{%r4, %r5, %r6, %r7}}, [%r2+512]; @%p1 st.global.v4.u32 [%d4], {{%r4, %r5, %r6, %r7}};"""
    device = Device("sm_90a")
    given, back, held = device.array(data), device.empty(data.shape, np.uint16), device.empty((32, count), np.uint32)
    shared = ".shared .align 16 .b8 tile[1024];"
    report = launch(kernel(body, 3, shared=shared), [given.pointer, back.pointer, held.pointer], device=device)
    np.testing.assert_array_equal(back.numpy(), data)
    source = data.swapaxes(1, 2) if transposed else data
    wanted = np.stack([np.ascontiguousarray(matrix).view(np.uint32).ravel() for matrix in source], axis=1)
    np.testing.assert_array_equal(held.numpy(), wanted)
    assert report.hazards == ()


ROWS, COLUMNS = 11, 5


@pytest.mark.parametrize("unwritten", ["rows of A", "columns of B"])
@pytest.mark.parametrize("guarded", [True, False], ids=["inside", "everywhere"])
def test_rows_and_columns_that_nobody_wrote_stay_apart(unwritten: str, guarded: bool) -> None:
    """A tile beyond the edge of a matrix is multiplied; only what depends on it may not be stored.

    B is stored by columns; its last ones, or A's last rows, were never written.
    """
    a_rows, b_columns = (ROWS, 8) if unwritten == "rows of A" else (16, COLUMNS)
    body = f"""mov.u32 %r0, %tid.x; mov.u32 %r1, tile; mov.u32 %r9, 0; shr.u32 %r10, %r0, 2; and.b32 %r11, %r0, 3;
        setp.lt.u32 %p1, %r0, {2 * a_rows}; setp.lt.u32 %p2, %r0, {2 * b_columns}; mad.lo.u32 %r2, %r0, 16, %r1;
        @%p1 st.shared.v4.u32 [%r2], {{%r9, %r9, %r9, %r9}}; @%p2 st.shared.v4.u32 [%r2+512], {{%r9, %r9, %r9, %r9}};
        bar.sync 0; and.b32 %r3, %r0, 15; shr.u32 %r4, %r0, 4; mad.lo.u32 %r3, %r3, 32, %r1;
        mad.lo.u32 %r3, %r4, 16, %r3;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r3];
        and.b32 %r5, %r0, 7; shr.u32 %r6, %r0, 3; and.b32 %r6, %r6, 1; mad.lo.u32 %r5, %r5, 32, %r1;
        mad.lo.u32 %r5, %r6, 16, %r5; ldmatrix.sync.aligned.m8n8.x2.shared.b16 {{%r24, %r25}}, [%r5+512];
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r30, %r31, %r32, %r33}}, {{%r20, %r21, %r22, %r23}},
            {{%r24, %r25}}, {{%r9, %r9, %r9, %r9}};
        ld.param.u64 %d0, [p0]; mad.wide.u32 %d1, %r0, 16, %d0; add.u32 %r12, %r10, 8; mad.lo.u32 %r13, %r11, 2, 1;
        setp.lt.u32 %p5, %r10, {a_rows}; setp.lt.u32 %p6, %r12, {a_rows}; mul.lo.u32 %r14, %r11, 2;
        setp.lt.and.u32 %p7, %r14, {b_columns}, %p5; setp.lt.and.u32 %p8, %r13, {b_columns}, %p5;
        setp.lt.and.u32 %p9, %r14, {b_columns}, %p6; setp.lt.and.u32 %p10, %r13, {b_columns}, %p6;
        @%p7 st.global.u32 [%d1], %r30; @%p8 st.global.u32 [%d1+4], %r31;
        @%p9 st.global.u32 [%d1+8], %r32; @%p10 st.global.u32 [%d1+12], %r33;"""
    if not guarded:
        body = body.replace("@%p7 ", "").replace("@%p8 ", "").replace("@%p9 ", "").replace("@%p10 ", "")
    device = Device()
    out = device.zeros(128, np.uint32)
    text = kernel(body, 1, shared=".shared .align 16 .b8 tile[1024];")
    found = launch(text, [out.pointer], device=device).hazards
    if guarded:
        assert found == ()
    else:
        assert sum(hazard.count for hazard in found) == 16 * 8 - a_rows * b_columns


def test_movmatrix_transposes() -> None:
    data = samples("u32", 32)
    body = """mov.u32 %r0, %tid.x; ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 4, %d0; ld.global.u32 %r1, [%d0];
        movmatrix.sync.aligned.m8n8.trans.b16 %r2, %r1; st.global.u32 [%d0], %r2;"""
    device = Device()
    memory = device.array(data)
    launch(kernel(body, 1), [memory.pointer], device=device)
    wanted = np.ascontiguousarray(data.view(np.uint16).reshape(8, 8).T)
    np.testing.assert_array_equal(memory.numpy().view(np.uint16).reshape(8, 8), wanted)


@pytest.mark.parametrize(
    "instruction",
    [
        "mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%r1}, {%r1}, {%r2}, {%r1};",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32.satfinite {%r1}, {%r1}, {%r2}, {%r1};",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f16 {%r1}, {%r1}, {%r2}, {%r1};",
        "tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 32;",
        "add.rz.f64 %d1, %d2, %d3;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%d0], [%r1], 16;",
        "mov.u32 %r1, %envreg3;",
    ],
)
def test_what_is_not_modelled_is_refused(instruction: str) -> None:
    with pytest.raises(UnsupportedInstruction) as caught:
        launch(kernel(instruction, 0), [], device=Device("sm_90a"))
    assert instruction.split()[0] in str(caught.value)
