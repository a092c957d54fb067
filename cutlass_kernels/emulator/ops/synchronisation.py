"""Barriers of CTAs and clusters, mbarriers, fences, and what a mutant does in place of one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from cutlass_kernels.emulator.machine.barriers import Resume
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes, first_of_warps
from cutlass_kernels.emulator.machine.spaces import Space
from cutlass_kernels.emulator.ptx.syntax import Immediate, Instruction
from cutlass_kernels.emulator.ptx.types import Array, Value
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

_SCOPES = "relaxed release acquire cta cluster gpu sys"


def dropped(t: Translator, item: Instruction) -> Step | None:
    """The step in place of a synchronising instruction that is left out: a wait that succeeds at once, or nothing."""
    if item.opcode[:2] in (("mbarrier", "try_wait"), ("mbarrier", "test_wait")):
        write = t.write(item.operands[0])
        return lambda machine, lanes: write(machine, lanes, np.bool_(True))
    if item.opcode[0] in ("bar", "barrier") and "red" in item.opcode:
        write, read = t.write(item.operands[0]), t.predicate(item.operands[-1])
        number = np.dtype(np.uint32 if "popc" in item.opcode else np.bool_)
        return lambda machine, lanes: write(machine, lanes, np.array(read(machine, lanes), number))
    return None


# bar, barrier


def _meet(
    machine: Machine,
    lanes: Ints,
    number: Value,
    count: Value | None,
    resume: Resume | None,
    votes: Array | None = None,
) -> None:
    """Lanes arrive at barriers whose number and thread count may differ between warps."""
    numbers = np.broadcast_to(number, lanes.shape)
    counts = None if count is None else np.broadcast_to(count, lanes.shape)
    for each in np.unique(numbers).tolist():
        mine = numbers == each
        for threads in [None] if counts is None else np.unique(counts[mine]).tolist():
            chosen = mine if threads is None or counts is None else mine & (counts == threads)
            machine.barriers.arrive(each, lanes[chosen], threads, resume, None if votes is None else votes[chosen])
    machine.scheduler.progress += 1


@instruction(
    "bar.sync",
    "barrier.sync",
    "bar.arrive",
    "barrier.arrive",
    kind="barrier",
    accepts="aligned cta",
    control=True,
    waits=True,
)
@instruction(
    "bar.cta.sync",
    "bar.cta.arrive",
    "barrier.cta.sync",
    "barrier.cta.arrive",
    kind="barrier",
    accepts="aligned",
    control=True,
    waits=True,
)
def _bar(t: Translator, item: Instruction) -> Step:
    number = t.read(item.operands[0], "u32")
    count = t.read(item.operands[1], "u32") if len(item.operands) > 1 else None
    following, waits = t.following, "sync" in item.opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)

        def resume(going: Ints, votes: Array | None) -> None:
            machine.scheduler.push(following, going)

        threads = None if count is None else count(machine, lanes)
        _meet(machine, where, number(machine, lanes), threads, resume if waits else None)
        if not waits:
            machine.scheduler.push(following, where)

    return step


@instruction(
    "bar.red",
    "barrier.red",
    "bar.cta.red",
    "barrier.cta.red",
    kind="barrier",
    accepts="popc and or aligned",
    control=True,
    waits=True,
)
def _bar_red(t: Translator, item: Instruction) -> Step:
    write, number = t.write(item.operands[0]), t.read(item.operands[1], "u32")
    count = t.read(item.operands[2], "u32") if len(item.operands) > 3 else None
    votes, following = t.predicate(item.operands[-1], "a vote"), t.following
    operation = next(part for part in item.opcode if part in ("popc", "and", "or"))

    def step(machine: Machine, lanes: Lanes) -> None:
        def resume(going: Ints, tally: Array | None) -> None:
            assert tally is not None
            true, all_of_them = tally[:, 0], tally[:, 1]
            found = {"popc": true.astype(np.uint32), "and": true == all_of_them, "or": true > 0}[operation]
            write(machine, going, found)
            machine.scheduler.push(following, going)

        where = machine.lanes(lanes)
        holds = np.broadcast_to(votes(machine, lanes), where.shape)
        threads = None if count is None else count(machine, lanes)
        _meet(machine, where, number(machine, lanes), threads, resume, holds)

    return step


@instruction("barrier.cluster.arrive", kind="barrier", accepts="release relaxed aligned", control=True, waits=True)
def _cluster_arrive(t: Translator, item: Instruction) -> Step:
    """Arrival only. The wait registers as a waiter of the phase that it was told of."""
    following = t.following

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        machine.cluster.arrive(where)
        machine.scheduler.push(following, where)

    return step


@instruction("barrier.cluster.wait", kind="barrier", accepts="acquire aligned", control=True, waits=True)
def _cluster_wait(t: Translator, item: Instruction) -> Step:
    following = t.following

    def step(machine: Machine, lanes: Lanes) -> None:
        machine.cluster.wait(machine.lanes(lanes), following)

    return step


# mbarrier


def _places(machine: Machine, space: Space, address: Array, lanes: Ints) -> Ints:
    return machine.locate(space, address, lanes, 8)[2]


def _full(value: Value, lanes: Ints) -> Ints:
    return np.broadcast_to(np.asarray(value), lanes.shape).astype(np.int64)


@instruction("mbarrier.init", "mbarrier.inval", kind="barrier", accepts="shared shared::cta")
def _mbarrier_init(t: Translator, item: Instruction) -> Step:
    space, address = t.space(item.opcode), t.address(item.operands[0])
    if item.opcode[1] == "inval":
        return lambda machine, lanes: machine.mbarriers.invalidate(
            _places(machine, space, address(machine, lanes), machine.lanes(lanes))
        )
    count = t.read(item.operands[1], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        places = _places(machine, space, address(machine, lanes), where)
        machine.mbarriers.initialise(places, _full(count(machine, lanes), where), where)

    return step


@instruction(
    "mbarrier.arrive", kind="barrier", accepts=f"expect_tx shared shared::cta shared::cluster {_SCOPES}", waits=True
)
def _mbarrier_arrive(t: Translator, item: Instruction) -> Step:
    write, space, address = t.write(item.operands[0]), t.space(item.opcode), t.address(item.operands[1])
    amount = t.read(item.operands[2], "u32") if len(item.operands) > 2 else None
    expects = "expect_tx" in item.opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        given = _full(1 if amount is None else amount(machine, lanes), where)
        once = np.ones_like(given)
        places = _places(machine, space, address(machine, lanes), where)
        if expects:
            phases = machine.mbarriers.arrive(places, once, given, where)
        else:
            phases = machine.mbarriers.arrive(places, given, np.zeros_like(given), where)
        write(machine, lanes, phases.astype(np.uint64))

    return step


@instruction("mbarrier.expect_tx", kind="barrier", accepts=f"shared shared::cta shared::cluster {_SCOPES}")
def _mbarrier_expect(t: Translator, item: Instruction) -> Step:
    space, address, amount = t.space(item.opcode), t.address(item.operands[0]), t.read(item.operands[1], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        places, size = _places(machine, space, address(machine, lanes), where), _full(amount(machine, lanes), where)
        machine.mbarriers.arrive(places, np.zeros_like(size), size, where)

    return step


@instruction(
    "mbarrier.try_wait", kind="barrier", accepts=f"parity shared shared::cta {_SCOPES}", control=True, waits=True
)
def _try_wait(t: Translator, item: Instruction) -> Step:
    """Lanes whose phase is not complete park; the wait fails (times out) only when nothing else can run."""
    write, test = t.write(item.operands[0]), _test(t, item)
    block, following = t.block, t.following

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        places, passed = test(machine, lanes, where)
        write(machine, where[passed], passed[passed])
        machine.scheduler.push(following, where[passed])
        if not passed.all():
            machine.mbarriers.park(block, places[~passed], where[~passed])

    def time_out(machine: Machine, lanes: Lanes) -> None:
        write(machine, lanes, np.bool_(False))
        machine.scheduler.push(following, lanes)

    t.time_outs[block] = time_out
    return step


@instruction("mbarrier.test_wait", kind="barrier", accepts=f"parity shared shared::cta {_SCOPES}", waits=True)
def _test_wait(t: Translator, item: Instruction) -> Step:
    """Answers at once."""
    write, test = t.write(item.operands[0]), _test(t, item)
    return lambda machine, lanes: write(machine, lanes, test(machine, lanes, machine.lanes(lanes))[1])


def _test(t: Translator, item: Instruction) -> Callable[[Machine, Lanes, Ints], tuple[Ints, Array]]:
    """The places of the lanes' mbarriers, and which of their phases are complete."""
    space, address, parity = t.space(item.opcode), t.address(item.operands[1]), "parity" in item.opcode
    wanted = t.read(item.operands[2], "u32" if parity else "u64")

    def test(machine: Machine, lanes: Lanes, where: Ints) -> tuple[Ints, Array]:
        places = _places(machine, space, address(machine, lanes), where)
        return places, machine.mbarriers.test(places, _full(wanted(machine, lanes), where), where, parity=parity)

    return test


# Fences


@instruction(
    "fence.proxy",
    kind="barrier",
    waits=True,
    accepts="async async::generic alias tensormap tensormap::generic global shared::cta shared::cluster "
    "acquire release gpu sys cta cluster sync_restrict::shared::cta sync_restrict::shared::cluster",
)
def _proxy_fence(t: Translator, item: Instruction) -> Step:
    """Only one proxy is followed: the asynchronous one."""
    if "async" not in item.opcode:
        return lambda machine, lanes: None

    def step(machine: Machine, lanes: Lanes) -> None:
        if machine.order is not None:
            first = first_of_warps(machine.lanes(lanes))
            machine.clocks.proxy_fence(machine.domain[first], machine.warp[first])

    return step


@instruction("fence.sc", "fence.acq_rel", "membar", kind="barrier", waits=True, accepts=f"gl {_SCOPES}")
def _fence(t: Translator, item: Instruction) -> Step:
    """A fence orders CTAs that use flags in global memory; values themselves are seen at once here."""
    if not {"gpu", "gl", "sys"} & set(item.opcode):
        return lambda machine, lanes: None

    def step(machine: Machine, lanes: Lanes) -> None:
        if machine.visible is not None:
            first = first_of_warps(machine.lanes(lanes))
            machine.visible.fence(machine.domain[first], machine.warp[first])

    return step


@instruction(
    "fence",
    kind="barrier",
    accepts=f"{_SCOPES} mbarrier_init sync_restrict::shared::cta sync_restrict::shared::cluster",
)
def _other_fence(t: Translator, item: Instruction) -> Step:
    """Shared memory is sequentially consistent here, so that these fences do nothing."""
    return lambda machine, lanes: None


# Waits for copies and products


def _pending(t: Translator, item: Instruction) -> int:
    count = item.operands[0]
    if not isinstance(count, Immediate):
        raise t.unsupported("a number of pending groups that is no literal")
    return count.value


@instruction("cp.async.wait_group", "cp.async.wait_all", kind="async", waits=True)
def _wait_copies(t: Translator, item: Instruction) -> Step:
    if item.opcode[2] == "wait_all":

        def everything(machine: Machine, lanes: Lanes) -> None:
            where = machine.lanes(lanes)
            machine.copies.commit(where)
            machine.copies.wait(0, where)

        return everything
    still = _pending(t, item)
    return lambda machine, lanes: machine.copies.wait(still, machine.lanes(lanes))


@instruction("cp.async.bulk.wait_group", kind="async", accepts="read", waits=True)
def _wait_bulk(t: Translator, item: Instruction) -> Step:
    still = _pending(t, item)
    return lambda machine, lanes: machine.transfers.wait(still, machine.lanes(lanes))


@instruction("wgmma.wait_group", kind="async", accepts="sync aligned", waits=True)
def _wait_products(t: Translator, item: Instruction) -> Step:
    still = _pending(t, item)
    return lambda machine, lanes: machine.warpgroups.wait(still, machine.lanes(lanes))


@instruction("wgmma.fence", kind="async", accepts="sync aligned", waits=True)
def _fence_products(t: Translator, item: Instruction) -> Step:
    return lambda machine, lanes: machine.warpgroups.fence(machine.lanes(lanes))
