"""A kernel translated: its blocks as lists of steps, and how the machine runs one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cutlass_kernels.emulator import ops
from cutlass_kernels.emulator.errors import UnsupportedInstruction
from cutlass_kernels.emulator.layout import Layout
from cutlass_kernels.emulator.machine.clocks import Ints
from cutlass_kernels.emulator.machine.machine import Machine
from cutlass_kernels.emulator.machine.scheduler import WARP, Lanes
from cutlass_kernels.emulator.options import Site
from cutlass_kernels.emulator.ptx.flow import Block, blocks_of, is_alone, member_mask, targets
from cutlass_kernels.emulator.ptx.syntax import Instruction, Kernel, Module, Register, Vector
from cutlass_kernels.emulator.registry import rule_for
from cutlass_kernels.emulator.steps import Step
from cutlass_kernels.emulator.translate import Translator

ops.load()


@dataclass
class _Compiled:
    block: Block
    steps: list[tuple[Instruction, Step]]
    kinds: Counter[str]
    #: Whether the last step leaves the lanes to the block, which hands them on to the following one.
    falls: bool = True


class Program:
    """``drop``: synchronising instructions that are left out. Raises `UnsupportedInstruction`."""

    def __init__(self, kernel: Kernel, module: Module, drop: frozenset[Site] = frozenset()) -> None:
        self.kernel, self.layout = kernel, Layout(kernel, module)
        blocks, labels = blocks_of(kernel)
        self._drop = {site.line for site in drop if site.kernel == kernel.name}
        translator = Translator(self.layout, _product_registers(kernel))
        self._time_outs = translator.time_outs
        self.blocks = [self._compile(number, block, labels, translator) for number, block in enumerate(blocks)]

    def _compile(self, number: int, block: Block, labels: dict[int, int], translator: Translator) -> _Compiled:
        compiled = _Compiled(block, [], Counter())
        translator.block, translator.following = number, block.following if block.following is not None else -1
        for item in block.instructions:
            rule = rule_for(item)
            translator.at = item
            compiled.kinds[rule.kind] += 1
            if item.line in self._drop and rule.waits:
                if (left := ops.dropped(translator, item)) is not None:
                    compiled.steps.append((item, left))
                continue
            try:
                translator.target = targets(item, labels) if item.opcode[0] == "bra" else -1
                step = rule.build(translator, item)
            except (LookupError, TypeError, ValueError, AttributeError, AssertionError, StopIteration) as error:
                raise UnsupportedInstruction(f"{rule.name} with these operands", item.line, item.text) from error
            if rule.waits:
                step = self._noting(step, item)
            control = rule.control and (member_mask(item) is None or is_alone(item))
            compiled.steps.append((item, self._guarded(step, item, control, translator)))
            if control:
                compiled.falls = False
        return compiled

    def _noting(self, step: Step, item: Instruction) -> Step:
        site = Site(self.kernel.name, item.line, item.text)

        def noting(machine: Machine, lanes: Lanes) -> None:
            machine.sites.add(site)
            step(machine, lanes)

        return noting

    def _guarded(self, step: Step, item: Instruction, control: bool, translator: Translator) -> Step:
        """Only the lanes whose guard holds execute; at a jump the others go on to the following block."""
        if item.guard is None:
            return step
        guard, following = translator.predicate(item.guard, "a condition"), translator.following

        def guarded(machine: Machine, lanes: Lanes) -> None:
            holds = guard(machine, lanes)
            if holds.all():
                step(machine, lanes)
                return
            everyone = machine.lanes(lanes)
            if holds.any():
                step(machine, everyone[holds])
            if control:
                machine.scheduler.push(following, everyone[~holds])

        return guarded

    # For the scheduler

    def gathers(self, block: int) -> int:
        """How many threads make up the groups that must enter a block together; 0: any may."""
        return self.blocks[block].block.gather

    def first(self, block: int) -> Instruction:
        """The first instruction of a block."""
        return self.blocks[block].block.instructions[0]

    def time_out(self, machine: Machine, block: int, lanes: Ints) -> None:
        """Lanes that wait in front of a block wait no longer: their wait fails."""
        self._time_outs[block](machine, lanes)

    def run_block(self, machine: Machine) -> Callable[[int, Lanes], None]:
        """Executes a block and hands its lanes on."""
        blocks = self.blocks
        executed = machine.executed = np.zeros(len(blocks), np.int64)
        all_warps = machine.n // WARP
        hazards, taint = machine.hazards, machine.taint

        def run(number: int, lanes: Lanes) -> None:
            block = blocks[number]
            executed[number] += all_warps if lanes is None else _warps(lanes)
            for item, step in block.steps:
                hazards.at = item
                if taint.marks:
                    taint.begin()
                step(machine, lanes)
            if not block.falls:
                return
            if block.block.following is None:
                machine.exit(lanes)
            else:
                machine.scheduler.push(block.block.following, lanes)

        return run

    def count(self, machine: Machine) -> Counter[str]:
        """Warp instructions that a machine executed, by class."""
        total: Counter[str] = Counter()
        for block, times in zip(self.blocks, machine.executed.tolist(), strict=True):
            for kind, number in block.kinds.items():
                total[kind] += number * times
        return total


def _warps(lanes: Ints) -> int:
    warps = lanes // WARP
    return int((warps[1:] != warps[:-1]).sum()) + 1


def _product_registers(kernel: Kernel) -> frozenset[int]:
    """Registers that are operands of wgmma: accumulators, and A where it comes from registers."""
    found: set[int] = set()
    for item in kernel.body:
        if isinstance(item, Instruction) and item.opcode[:2] == ("wgmma", "mma_async"):
            for operand in item.operands[:2]:
                if isinstance(operand, Vector):
                    found.update(register.index for register in operand.items if isinstance(register, Register))
    return frozenset(found)
