"""PTX text to the syntax tree, in the subset that compilers emit: ``.entry`` kernels without calls of their own
functions.

Reference: the PTX ISA manual, chapters "Syntax" and "Directives". Statements are first cut at ``;``, braces and labels
while scopes are recorded; instructions are parsed in a second pass, when every label and register of a scope is known.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cutlass_kernels.emulator.errors import PtxSyntaxError
from cutlass_kernels.emulator.ptx import types
from cutlass_kernels.emulator.ptx.operands import LineIndex, OperandParser, look_up, split_top_level
from cutlass_kernels.emulator.ptx.syntax import Instruction, Kernel, Module, Parameter, Register, Variable

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_NOISE = re.compile(r"^[ \t]*(?:\.loc|\.file)\b[^\n]*|^[ \t]*\.section\b[^{]*\{[^}]*\}", re.MULTILINE)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
_FUNC = re.compile(r"\.func\b[^{;]*[{;]")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")
_VARIABLE = re.compile(
    r"\.(?P<space>shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"(?:\.v(?P<vector>[248])\s+)?\.(?P<type>\w+)\s+(?P<name>[\w$]+)"
    r"(?P<array>(?:\s*\[\d*\])*)\s*(?:=\s*(?P<value>.*))?$",
    re.DOTALL,
)
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.(?:global|const|shared|local)\s+)?"
    r"(?:\.align\s+\d+\s+)?)?([\w$]+)\s*(?:\[(\d+)\])?"
)
_GUARD = re.compile(r"@(!?)\s*([%\w$]+)\s+")


@dataclass
class _Scope:
    """A brace-delimited block: its registers and labels, and the scope around it."""

    parent: _Scope | None = None
    registers: dict[str, int] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Module:
    """Parse a PTX module. Raises `PtxSyntaxError` with the line that is not understood."""
    code = _NOISE.sub(_blank, _COMMENT.sub(_blank, text))
    target = re.search(r"\.target\s+(\w+)", code)
    version = re.search(r"\.version\s+([\d.]+)", code)
    module = Module(target[1] if target else "", version[1] if version else "", text=text)
    lines = text.split("\n")
    cursor = 0
    while True:
        entry, function = _ENTRY.search(code, cursor), _FUNC.search(code, cursor)
        nearest = min((m for m in (entry, function) if m), key=lambda m: m.start(), default=None)
        _module_scope(module, code[cursor : nearest.start() if nearest else len(code)])
        if nearest is None:
            return module
        if nearest[0].endswith(";"):
            cursor = nearest.end()
            continue
        end = _closing_brace(code, nearest.end())
        if nearest is entry:
            kernel = _kernel(nearest, code, lines)
            _Body(kernel, module, code, lines).parse(nearest.end(), end)
            module.kernels[kernel.name] = kernel
        cursor = end + 1


def _blank(match: re.Match[str]) -> str:
    """Spaces for the text of a comment, so that line numbers stay."""
    return re.sub(r"[^\n]", " ", match[0])


def _closing_brace(code: str, start: int) -> int:
    depth = 1
    for brace in re.finditer(r"[{}]", code[start:]):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return start + brace.start()
    raise PtxSyntaxError("a '{' is never closed", code.count("\n", 0, start) + 1)


def _module_scope(module: Module, code: str) -> None:
    for statement in code.split(";"):
        found = _VARIABLE.search(statement.strip())
        if found:
            variable = _variable(found)
            module.variables[variable.name] = variable


def _variable(found: re.Match[str]) -> Variable:
    count = int(found["vector"] or 1)
    for extent in re.findall(r"\[(\d*)\]", found["array"]):
        count *= int(extent or 0)
    width = types.bits(found["type"]) // 8
    return Variable(
        found["name"], found["space"], width * count, int(found["align"] or width), _initial(found["value"], width)
    )


def _initial(value: str | None, width: int) -> bytes:
    if not value:
        return b""
    items = re.findall(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|-?0[xX][0-9a-fA-F]+|-?\d+|[A-Za-z_$][\w$]*", value)
    if any(re.match(r"[A-Za-z_$]", item) for item in items):
        raise PtxSyntaxError(f"an initialiser that takes an address is not supported: {value.strip()[:80]}")
    numbers = [int(item[2:], 16) if item[1:2] in ("f", "F", "d", "D") else int(item, 0) for item in items]
    return b"".join((n & ((1 << 8 * width) - 1)).to_bytes(width, "little") for n in numbers)


def _kernel(entry: re.Match[str], code: str, lines: list[str]) -> Kernel:
    parameters, offset = [], 0
    for align, kind, name, count in _PARAMETER.findall(entry[2] or ""):
        width = types.bits(kind) // 8
        boundary = int(align or width)
        offset = -(-offset // boundary) * boundary
        parameters.append(Parameter(name, offset, width * int(count or 1)))
        offset += parameters[-1].size
    kernel = Kernel(entry[1], tuple(parameters), line=code.count("\n", 0, entry.start()) + 1)
    kernel.cluster = _triple(r"\.reqnctapercluster\s+([\d,\s]+)", entry[3])
    kernel.max_threads = _triple(r"\.maxntid\s+([\d,\s]+)", entry[3]) or _triple(r"\.reqntid\s+([\d,\s]+)", entry[3])
    kernel.max_registers = _number(r"\.maxnreg\s+(\d+)", entry[3])
    kernel.min_blocks = _number(r"\.minnctapersm\s+(\d+)", entry[3])
    return kernel


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text)
    return int(found[1]) if found else None


def _triple(pattern: str, text: str) -> tuple[int, int, int] | None:
    found = re.search(pattern, text)
    if not found:
        return None
    sizes = [int(size) for size in found[1].replace(" ", "").strip().strip(",").split(",")]
    x, y, z = (*sizes, 1, 1)[:3]
    return x, y, z


class _Body:
    """Parses the statements between the braces of one kernel."""

    def __init__(self, kernel: Kernel, module: Module, code: str, lines: list[str]) -> None:
        self.kernel, self.module, self.code, self.lines = kernel, module, code, lines
        self.index = LineIndex(code)
        self.scope = _Scope()
        # (position, end, scope) of an instruction, or the number of a label.
        self.statements: list[tuple[int, int, _Scope] | int] = []

    def parse(self, start: int, end: int) -> None:
        self._cut(start, end)
        operands = OperandParser(self.kernel)
        for statement in self.statements:
            if isinstance(statement, int):
                self.kernel.body.append(statement)
            else:
                self.kernel.body.append(self._instruction(*statement, operands))

    def _cut(self, start: int, end: int) -> None:
        code, position = self.code, start
        blank = re.compile(r"[\s;]*")
        while True:
            skipped = blank.match(code, position)
            position = skipped.end() if skipped else position
            if position >= end:
                return
            if code[position] == "{":
                self.scope, position = _Scope(self.scope), position + 1
            elif code[position] == "}":
                if self.scope.parent is None:
                    raise self._error("a '}' too many", position)
                self.scope, position = self.scope.parent, position + 1
            elif label := _LABEL.match(code, position):
                self.scope.labels[label[1]] = self.kernel.labels
                self.statements.append(self.kernel.labels)
                self.kernel.labels += 1
                position = label.end()
            else:
                stop = code.find(";", position, end)
                if stop < 0:
                    raise self._error("a statement without ';'", position)
                if code[position] == ".":
                    self._directive(code[position:stop], position)
                else:
                    self.statements.append((position, stop, self.scope))
                position = stop + 1

    def _directive(self, text: str, position: int) -> None:
        word = text.split(None, 1)[0]
        if word == ".reg":
            self._registers(text, position)
        elif word in (".shared", ".local"):
            found = _VARIABLE.match(" ".join(text.split()))
            if not found:
                raise self._error("a variable declaration", position)
            self.kernel.variables.append(_variable(found))
        elif word not in (".param", ".pragma"):
            raise self._error(f"the directive {word}", position)

    def _registers(self, text: str, position: int) -> None:
        found = re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if not found or not types.is_type(found[1]):
            raise self._error("a register declaration", position)
        for item in found[2].split(","):
            name, _, count = item.strip().partition("<")
            names = [f"{name}{n}" for n in range(int(count.rstrip("> ")))] if count else [name]
            for each in names:
                self.scope.registers[each] = len(self.kernel.registers)
                self.kernel.registers.append((each, found[1]))

    def _instruction(self, start: int, end: int, scope: _Scope, operands: OperandParser) -> Instruction:
        line = self.index.at(start)
        text = " ".join(self.code[start:end].split())
        rest, guard = text, None
        if found := _GUARD.match(text):
            guard = self._register(found[2], scope, start)
            guard = Register(guard.index, guard.type, negated=bool(found[1]))
            rest = text[found.end() :]
        opcode, _, tail = rest.partition(" ")
        try:
            parsed = tuple(
                operands.parse(item, scope, branch=opcode.startswith("bra")) for item in split_top_level(tail)
            )
        except (KeyError, ValueError) as error:
            raise PtxSyntaxError(f"an operand is not understood: {error}", line, self.lines[line - 1]) from error
        return Instruction(tuple(opcode.split(".")), parsed, guard, line, text)

    def _register(self, name: str, scope: _Scope, position: int) -> Register:
        try:
            index = look_up(name, scope, "registers")
        except KeyError:
            raise self._error(f"an undeclared register {name}", position) from None
        return Register(index, self.kernel.registers[index][1])

    def _error(self, what: str, position: int) -> PtxSyntaxError:
        line = self.index.at(position)
        return PtxSyntaxError(f"the parser stopped at {what}", line, self.lines[line - 1])
