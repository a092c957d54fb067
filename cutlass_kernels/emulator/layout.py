"""Where a kernel's variables lie: static and dynamic shared memory, local memory, parameters."""

from __future__ import annotations

from cutlass_kernels.emulator.ptx.syntax import Kernel, Module, Variable


def _place(variables: list[Variable]) -> tuple[dict[str, int], int]:
    offsets, top = {}, 0
    for variable in variables:
        top = -(-top // variable.align) * variable.align
        offsets[variable.name] = top
        top += variable.size
    return offsets, top


class Layout:
    """Byte offsets of the names of one kernel. Dynamic shared memory follows the static one."""

    #: Dynamic shared memory is aligned as tensor copies with a 128-byte swizzle need it.
    DYNAMIC_ALIGNMENT = 1024

    def __init__(self, kernel: Kernel, module: Module) -> None:
        shared = [v for v in (*module.variables.values(), *kernel.variables) if v.space == "shared"]
        self.shared, static = _place([v for v in shared if v.size])
        self.dynamic_start = -(-static // self.DYNAMIC_ALIGNMENT) * self.DYNAMIC_ALIGNMENT
        self.shared |= {v.name: self.dynamic_start for v in shared if not v.size}
        self.local, self.local_bytes = _place([v for v in kernel.variables if v.space == "local"])
        self.parameters = {p.name: p.offset for p in kernel.parameters}
        self.globals = {v.name for v in module.variables.values() if v.space in ("global", "const")}
        self._static = static

    def shared_bytes(self, dynamic: int) -> int:
        """Shared memory of a CTA that was launched with ``dynamic`` bytes."""
        return self.dynamic_start + dynamic if dynamic else self._static
