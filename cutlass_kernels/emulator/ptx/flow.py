"""Basic blocks. A block is what all of its threads execute without waiting for one another.

An instruction at which threads may have to wait stands alone in its block, so that a thread can stop there and come
back: barriers, mbarrier waits, changes of registers, and warp-wide instructions whose member mask is not known before
it runs. A block with any other warp-wide instruction is entered by whole warps only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cutlass_kernels.emulator.ptx.syntax import Immediate, Instruction, Kernel, Label

#: Instructions of whole warps: every thread of the warp executes them together.
_ALIGNED = ("mma", "ldmatrix", "stmatrix", "movmatrix")
#: Operand that holds the member mask of the ``.sync`` instructions with one.
_MASK_OPERAND = {"shfl": 4, "vote": 2, "match": 2, "redux": 2, "elect": 1, "bar.warp": 0}
_ALL_LANES = (0xFFFFFFFF, -1)


@dataclass
class Block:
    """``following``: the block that control falls into.

    ``gather``: only whole groups of as many threads may enter: warps (32) or warpgroups (128); 0 where any may.
    """

    instructions: list[Instruction] = field(default_factory=list)
    following: int | None = None
    gather: int = 0


def member_mask(instruction: Instruction) -> int | None:
    """Index of the operand with the member mask of a warp-wide instruction, or None."""
    name = "bar.warp" if instruction.opcode[:2] == ("bar", "warp") else instruction.opcode[0]
    return _MASK_OPERAND.get(name) if "sync" in instruction.opcode else None


def is_cta_barrier(instruction: Instruction) -> bool:
    """bar and barrier, in a CTA or a cluster, but not bar.warp."""
    return instruction.opcode[0] in ("bar", "barrier") and "warp" not in instruction.opcode


def is_alone(instruction: Instruction) -> bool:
    """Whether threads may have to stop at the instruction."""
    if is_cta_barrier(instruction):
        return True
    if instruction.opcode[:2] == ("mbarrier", "try_wait") or instruction.opcode[0] == "setmaxnreg":
        return True
    position = member_mask(instruction)
    if position is None or instruction.guard is not None:
        return False
    mask = instruction.operands[position]
    return not (isinstance(mask, Immediate) and mask.value in _ALL_LANES)


def ends_block(instruction: Instruction) -> bool:
    """A jump or an exit."""
    return instruction.opcode[0] in ("bra", "brx", "ret", "exit")


def blocks_of(kernel: Kernel) -> tuple[list[Block], dict[int, int]]:
    """The blocks in the order of the text, and the block of each label.

    Text order is also the order in which divergent threads are run: compilers place a loop before what follows it, so
    that threads which leave early wait where the others will join them.
    """
    blocks, labels = [Block()], {}

    def start() -> None:
        if blocks[-1].instructions:
            blocks[-1].following = len(blocks)
            blocks.append(Block())

    for item in kernel.body:
        if isinstance(item, int):
            start()
            labels[item] = len(blocks) - 1
            continue
        alone = is_alone(item)
        if alone:
            start()
        blocks[-1].instructions.append(item)
        blocks[-1].gather = max(blocks[-1].gather, _gathers(item))
        if alone or ends_block(item):
            start()
    return blocks, labels


def _gathers(instruction: Instruction) -> int:
    if instruction.opcode[0] in ("wgmma", "setmaxnreg"):
        return 128
    if instruction.opcode[0] in _ALIGNED:
        return 32
    return 32 if member_mask(instruction) is not None and instruction.guard is None and not is_alone(instruction) else 0


def targets(instruction: Instruction, labels: dict[int, int]) -> int:
    """The block that a branch jumps to."""
    label = instruction.operands[0]
    assert isinstance(label, Label)
    return labels[label.index]
