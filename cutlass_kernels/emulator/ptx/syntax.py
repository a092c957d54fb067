"""The syntax tree of a PTX module, names already resolved: registers by number, symbols and labels by scope."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Register:
    """A virtual register; ``negated`` for ``!p``."""

    index: int
    type: str
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """A read-only special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True, slots=True)
class Immediate:
    """A literal. ``kind``: "int", "f32" or "f64"; the value of a float is its bit pattern."""

    kind: str
    value: int


@dataclass(frozen=True, slots=True)
class Symbol:
    """The address of a variable, parameter or function, plus a byte offset."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """``[base + offset]``; ``coordinates`` of a tensor access ``[base, {c0, c1}]``."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Vector:
    """``{a, b, ...}``."""

    items: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """``d|p``: a destination and a predicate destination; a part written ``_`` is None."""

    first: Operand | None
    second: Operand | None


@dataclass(frozen=True, slots=True)
class Sink:
    """``_``: a destination that is thrown away."""


@dataclass(frozen=True, slots=True)
class Label:
    """A branch target: the number of a label of its kernel."""

    index: int


Operand = Register | Special | Immediate | Symbol | Address | Vector | Pair | Sink | Label


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. ``opcode`` is split at its dots; ``line`` (1-based) and ``text`` are those of the PTX."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    text: str

    @property
    def name(self) -> str:
        """The opcode with its dots."""
        return ".".join(self.opcode)


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable in some state space: ``size`` and ``align`` in bytes, ``initial`` its first bytes (module scope)."""

    name: str
    space: str
    size: int
    align: int
    initial: bytes = b""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A kernel parameter at a byte offset in the parameter block."""

    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    """One ``.entry``. ``body`` holds instructions, and label numbers where they stand."""

    name: str
    parameters: tuple[Parameter, ...]
    registers: list[tuple[str, str]] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | int] = field(default_factory=list)
    labels: int = 0
    cluster: tuple[int, int, int] | None = None
    max_threads: tuple[int, int, int] | None = None
    max_registers: int | None = None
    min_blocks: int | None = None
    line: int = 0

    @property
    def parameter_bytes(self) -> int:
        """Size of the parameter block."""
        last = self.parameters[-1] if self.parameters else None
        return last.offset + last.size if last else 0


@dataclass
class Module:
    """A parsed PTX file."""

    target: str
    version: str
    kernels: dict[str, Kernel] = field(default_factory=dict)
    variables: dict[str, Variable] = field(default_factory=dict)
    text: str = ""
