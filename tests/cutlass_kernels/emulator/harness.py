"""Kernels written around a few PTX instructions, and values that instructions find difficult."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cutlass_kernels.emulator import Device, LaunchReport, Options
from cutlass_kernels.emulator.ptx.types import UNSIGNED, bits

Array = NDArray[Any]
HEADER = ".version 9.0\n.target sm_90a\n.address_size 64\n"
PLAIN = Options()


def kernel(body: str, parameters: int = 2, *, shared: str = "", name: str = "k") -> str:
    """A module of one kernel with 64-bit parameters p0, p1, ... and room for registers of every kind."""
    declared = ", ".join(f".param .u64 p{n}" for n in range(parameters))
    return f"""{HEADER}{shared}
.visible .entry {name}({declared})
{{
.reg .pred %p<24>; .reg .b8 %c<4>; .reg .b16 %h<24>; .reg .b32 %r<160>; .reg .b64 %d<40>; .reg .f32 %f<160>;
{body}
ret;
}}
"""


def launch(
    text: str,
    pointers: Iterable[int],
    *,
    device: Device,
    grid: tuple[int, int, int] = (1, 1, 1),
    block: tuple[int, int, int] = (32, 1, 1),
    shared: int = 0,
    cluster: tuple[int, int, int] | None = None,
) -> LaunchReport:
    """Load a module and run its only kernel with 64-bit parameters."""
    (name,) = device.load_ptx(text)
    return device.launch(name, grid, block, np.array(list(pointers), np.uint64).tobytes(), shared, cluster)


def compute(
    snippet: str,
    inputs: Sequence[tuple[str, Array]],
    outputs: Sequence[str],
    *,
    divergent: bool = False,
    options: Options = PLAIN,
) -> list[Array]:
    """Run ``snippet`` once a lane: %i0, %i1, ... hold the inputs' elements, %o0, %o1, ... become the outputs'.

    ``divergent``: only lanes with an odd number execute it; the others leave zeros.
    """
    lanes = max(len(values) for _, values in inputs) if inputs else 32
    assert lanes % 32 == 0
    threads = min(lanes, 256)
    device = Device("sm_90a", options)
    arrays = [device.array(np.ascontiguousarray(values).view(UNSIGNED[max(bits(kind), 8)])) for kind, values in inputs]
    results = [device.zeros(lanes, UNSIGNED[max(bits(kind), 8)]) for kind in outputs]
    text = _module(snippet, [kind for kind, _ in inputs], outputs, threads, divergent)
    launch(
        text,
        [array.pointer for array in (*arrays, *results)],
        device=device,
        grid=(-(-lanes // threads), 1, 1),
        block=(threads, 1, 1),
    )
    return [result.numpy() for result in results]


def _module(snippet: str, inputs: Sequence[str], outputs: Sequence[str], threads: int, divergent: bool) -> str:
    lines = [
        "mov.u32 %r0, %ctaid.x; mov.u32 %r1, %ntid.x; mov.u32 %r2, %tid.x; mad.lo.u32 %r3, %r0, %r1, %r2;",
        "and.b32 %r4, %r3, 1; setp.eq.u32 %p0, %r4, 0;",
    ]
    declared, stores = [], []
    for prefix, kinds, first in (("i", inputs, 0), ("o", outputs, len(inputs))):
        for n, kind in enumerate(kinds):
            width, register = max(bits(kind), 8), f"%{prefix}{n}"
            declared.append(f".reg .{kind if kind == 'pred' else f'b{max(width, 16)}'} {register};")
            where = f"ld.param.u64 %d0, [p{first + n}]; mad.wide.u32 %d1, %r3, {width // 8}, %d0;"
            if prefix == "i" and kind == "pred":
                lines.append(f"{where} ld.global.u8 %h0, [%d1]; setp.ne.u16 {register}, %h0, 0;")
            elif prefix == "i":
                lines.append(f"{where} ld.global.u{width} {register}, [%d1];")
            elif kind == "pred":
                stores.append(f"{where} selp.u16 %h0, 1, 0, {register}; st.global.u8 [%d1], %h0;")
            else:
                stores.append(f"{where} st.global.u{width} [%d1], {register};")
    skip = "@%p0 bra OVER;" if divergent else ""
    body = "\n".join([*declared, *lines, skip, f"{{ {snippet} }}", *stores, "OVER:"])
    return kernel(body, len(inputs) + len(outputs))


_EDGES = {
    "f32": [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -2.5, 3.4e38, -3.4e38, 1e-38, 1e-45, np.inf, -np.inf, np.nan, 1 / 3],
    "f64": [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 1e308, -1e308, 1e-308, 5e-324, np.inf, -np.inf, np.nan, 1 / 3, 2.5, -2.5],
    "f16": [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 65504, -65504, 6e-5, 6e-8, np.inf, -np.inf, np.nan, 1 / 3, 2.5, -2.5],
}


def samples(kind: str, count: int, seed: int = 0) -> Array:
    """``count`` values of a type, bit patterns for what numpy lacks: edges first, then random ones."""
    random = np.random.default_rng([seed, *kind.encode()])
    if kind in _EDGES:
        dtype = np.dtype({"f32": np.float32, "f64": np.float64, "f16": np.float16}[kind])
        edges = np.array(_EDGES[kind], dtype)
        scale = np.exp2(random.integers(-12, 12, count))
        values = (random.standard_normal(count) * scale).astype(dtype)
    elif kind == "bf16":
        edges = np.array([0, 0x8000, 0x3F80, 0xBF80, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0, 1, 0x4049], np.uint16)
        values = (random.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    elif kind == "pred":
        return random.integers(0, 2, count).astype(np.uint8)
    else:
        width = bits(kind)
        dtype = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{width // 8}")
        patterns = [0, 1, 2, (1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1, 31, width, 7]
        edges = np.array(patterns, f"u{width // 8}").view(dtype)
        values = random.integers(0, 1 << width, count, np.uint64).astype(f"u{width // 8}").view(dtype)
        values[::3] >>= values.dtype.type(width // 2)
    # Edges in an order of their own for each seed, so that operands meet in many combinations.
    chosen = random.permutation(np.resize(edges, min(count // 2, 8 * len(edges))))
    values[: len(chosen)] = chosen
    return values
