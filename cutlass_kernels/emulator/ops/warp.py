"""Exchanges within a warp: shfl, vote, match, redux, elect, activemask, bar.warp.sync.

The scheduler lets a warp in only when the members that the instruction names have arrived together.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.errors import DivergentCollective
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import WARP, Lanes
from cutlass_kernels.emulator.ptx.flow import is_alone, member_mask
from cutlass_kernels.emulator.ptx.syntax import Instruction, Pair
from cutlass_kernels.emulator.ptx.types import UNSIGNED, Array, Value, bits, is_signed
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

#: The work of a warp-wide instruction for lanes that have their members with them.
Action = Callable[["Machine", "Lanes", Array], None]


def _together(t: Translator, item: Instruction, action: Action) -> Step:
    """Run ``action(machine, lanes, member masks)`` for the lanes whose members are all here; the others wait."""
    position = member_mask(item)
    assert position is not None
    read, alone = t.read(item.operands[position], "u32"), is_alone(item)
    block, following = t.block, t.following

    def step(machine: Machine, lanes: Lanes) -> None:
        everyone = machine.lanes(lanes)
        masks = np.broadcast_to(read(machine, lanes), everyone.shape).astype(np.int64)
        if not (masks >> everyone % WARP & 1).all():
            raise machine.fault(DivergentCollective, "a thread executes it that its member mask leaves out")
        here = machine.scheduler.present(everyone)[everyone // WARP]
        wanted = masks & machine.scheduler.alive()[everyone // WARP]
        missing = (wanted & ~here) != 0
        if not missing.any():
            action(machine, lanes, masks)
        elif not alone:
            raise machine.fault(DivergentCollective, "reached by a part of the threads in its member mask")
        else:
            machine.scheduler.hold(block, everyone[missing])
            if not missing.all():
                action(machine, everyone[~missing], masks[~missing])
        if alone:
            going = lanes if not missing.any() else everyone[~missing]
            machine.scheduler.push(following, going)

    return step


def _by_lane(machine: Machine, lanes: Ints, values: Value, fill: object = 0) -> Array:
    """Values as [all warps, 32], lanes that take no part filled in."""
    table = np.full(machine.n, fill, values.dtype)
    table[lanes] = values
    return table.reshape(-1, WARP)


@instruction("shfl", kind="shuffle", accepts="sync up down bfly idx", control=True)
def _shfl(t: Translator, item: Instruction) -> Step:
    mode, target = item.opcode[2], item.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_valid = t.write(first), t.write(second)
    value, by, clamp = (t.read(item.operands[n], "u32") for n in (1, 2, 3))

    def action(machine: Machine, lanes: Lanes, masks: Array) -> None:
        where = machine.lanes(lanes)
        lane = where % WARP
        distance = np.broadcast_to(by(machine, lanes), where.shape).astype(np.int64) & 31
        control = np.broadcast_to(clamp(machine, lanes), where.shape).astype(np.int64)
        segment, limit = (control >> 8) & 31, control & 31
        highest, lowest = (lane & segment) | (limit & ~segment), lane & segment
        if mode == "up":
            source = lane - distance
        elif mode == "down":
            source = lane + distance
        elif mode == "bfly":
            source = lane ^ distance
        else:
            source = lowest | (distance & ~segment)
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, lane)
        if not (masks >> source & 1).all():
            machine.hazards.add("race", "a shuffle reads a lane that its member mask leaves out")
        table = _by_lane(machine, where, np.broadcast_to(value(machine, lanes), where.shape))
        if machine.taint.marks and (marks := machine.taint.seen(where)) is not None:
            machine.taint.replace(where, _by_lane(machine, where, marks)[where // WARP, source])
        write(machine, lanes, table[where // WARP, source])
        write_valid(machine, lanes, valid)

    return _together(t, item, action)


@instruction("vote", kind="shuffle", accepts="sync all any uni ballot", control=True)
def _vote(t: Translator, item: Instruction) -> Step:
    mode, write, read = item.opcode[2], t.write(item.operands[0]), t.predicate(item.operands[1], "a vote")

    def action(machine: Machine, lanes: Lanes, masks: Array) -> None:
        where = machine.lanes(lanes)
        holds = np.broadcast_to(read(machine, lanes), where.shape)
        ballots = _ballot(machine, where, holds, masks)
        there = masks & machine.scheduler.alive()[where // WARP]
        if mode == "ballot":
            write(machine, lanes, ballots.astype(np.uint32))
        elif mode == "any":
            write(machine, lanes, ballots != 0)
        else:
            nobody = ballots == 0 if mode == "uni" else np.False_
            write(machine, lanes, nobody | (ballots == there))

    return _together(t, item, action)


def _ballot(machine: Machine, lanes: Ints, holds: Array, masks: Array) -> Ints:
    bits_of = machine.scheduler.present(lanes[holds]) if holds.any() else np.zeros(machine.n // WARP, np.int64)
    return np.asarray(bits_of[lanes // WARP] & masks)


@instruction("match", kind="shuffle", accepts="sync any all", control=True)
def _match(t: Translator, item: Instruction) -> Step:
    mode, kind, target = item.opcode[1], f"u{bits(item.opcode[-1])}", item.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    write, write_all, read = t.write(first), t.write(second), t.read(item.operands[1], kind, "a match")

    def action(machine: Machine, lanes: Lanes, masks: Array) -> None:
        where = machine.lanes(lanes)
        table = _by_lane(machine, where, np.broadcast_to(read(machine, lanes), where.shape))
        mine = table[where // WARP, where % WARP]
        there = masks & machine.scheduler.alive()[where // WARP]
        member = (there[:, None] >> np.arange(WARP)) & 1
        same = ((table[where // WARP] == mine[:, None]) & (member != 0)) @ (1 << np.arange(WARP))
        everywhere = same == there
        write(machine, lanes, (same if mode == "any" else np.where(everywhere, there, 0)).astype(np.uint32))
        write_all(machine, lanes, everywhere)

    return _together(t, item, action)


@instruction("redux", kind="shuffle", accepts="sync add min max and or xor", control=True)
def _redux(t: Translator, item: Instruction) -> Step:
    operation, kind = item.opcode[2], item.opcode[-1]
    if kind == "f32":
        raise t.unsupported("redux of .f32")
    write, read = t.write(item.operands[0]), t.read(item.operands[1], kind if is_signed(kind) else "u32", "a reduction")
    ufunc: np.ufunc = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[operation]

    def action(machine: Machine, lanes: Lanes, masks: Array) -> None:
        where = machine.lanes(lanes)
        values = np.broadcast_to(read(machine, lanes), where.shape)
        groups, inverse = np.unique((where // WARP << 32) | masks, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        starts = np.searchsorted(inverse[order], np.arange(groups.size))
        total = ufunc.reduceat(values[order], starts, dtype=values.dtype)
        write(machine, lanes, total[inverse])

    return _together(t, item, action)


@instruction("elect", kind="shuffle", accepts="sync", control=True)
def _elect(t: Translator, item: Instruction) -> Step:
    """The lowest live member is elected."""
    target = item.operands[0]
    if not isinstance(target, Pair):
        raise t.unsupported("elect without a predicate")
    write, write_elected = t.write(target.first), t.write(target.second)

    def action(machine: Machine, lanes: Lanes, masks: Array) -> None:
        where = machine.lanes(lanes)
        there = masks & machine.scheduler.alive()[where // WARP]
        lowest = np.bitwise_count((there & -there) - 1).astype(np.int64)
        write(machine, lanes, lowest.astype(UNSIGNED[32]))
        write_elected(machine, lanes, where % WARP == lowest)

    return _together(t, item, action)


@instruction("bar.warp", kind="barrier", accepts="sync", control=True, waits=True)
def _warp_barrier(t: Translator, item: Instruction) -> Step:
    """Threads of a warp run in step here, so that meeting is all that it does."""
    return _together(t, item, lambda machine, lanes, masks: None)


@instruction("activemask", kind="shuffle")
def _activemask(t: Translator, item: Instruction) -> Step:
    """The lanes that run together now, which may be any subset of those that could."""
    write = t.write(item.operands[0])

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        write(machine, lanes, machine.scheduler.present(where)[where // WARP].astype(np.uint32))

    return step
