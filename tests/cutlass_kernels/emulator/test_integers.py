"""Integer, logic and bit instructions against Python's integers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.cutlass_kernels.emulator.harness import compute, samples

LANES = 512
Oracle = Callable[..., int]


def signed(value: int, width: int) -> int:
    """The low bits as a signed number."""
    value &= (1 << width) - 1
    return value - (1 << width) if value >> (width - 1) else value


def quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def shift_right(a: int, n: int, width: int) -> int:
    return a >> min(n, width - 1) if a < 0 else (a >> n if n < width else 0)


def funnel(low: int, high: int, n: int, left: bool, wrap: bool) -> int:
    n = n & 31 if wrap else min(n, 32)
    both = high << 32 | low
    return (both << n >> 32 if left else both >> n) & 0xFFFFFFFF


def field(a: int, position: int, length: int, width: int, is_signed: bool) -> int:
    """bfe as the manual's pseudo-code has it, bit by bit."""
    position, length, top = position & 255, length & 255, width - 1
    pattern = a & ((1 << width) - 1)
    sign = 0
    if is_signed and length:
        sign = pattern >> min(position + length - 1, top) & 1
    bit = [pattern >> (position + n) & 1 if n < length and position + n <= top else sign for n in range(width)]
    return sum(b << n for n, b in enumerate(bit))


def insert(a: int, b: int, position: int, length: int, width: int) -> int:
    position, length = position & 255, length & 255
    for n in range(length):
        if position + n < width:
            b = b & ~(1 << (position + n)) | (a >> n & 1) << (position + n)
    return b


def permute(a: int, b: int, selectors: int) -> int:
    octets = [(b << 32 | a) >> 8 * n & 255 for n in range(8)]
    found = 0
    for n in range(4):
        selector = selectors >> 4 * n & 15
        octet = octets[selector & 7]
        found |= (255 if selector & 8 and octet & 128 else 0 if selector & 8 else octet) << 8 * n
    return found


def highest(a: int, width: int) -> int:
    """bfind: the highest bit that differs from the sign."""
    return (~a if a < 0 else a).bit_length() - 1 & 0xFFFFFFFF


def lut(a: int, b: int, c: int, table: int) -> int:
    bit = (table >> ((a >> n & 1) << 2 | (b >> n & 1) << 1 | (c >> n & 1)) & 1 for n in range(32))
    return sum(each << n for n, each in enumerate(bit))


def dot4(a: int, b: int, c: int, is_signed: bool) -> int:
    octet = [(a >> 8 * n & 255, b >> 8 * n & 255) for n in range(4)]
    return c + sum((signed(x, 8) * signed(y, 8) if is_signed else x * y) for x, y in octet)


def mask(start: int, count: int, wrap: bool) -> int:
    start, count = (start & 31, count & 31) if wrap else (min(start, 32), min(count, 32))
    return ((1 << count) - 1) << start & 0xFFFFFFFF


def low24(a: int, is_signed: bool) -> int:
    return signed(a, 24) if is_signed else a & 0xFFFFFF


# (instruction, types of inputs, type of output, what it computes)
CASES: list[tuple[str, str, str, Oracle]] = [
    ("add.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: a + b),
    ("add.u16 %o0, %i0, %i1;", "u16 u16", "u16", lambda a, b: a + b),
    ("add.s64 %o0, %i0, %i1;", "s64 s64", "s64", lambda a, b: a + b),
    ("add.sat.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a + b))),
    ("sub.sat.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: max(-(1 << 31), min((1 << 31) - 1, a - b))),
    ("sub.u32 %o0, %i0, 77;", "u32", "u32", lambda a: a - 77),
    ("sub.s64 %o0, %i0, %i1;", "s64 s64", "s64", lambda a, b: a - b),
    ("mul.lo.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: a * b),
    ("mul.lo.s64 %o0, %i0, %i1;", "s64 s64", "s64", lambda a, b: a * b),
    ("mul.hi.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: a * b >> 32),
    ("mul.hi.u32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: a * b >> 32),
    ("mul.hi.u64 %o0, %i0, %i1;", "u64 u64", "u64", lambda a, b: a * b >> 64),
    ("mul.hi.s64 %o0, %i0, %i1;", "s64 s64", "s64", lambda a, b: a * b >> 64),
    ("mul.hi.u16 %o0, %i0, %i1;", "u16 u16", "u16", lambda a, b: a * b >> 16),
    ("mul.wide.s32 %o0, %i0, %i1;", "s32 s32", "s64", lambda a, b: a * b),
    ("mul.wide.u32 %o0, %i0, %i1;", "u32 u32", "u64", lambda a, b: a * b),
    ("mul.wide.u16 %o0, %i0, %i1;", "u16 u16", "u32", lambda a, b: a * b),
    ("mad.lo.s32 %o0, %i0, %i1, %i2;", "s32 s32 s32", "s32", lambda a, b, c: a * b + c),
    ("mad.hi.u32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, c: (a * b >> 32) + c),
    ("mad.wide.s32 %o0, %i0, %i1, %i2;", "s32 s32 s64", "s64", lambda a, b, c: a * b + c),
    ("mad.wide.u16 %o0, %i0, %i1, %i2;", "u16 u16 u32", "u32", lambda a, b, c: a * b + c),
    ("mul24.lo.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: low24(a, True) * low24(b, True)),
    ("mul24.lo.u32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: low24(a, False) * low24(b, False)),
    ("mad24.lo.u32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, c: low24(a, 0) * low24(b, 0) + c),
    ("div.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: -1 if b == 0 else quotient(a, b)),
    ("div.u32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: -1 if b == 0 else a // b),
    ("div.u64 %o0, %i0, %i1;", "u64 u64", "u64", lambda a, b: -1 if b == 0 else a // b),
    ("rem.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: a if b == 0 else a - quotient(a, b) * b),
    ("rem.u16 %o0, %i0, %i1;", "u16 u16", "u16", lambda a, b: a if b == 0 else a % b),
    ("min.s32 %o0, %i0, %i1;", "s32 s32", "s32", min),
    ("min.u64 %o0, %i0, %i1;", "u64 u64", "u64", min),
    ("max.u32 %o0, %i0, %i1;", "u32 u32", "u32", max),
    ("max.s16 %o0, %i0, %i1;", "s16 s16", "s16", max),
    ("max.relu.s32 %o0, %i0, %i1;", "s32 s32", "s32", lambda a, b: max(a, b, 0)),
    ("neg.s32 %o0, %i0;", "s32", "s32", lambda a: -a),
    ("abs.s64 %o0, %i0;", "s64", "s64", abs),
    ("sad.s32 %o0, %i0, %i1, %i2;", "s32 s32 u32", "u32", lambda a, b, c: abs(a - b) + c),
    ("dp4a.s32.s32 %o0, %i0, %i1, %i2;", "u32 u32 s32", "s32", lambda a, b, c: dot4(a, b, c, True)),
    ("dp4a.u32.u32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, c: dot4(a, b, c, False)),
    ("and.b32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: a & b),
    ("and.pred %o0, %i0, %i1;", "pred pred", "pred", lambda a, b: a & b),
    ("or.b64 %o0, %i0, %i1;", "u64 u64", "u64", lambda a, b: a | b),
    ("or.pred %o0, %i0, !%i1;", "pred pred", "pred", lambda a, b: a | (1 - b)),
    ("xor.b16 %o0, %i0, %i1;", "u16 u16", "u16", lambda a, b: a ^ b),
    ("xor.pred %o0, %i0, %i1;", "pred pred", "pred", lambda a, b: a ^ b),
    ("not.b32 %o0, %i0;", "u32", "u32", lambda a: ~a),
    ("not.pred %o0, %i0;", "pred", "pred", lambda a: 1 - a),
    ("cnot.b32 %o0, %i0;", "u32", "u32", lambda a: int(a == 0)),
    ("lop3.b32 %o0, %i0, %i1, %i2, 0xE8;", "u32 u32 u32", "u32", lambda a, b, c: lut(a, b, c, 0xE8)),
    ("lop3.b32 %o0, %i0, %i1, %i2, 0x1B;", "u32 u32 u32", "u32", lambda a, b, c: lut(a, b, c, 0x1B)),
    ("shl.b32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, n: a << n if n < 32 else 0),
    ("shl.b64 %o0, %i0, %i1;", "u64 u32", "u64", lambda a, n: a << n if n < 64 else 0),
    ("shr.u32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, n: shift_right(a, n, 32)),
    ("shr.s32 %o0, %i0, %i1;", "s32 u32", "s32", lambda a, n: shift_right(a, n, 32)),
    ("shr.s64 %o0, %i0, %i1;", "s64 u32", "s64", lambda a, n: shift_right(a, n, 64)),
    ("shr.b16 %o0, %i0, %i1;", "u16 u32", "u16", lambda a, n: shift_right(a, n, 16)),
    ("shf.l.wrap.b32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, n: funnel(a, b, n, True, True)),
    ("shf.r.wrap.b32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, n: funnel(a, b, n, False, True)),
    ("shf.r.clamp.b32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, n: funnel(a, b, n, False, False)),
    ("shf.l.clamp.b32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, b, n: funnel(a, b, n, True, False)),
    ("bfe.u32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", lambda a, p, n: field(a, p, n, 32, False)),
    ("bfe.s32 %o0, %i0, %i1, %i2;", "s32 u32 u32", "s32", lambda a, p, n: field(a, p, n, 32, True)),
    ("bfe.s64 %o0, %i0, %i1, %i2;", "s64 u32 u32", "s64", lambda a, p, n: field(a, p, n, 64, True)),
    ("bfe.u64 %o0, %i0, 8, 12;", "u64", "u64", lambda a: field(a, 8, 12, 64, False)),
    ("bfi.b32 %o0, %i0, %i1, %i2, %i3;", "u32 u32 u32 u32", "u32", lambda a, b, p, n: insert(a, b, p, n, 32)),
    ("bfi.b64 %o0, %i0, %i1, %i2, %i3;", "u64 u64 u32 u32", "u64", lambda a, b, p, n: insert(a, b, p, n, 64)),
    ("bmsk.clamp.b32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: mask(a, b, False)),
    ("bmsk.wrap.b32 %o0, %i0, %i1;", "u32 u32", "u32", lambda a, b: mask(a, b, True)),
    ("prmt.b32 %o0, %i0, %i1, %i2;", "u32 u32 u32", "u32", permute),
    ("prmt.b32 %o0, %i0, %i1, 0x5410U;", "u32 u32", "u32", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16),
    ("popc.b32 %o0, %i0;", "u32", "u32", lambda a: a.bit_count()),
    ("popc.b64 %o0, %i0;", "u64", "u32", lambda a: a.bit_count()),
    ("clz.b32 %o0, %i0;", "u32", "u32", lambda a: 32 - a.bit_length()),
    ("clz.b64 %o0, %i0;", "u64", "u32", lambda a: 64 - a.bit_length()),
    ("bfind.u32 %o0, %i0;", "u32", "u32", lambda a: highest(a, 32)),
    ("bfind.s32 %o0, %i0;", "s32", "u32", lambda a: highest(a, 32)),
    ("bfind.shiftamt.u64 %o0, %i0;", "u64", "u32", lambda a: 64 - a.bit_length() if a else -1),
    ("brev.b32 %o0, %i0;", "u32", "u32", lambda a: int(f"{a:032b}"[::-1], 2)),
    ("brev.b64 %o0, %i0;", "u64", "u64", lambda a: int(f"{a:064b}"[::-1], 2)),
    ("selp.b32 %o0, %i0, %i1, %i2;", "u32 u32 pred", "u32", lambda a, b, p: a if p else b),
    ("selp.b64 %o0, 5, %i0, !%i1;", "u64 pred", "u64", lambda a, p: a if p else 5),
    ("slct.s32.s32 %o0, %i0, %i1, %i2;", "s32 s32 s32", "s32", lambda a, b, c: a if c >= 0 else b),
    ("mov.u32 %o0, %i0;", "u32", "u32", lambda a: a),
    ("mov.b64 %o0, {%i0, %i1};", "u32 u32", "u64", lambda a, b: a | b << 32),
    ("mov.b32 %o0, {%i0, %i1};", "u16 u16", "u32", lambda a, b: a | b << 16),
    (".reg .b32 %lo; mov.b64 {%lo, %o0}, %i0;", "u64", "u32", lambda a: a >> 32),
    ("mov.pred %o0, %i0;", "pred", "pred", lambda a: a),
    ("cvt.u16.u32 %o0, %i0;", "u32", "u16", lambda a: a),
    ("cvt.s64.s32 %o0, %i0;", "s32", "s64", lambda a: a),
    ("cvt.u64.u32 %o0, %i0;", "u32", "u64", lambda a: a),
    ("cvt.s32.s8 %o0, %i0;", "u32", "s32", lambda a: signed(a, 8)),
    ("cvt.u32.u8 %o0, %i0;", "u32", "u32", lambda a: a & 255),
    ("cvt.sat.s8.s32 %o0, %i0;", "s32", "s32", lambda a: max(-128, min(127, a))),
    ("cvt.sat.u16.s32 %o0, %i0;", "s32", "u16", lambda a: max(0, min(65535, a))),
    ("cvt.pack.sat.u8.s32.b32 %o0, %i0, %i1, %i2;", "s32 s32 u32", "u32",
     lambda a, b, c: max(0, min(255, b)) | max(0, min(255, a)) << 8 | c << 16),
    ("cvt.pack.sat.s16.s32 %o0, %i0, %i1;", "s32 s32", "u32",
     lambda a, b: max(-32768, min(32767, b)) & 0xFFFF | (max(-32768, min(32767, a)) & 0xFFFF) << 16),
]  # fmt: skip


@pytest.mark.parametrize("divergent", [False, True], ids=["together", "divergent"])
@pytest.mark.parametrize(("snippet", "inputs", "output", "oracle"), CASES, ids=[case[0] for case in CASES])
def test_as_python_computes_it(snippet: str, inputs: str, output: str, oracle: Oracle, divergent: bool) -> None:
    kinds = inputs.split()
    columns = [samples(kind, LANES, seed) for seed, kind in enumerate(kinds)]
    if snippet.startswith(("shl", "shr", "shf", "bfe", "bfi", "bmsk")):
        for column in columns[1:]:  # Half of the amounts within reach.
            column[::2] %= 70
    (found,) = compute(snippet, list(zip(kinds, columns, strict=True)), [output], divergent=divergent)
    width = 8 * found.dtype.itemsize
    wanted = [oracle(*(int(column[lane]) for column in columns)) & ((1 << width) - 1) for lane in range(LANES)]
    if divergent:
        wanted = [value if lane % 2 else 0 for lane, value in enumerate(wanted)]
    np.testing.assert_array_equal(found, np.array(wanted, found.dtype))


COMPARISONS: list[tuple[str, Callable[[int, int, int], bool]]] = [
    ("setp.eq.s32 %o0, %i0, %i1;", lambda a, b, p: a == b),
    ("setp.ne.s32 %o0, %i0, %i1;", lambda a, b, p: a != b),
    ("setp.lt.s32 %o0, %i0, %i1;", lambda a, b, p: a < b),
    ("setp.le.s32 %o0, %i0, %i1;", lambda a, b, p: a <= b),
    ("setp.gt.s32 %o0, %i0, %i1;", lambda a, b, p: a > b),
    ("setp.ge.s32 %o0, %i0, %i1;", lambda a, b, p: a >= b),
    ("setp.lo.u32 %o0, %i0, %i1;", lambda a, b, p: a % 2**32 < b % 2**32),
    ("setp.ls.u32 %o0, %i0, %i1;", lambda a, b, p: a % 2**32 <= b % 2**32),
    ("setp.hi.u32 %o0, %i0, %i1;", lambda a, b, p: a % 2**32 > b % 2**32),
    ("setp.hs.u32 %o0, %i0, %i1;", lambda a, b, p: a % 2**32 >= b % 2**32),
    ("setp.lt.and.s32 %o0, %i0, %i1, %i2;", lambda a, b, p: a < b and p == 1),
    ("setp.lt.or.s32 %o0, %i0, %i1, !%i2;", lambda a, b, p: a < b or p == 0),
    ("setp.lt.xor.s32 %o0, %i0, %i1, %i2;", lambda a, b, p: (a < b) != (p == 1)),
    ("setp.lt.and.s32 _|%o0, %i0, %i1, %i2;", lambda a, b, p: not a < b and p == 1),
    ("set.lt.u32.s32 %r9, %i0, %i1; setp.eq.u32 %o0, %r9, 0xffffffff;", lambda a, b, p: a < b),
]


@pytest.mark.parametrize(("snippet", "oracle"), COMPARISONS, ids=[case[0] for case in COMPARISONS])
def test_comparisons(snippet: str, oracle: Callable[[int, int, int], bool]) -> None:
    a, b, p = samples("s32", LANES, 1), samples("s32", LANES, 2), samples("pred", LANES)
    b[::5] = a[::5]
    (found,) = compute(snippet, [("s32", a), ("s32", b), ("pred", p)], ["pred"])
    wanted = [oracle(int(a[lane]), int(b[lane]), int(p[lane])) for lane in range(LANES)]
    np.testing.assert_array_equal(found.astype(np.bool_), wanted)
