"""cp.async, and bulk and tensor copies."""

from __future__ import annotations

import numpy as np

from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import Lanes
from cutlass_kernels.emulator.machine.spaces import SHARED, cluster_rank
from cutlass_kernels.emulator.ptx.syntax import Address, Immediate, Instruction, Operand, Register
from cutlass_kernels.emulator.registry import instruction
from cutlass_kernels.emulator.steps import Reader, Step
from cutlass_kernels.emulator.translate import Translator

_HINTS = "L2::cache_hint L2::64B L2::128B L2::256B"


@instruction("cp.async", kind="async", accepts=f"ca cg shared shared::cta global {_HINTS}")
def _cp_async(t: Translator, item: Instruction) -> Step:
    """cp.async [dst], [src], size {, source size | ignore-source predicate} {, policy}."""
    size_operand = item.operands[2]
    if not isinstance(size_operand, Immediate) or size_operand.value not in (4, 8, 16):
        raise t.unsupported("a size of cp.async other than 4, 8 and 16")
    size = size_operand.value
    target, source = t.address(item.operands[0]), t.address(item.operands[1])
    extra = item.operands[3 : len(item.operands) - ("L2::cache_hint" in item.opcode)]
    wanted, ignore = None, None
    if extra and isinstance(extra[0], Register) and extra[0].type == "pred":
        ignore = t.predicate(extra[0])
    elif extra:
        wanted = t.read(extra[0], "u32")

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        count = np.full(where.size, size, np.int64)
        if wanted is not None:
            count[:] = wanted(machine, lanes)
        elif ignore is not None:
            count[:] = np.where(ignore(machine, lanes), 0, size)
        machine.copies.issue(target(machine, lanes), source(machine, lanes), size, count, where)

    return step


@instruction("cp.async.commit_group", kind="async")
def _commit(t: Translator, item: Instruction) -> Step:
    return lambda machine, lanes: machine.copies.commit(machine.lanes(lanes))


@instruction("cp.async.mbarrier.arrive", kind="async", accepts="noinc shared shared::cta")
def _arrive(t: Translator, item: Instruction) -> Step:
    space, address = t.space(item.opcode), t.address(item.operands[0])
    extra = "noinc" not in item.opcode

    def step(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        _, _, places = machine.locate(space, address(machine, lanes), where, 8)
        machine.copies.arrive(places, where, extra=extra)

    return step


@instruction("cp.async.bulk.commit_group", kind="async")
def _commit_bulk(t: Translator, item: Instruction) -> Step:
    return lambda machine, lanes: machine.transfers.commit(machine.lanes(lanes))


_LOAD = ("mbarrier::complete_tx::bytes", "multicast::cluster", "shared::cluster", "shared::cta", "global")


def _targets(machine: Machine, lane: int, address: int, mask: int | None) -> tuple[int, list[int]]:
    """The byte in a CTA's shared memory that an address means, and the offsets of the CTAs that it is written to."""
    rank, inside = (int(part[0]) for part in cluster_rank(np.array([address], np.uint64)))
    own, peers = int(machine.cta[lane]), machine.geometry.cluster_ctas
    first = own // peers * peers
    if mask is None:
        ctas = [first + rank - 1 if rank else own]
    else:
        ctas = [first + peer for peer in range(peers) if mask >> peer & 1]
    return inside, [cta * machine.shared_stride for cta in ctas]


def _column(read: Reader, machine: Machine, lanes: Lanes, where: Ints) -> list[int]:
    return [int(value) for value in np.broadcast_to(read(machine, lanes), where.shape)]


def _plain(address: int) -> int:
    """A shared address without its generic window."""
    return address - SHARED if address >= SHARED else address


def _loads(item: Instruction) -> bool:
    places = [part for part in item.opcode if part.startswith(("shared", "global"))]
    return places[0].startswith("shared") and places[1] == "global"


def _stores(item: Instruction) -> bool:
    places = [part for part in item.opcode if part.startswith(("shared", "global"))]
    return places[0] == "global" and places[1] == "shared::cta"


@instruction("cp.async.bulk", kind="async", accepts=f"{' '.join(_LOAD)} bulk_group {_HINTS}")
def _bulk(t: Translator, item: Instruction) -> Step:
    first, second = t.address(item.operands[0]), t.address(item.operands[1])
    size = t.read(item.operands[2], "u32")
    if _stores(item):

        def store(machine: Machine, lanes: Lanes) -> None:
            where = machine.lanes(lanes)
            columns = (_column(read, machine, lanes, where) for read in (first, second, size))
            for lane, to, source, count in zip(where.tolist(), *columns, strict=True):
                machine.transfers.store_bulk(to, _plain(source), count, lane)

        return store
    if not _loads(item):
        raise t.unsupported("a bulk copy between CTAs")
    barrier, mask = t.address(item.operands[3]), _mask(t, item, 4)

    def load(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        columns = (_column(read, machine, lanes, where) for read in (first, second, size, barrier))
        masks = [None] * where.size if mask is None else _column(mask, machine, lanes, where)
        for lane, to, source, count, mbarrier, chosen in zip(where.tolist(), *columns, masks, strict=True):
            inside, ctas = _targets(machine, lane, _plain(to), chosen)
            at = int(cluster_rank(np.array([_plain(mbarrier)], np.uint64))[1][0])
            machine.transfers.load_bulk(inside, source, count, at, lane, ctas)

    return load


def _mask(t: Translator, item: Instruction, position: int) -> Reader | None:
    return t.read(item.operands[position], "u16") if "multicast::cluster" in item.opcode else None


def _coordinates(t: Translator, operand: Operand) -> list[Reader]:
    if not isinstance(operand, Address) or not operand.coordinates:
        raise t.unsupported("a tensor copy without coordinates")
    return [t.read(each, "s32") for each in operand.coordinates]


@instruction("cp.async.bulk.tensor", kind="async", accepts=f"1d 2d 3d 4d 5d tile {' '.join(_LOAD)} bulk_group {_HINTS}")
def _tensor(t: Translator, item: Instruction) -> Step:
    if _stores(item):
        return _tensor_store(t, item)
    if not _loads(item):
        raise t.unsupported("this direction of a tensor copy")
    target, tensor_map = t.address(item.operands[0]), t.address(item.operands[1])
    start, barrier = _coordinates(t, item.operands[1]), t.address(item.operands[2])
    mask = _mask(t, item, 3)

    def load(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        columns = (_column(read, machine, lanes, where) for read in (target, tensor_map, barrier))
        starts = zip(*(_column(read, machine, lanes, where) for read in start), strict=True)
        masks = [None] * where.size if mask is None else _column(mask, machine, lanes, where)
        for lane, to, which, mbarrier, corner, chosen in zip(where.tolist(), *columns, starts, masks, strict=True):
            inside, ctas = _targets(machine, lane, _plain(to), chosen)
            at = int(cluster_rank(np.array([_plain(mbarrier)], np.uint64))[1][0])
            machine.transfers.load_tensor(inside, which, tuple(corner), at, lane, ctas)

    return load


def _tensor_store(t: Translator, item: Instruction) -> Step:
    tensor_map, source, start = (
        t.address(item.operands[0]),
        t.address(item.operands[1]),
        _coordinates(t, item.operands[0]),
    )

    def store(machine: Machine, lanes: Lanes) -> None:
        where = machine.lanes(lanes)
        columns = (_column(read, machine, lanes, where) for read in (tensor_map, source))
        starts = zip(*(_column(read, machine, lanes, where) for read in start), strict=True)
        for lane, which, at, corner in zip(where.tolist(), *columns, starts, strict=True):
            machine.transfers.store_tensor(which, tuple(corner), _plain(at), lane)

    return store
