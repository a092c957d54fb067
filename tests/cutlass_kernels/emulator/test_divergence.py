"""Random structured programs: what all threads do together is what each does alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cutlass_kernels.emulator import Device
from tests.cutlass_kernels.emulator.harness import kernel, launch

VARIABLES, THREADS, MASK = 4, 64, 0xFFFFFFFF
Statement = tuple[Any, ...]

variable = st.integers(0, VARIABLES - 1)
simple = st.one_of(
    st.tuples(st.just("add"), variable, st.integers(0, MASK)),
    st.tuples(st.just("mul"), variable, variable),
    st.tuples(st.just("xor"), variable, variable),
    st.tuples(st.just("leave"), variable, st.integers(0, 31)),
)
# "if" tests a bit of a variable; "loop" runs 0 to 3 times, as the two low bits of a variable say.
program = st.recursive(
    st.lists(simple, min_size=1, max_size=3),
    lambda inner: st.lists(
        st.one_of(
            simple,
            st.tuples(st.just("if"), variable, st.integers(0, 5), inner, inner),
            st.tuples(st.just("loop"), variable, inner),
        ),
        min_size=1,
        max_size=4,
    ),
    max_leaves=12,
)


@dataclass
class Writer:
    """Statements as PTX: variable n is %r(10 + n), the counter of a loop at some depth %r(40 + depth)."""

    labels: int = 0

    def label(self) -> str:
        self.labels += 1
        return f"L{self.labels}"

    def block(self, statements: list[Statement], depth: int = 0) -> str:
        return "\n".join(self.statement(statement, depth) for statement in statements)

    def statement(self, statement: Statement, depth: int) -> str:
        name, which = statement[0], f"%r{10 + statement[1]}"
        if name == "add":
            return f"add.u32 {which}, {which}, {statement[2]};"
        if name in ("mul", "xor"):
            opcode = "mul.lo.u32" if name == "mul" else "xor.b32"
            return f"{opcode} {which}, {which}, %r{10 + statement[2]};"
        if name == "leave":
            return f"and.b32 %r30, {which}, 255; setp.eq.u32 %p2, %r30, {statement[2]}; @%p2 bra END;"
        if name == "if":
            other, join = self.label(), self.label()
            return f"""and.b32 %r30, {which}, {1 << statement[2]}; setp.eq.u32 %p2, %r30, 0; @%p2 bra {other};
                {self.block(statement[3], depth)} bra {join}; {other}: {self.block(statement[4], depth)} {join}:"""
        again, done, counter = self.label(), self.label(), f"%r{40 + depth}"
        return f"""and.b32 {counter}, {which}, 3; setp.eq.u32 %p3, {counter}, 0; @%p3 bra {done};
            {again}: {self.block(statement[2], depth + 1)} add.s32 {counter}, {counter}, -1;
            setp.ne.u32 %p3, {counter}, 0; @%p3 bra {again}; {done}:"""


def alone(statements: list[Statement], values: list[int]) -> bool:
    """One thread; False where it leaves."""
    for statement in statements:
        name, which = statement[:2]
        if name == "add":
            values[which] = (values[which] + statement[2]) & MASK
        elif name == "mul":
            values[which] = values[which] * values[statement[2]] & MASK
        elif name == "xor":
            values[which] ^= values[statement[2]]
        elif name == "leave":
            if values[which] & 255 == statement[2]:
                return False
        elif name == "if":
            if not alone(statement[3] if values[which] >> statement[2] & 1 else statement[4], values):
                return False
        elif not all(alone(statement[2], values) for _ in range(values[which] & 3)):
            return False
    return True


@settings(max_examples=60, deadline=None)
@given(program)
def test_together_as_alone(statements: list[Statement]) -> None:
    start = "".join(f"mad.lo.u32 %r{10 + n}, %r0, {2 * n + 1}, {7 * n};" for n in range(VARIABLES))
    body = f"""mov.u32 %r0, %tid.x; {start} {Writer().block(statements)} END:
        ld.param.u64 %d0, [p0]; mad.wide.u32 %d0, %r0, 16, %d0; st.global.v4.u32 [%d0], {{%r10, %r11, %r12, %r13}};
        bar.warp.sync -1; vote.sync.all.pred %p4, %p4, -1;"""
    device = Device()
    out = device.empty((THREADS, VARIABLES), np.uint32)
    report = launch(kernel(body, 1), [out.pointer], device=device, block=(THREADS, 1, 1))
    expected = []
    for thread in range(THREADS):
        values = [(thread * (2 * n + 1) + 7 * n) & MASK for n in range(VARIABLES)]
        alone(statements, values)
        expected.append(values)
    np.testing.assert_array_equal(out.numpy(), expected)
    assert report.hazards == ()
