"""The contracts of the operators as C++: ``flashmla/contracts.h``, which the binding to torch is compiled with.

A contract is stated once, as a function over a `Check` (`flashmla_ops.ops.check`), and runs in Python where tensors are
fake. Eager calls do not pass there: for them the same statements are translated. For an operator with arguments
``Decode`` the header has the struct ``DecodeArguments``, whose ``call<Body>`` is what torch calls, and ``check(a)``,
which raises as Python would, or returns the shapes and dtypes of the results.

What a contract may use is what contracts use: assignments, ``if``, ``for ... in range``, checks, the arithmetic of
sizes, other such functions, and the functions of `KNOWN`. Anything else is an error here, when the kernels are built.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import json
import textwrap
import typing
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashmla_ops.ops.append import APPEND, APPEND_TWO
from flashmla_ops.ops.attend_masked import ATTEND_MASKED
from flashmla_ops.ops.check import Check
from flashmla_ops.ops.decode import DECODE
from flashmla_ops.ops.decode_backward import DECODE_BACKWARD
from flashmla_ops.ops.decode_up import DECODE_UP
from flashmla_ops.ops.gemm import BMM, GEMM
from flashmla_ops.ops.merge import MERGE_STATES
from flashmla_ops.ops.operator import Operator
from flashmla_ops.ops.pages import CHOOSE_PAGES, PAGE_MASS, SUMMARIZE
from flashmla_ops.ops.prefill import PREFILL
from flashmla_ops.ops.prefill_backward import PREFILL_BACKWARD
from flashmla_ops.ops.schedule import DECODE_SCHEDULE
from flashmla_ops.ops.sparse import SPARSE_DECODE, SPARSE_PREFILL
from flashmla_ops.ops.sparse_backward import SPARSE_PREFILL_BACKWARD
from flashmla_ops.ops.sparse_decode_backward import SPARSE_DECODE_BACKWARD

#: The name by which C++ includes it.
NAME = "flashmla/contracts.h"
#: The operators that the binding implements.
OPERATORS: tuple[Operator[Any], ...] = (
    *(DECODE, DECODE_UP, DECODE_SCHEDULE, PREFILL, APPEND, APPEND_TWO),
    *(DECODE_BACKWARD, PREFILL_BACKWARD, SPARSE_PREFILL_BACKWARD, SPARSE_DECODE_BACKWARD),
    *(SPARSE_DECODE, SPARSE_PREFILL, MERGE_STATES, GEMM, BMM, ATTEND_MASKED),
    *(SUMMARIZE, PAGE_MASS, CHOOSE_PAGES),
)
#: Functions that C++ has by hand.
KNOWN = {
    "dtype_name": "name_of",
    "lse_shape": "lse_shape",
    "row_bytes": "row_bytes",
    "row_elements": "row_elements",
    "row_tail": "row_tail",
    "schedule_numel": "flashmla_schedule_numel",
    "summary_bytes": "summary_bytes",
    "summary_planes": "summary_planes",
    "sizes_of": "sizes_of",
    "strides_of": "strides_of",
    "with_last": "with_last",
}
_TYPES: dict[Any, str] = {
    Check: "const Check&",
    Tensor: "const Tensor&",
    Tensor | None: "const std::optional<Tensor>&",
    Sequence[Tensor]: "const std::vector<Tensor>&",
    int: "int64_t",
    bool: "bool",
    str: "std::string_view",
    list[int]: "const std::vector<int64_t>&",
    float: "double",
    float | None: "std::optional<double>",
    torch.dtype: "ScalarType",
    torch.dtype | None: "std::optional<ScalarType>",
}
#: What torch passes, where it is not what a function takes.
_PASSED = {
    "const std::optional<Tensor>&": "std::optional<Tensor>",
    "const std::vector<Tensor>&": "std::vector<Tensor>",
    "std::string_view": "std::string",
}
_DTYPES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.int8: "Char",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.float8_e4m3fn: "Float8_e4m3fn",
}
_BINARY = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "/", ast.Mod: "%"}
_COMPARED = {ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="}


@functools.cache  # every library of the build has it in its key
def text() -> str:
    """The header. The same contracts give the same bytes."""
    functions: dict[str, str] = {}
    for operator in OPERATORS:
        functions = translated(operator.contract, functions)
    parts = [
        "// Generated from the contracts of flashmla_ops/ops: do not edit.",
        "#pragma once",
        '#include "flashmla/torch_checks.h"',
        "namespace flashmla {",
        *functions.values(),
        *(_struct(operator) for operator in OPERATORS),
        "}  // namespace flashmla",
    ]
    return "\n".join(parts) + "\n"


def _struct(operator: Operator[Any]) -> str:
    """The arguments of an operator in C++, and the way from torch's call to a function over them."""
    name = f"{operator.arguments.__name__}Arguments"
    types = {field: _TYPES[kind] for field, kind in typing.get_type_hints(operator.arguments).items()}
    fields = {field.name: types[field.name] for field in dataclasses.fields(operator.arguments)}
    passed = ", ".join(f"{_PASSED.get(kind, kind)} {field}" for field, kind in fields.items())
    made = name + _braced(*fields)
    outs = "".join(f", Tensor {each}" for each in operator.returns)
    tensors = {"const Tensor&": "&{}", "const std::optional<Tensor>&": "given({})"}
    inputs = [_braced(json.dumps(f), tensors[kind].format(f)) for f, kind in fields.items() if kind in tensors]
    return "\n".join(
        [
            f"struct {name} {{",
            f'  static constexpr const char* kOp = "{operator.check.op}";',
            *(f"  {kind} {field};" for field, kind in fields.items()),
            f"  std::vector<Input> tensors() const {{ return {_braced(*inputs)}; }}",
            f"  template <auto Body> static auto call({passed}) {{ return Body({made}); }}",
            f"  template <auto Body> static void call_out({passed}{outs}) {{",
            f"    Body({', '.join((made, *operator.returns))});",
            "  }",
            "};",
            f"inline auto check(const {name}& a) {{ return {_name(operator.contract)}(Check{{{name}::kOp}}, a); }}",
        ]
    )


def _braced(*items: str) -> str:
    return "{" + ", ".join(items) + "}"


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__.rpartition('.')[2]}_{function.__name__}"


def translated(function: Callable[..., Any], functions: dict[str, str] | None = None) -> dict[str, str]:
    """The C++ of a function and, before it, of those that it calls, by name, added to ``functions``.

    Raises `TypeError`, naming the statement, for what has no translation.
    """
    functions = {} if functions is None else functions
    name = _name(function)
    if name not in functions:
        functions[name] = _Function(function, functions).text()
    return functions


class _Function:
    """The translation of one function."""

    def __init__(self, function: Callable[..., Any], functions: dict[str, str]) -> None:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        self.function, self.functions, self.tree = function, functions, tree
        hints = typing.get_type_hints(function)
        self.parameters = {each.arg: hints[each.arg] for each in tree.args.args}
        self.checks = {name for name, kind in self.parameters.items() if kind is Check}
        self.locals: set[str] = set(self.parameters)
        #: Texts that a message is made of, which is made only when a check has failed.
        self.texts: dict[str, ast.expr] = {}

    def text(self) -> str:
        declared = ", ".join(self._parameter(name, kind) for name, kind in self.parameters.items())
        template = any(dataclasses.is_dataclass(kind) and kind is not Check for kind in self.parameters.values())
        body = [line for statement in self.tree.body for line in self._statement(statement)]
        head = f"inline auto {_name(self.function)}({declared}) {{"
        return "\n".join([*(["template <class Arguments>"] if template else []), head, *body, "}"])

    @staticmethod
    def _parameter(name: str, kind: Any) -> str:
        return f"{_TYPES.get(kind, 'const Arguments&')} {name}"

    def _statement(self, node: ast.stmt) -> list[str]:
        match node:
            case ast.Expr(ast.Constant()):
                return []  # the docstring
            case ast.Expr(ast.Call() as call):
                return [self._call_statement(call)]
            case ast.Assign([ast.Name(name)], ast.JoinedStr() as value):
                self.texts[name] = value
                return []
            case ast.Assign([ast.Name(name)], value):
                self.locals.add(name)
                if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "at":
                    self.checks.add(name)
                return [f"const auto& {name} = {self._value(value)};"]
            case ast.Assign([ast.Tuple(names)], value):
                return self._unpack([name.id for name in names if isinstance(name, ast.Name)], value)
            case ast.If(test, then, otherwise):
                lines = [f"if ({self._value(test)}) {{", *(x for each in then for x in self._statement(each))]
                lines += ["} else {", *(x for each in otherwise for x in self._statement(each))] if otherwise else []
                return [*lines, "}"]
            case ast.For(ast.Name(name), ast.Call(ast.Name("range"), [end]), body):
                self.locals.add(name)
                head = f"for (int64_t {name} = 0; {name} < {self._value(end)}; {name}++) {{"
                return [head, *(x for each in body for x in self._statement(each)), "}"]
            case ast.Return(ast.Tuple(values)):
                return [f"return std::array<Result, {len(values)}>{{{', '.join(map(self._value, values))}}};"]
            case ast.Return(ast.expr() as value):
                return [f"return std::array<Result, 1>{{{self._value(value)}}};"]
        raise self._error(node)

    def _unpack(self, names: list[str], value: ast.expr) -> list[str]:
        kept = [(i, name) for i, name in enumerate(names) if name != "_"]
        self.locals.update(names)
        if isinstance(value, ast.Tuple):
            return [f"const auto& {name} = {self._value(value.elts[i])};" for i, name in kept]
        if isinstance(value, ast.Attribute) and value.attr == "shape":
            return [f"const int64_t {name} = {self._value(value.value)}.size({i});" for i, name in kept]
        parts = "_".join(names)
        return [
            f"const auto& {parts} = {self._value(value)};",
            *(f"const auto& {name} = {parts}[{i}];" for i, name in kept),
        ]

    def _call_statement(self, call: ast.Call) -> str:
        if not (isinstance(call.func, ast.Attribute) and self._is_check(call.func.value)):
            return f"{self._value(call)};"
        receiver, method = self._value(call.func.value), call.func.attr
        if method == "require":
            argument, condition, expected, actual = call.args
            texts = f"{self._text(expected)}, {self._text(actual)}"
            return f"if (!({self._value(condition)})) {receiver}.fail({self._value(argument)}, {texts});"
        arguments = [self._value(each) for each in call.args]
        return f"{receiver}.{method}({', '.join(arguments)});"

    def _is_check(self, node: ast.expr) -> bool:
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Attribute) and node.func.attr == "at" and self._is_check(node.func.value)
        return isinstance(node, ast.Name) and node.id in self.checks

    def _text(self, node: ast.expr) -> str:
        """An expression as the text of a message."""
        if isinstance(node, ast.Name) and node.id in self.texts:
            node = self.texts[node.id]
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        return f"text({', '.join(self._value(each) for each in parts)})"

    def _value(self, node: ast.expr) -> str:
        """An expression; an optional argument is dereferenced."""
        if self._is_optional(node):
            return f"(*{self._plain(node)})"
        return self._plain(node)

    def _is_optional(self, node: ast.expr) -> bool:
        kind: Any = None
        if isinstance(node, ast.Name):
            kind = self.parameters.get(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = self.parameters.get(node.value.id)
            if dataclasses.is_dataclass(owner) and owner is not Check:
                kind = typing.get_type_hints(owner).get(node.attr)
        return kind in (Tensor | None, torch.dtype | None, float | None)

    def _plain(self, node: ast.expr) -> str:
        value = self._value
        match node:
            case ast.Name(name) if name in self.locals:
                return name
            case ast.Attribute(owner, "dtype"):
                return f"{value(owner)}.scalar_type()"
            case ast.Attribute(ast.Name(name), attribute) if name in self.locals:
                return f"{name}.{attribute}"
            case ast.Name() | ast.Attribute():
                return self._literal(eval(ast.unparse(node), self.function.__globals__), node)
            case ast.Constant(constant):
                return self._literal(constant, node)
            case ast.FormattedValue(inner):
                return value(inner)
            case ast.Dict(names, tensors):  # by name: what a tensor shares no memory with
                named = zip(names, tensors, strict=True)
                return _braced(*(_braced(value(name), f"&{value(each)}") for name, each in named if name is not None))
            case ast.List(elements):
                return f"std::vector<int64_t>{{{', '.join(map(value, elements))}}}"
            case ast.Subscript(owner, index):
                return f"{value(owner)}[size_t({value(index)})]"
            case ast.IfExp(test, then, otherwise):
                return f"({value(test)} ? {value(then)} : {value(otherwise)})"
            case ast.UnaryOp(ast.Not(), operand):
                return f"!({value(operand)})"
            case ast.UnaryOp(ast.USub(), operand):
                return f"-{value(operand)}"
            case ast.BoolOp(kind, operands):
                return f"({(' && ' if isinstance(kind, ast.And) else ' || ').join(map(value, operands))})"
            case ast.BinOp(left, kind, right) if type(kind) in _BINARY:
                return f"({value(left)} {_BINARY[type(kind)]} {value(right)})"
            case ast.Compare(left, [kind], [right]):
                return self._compare(left, kind, right)
            case ast.Call():
                return self._call(node)
        raise self._error(node)

    def _compare(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> str:
        match kind:
            case ast.Is():
                return f"!{self._plain(left)}"
            case ast.IsNot():
                return f"{self._plain(left)}.has_value()"
            case ast.In():
                if isinstance(right, ast.Tuple):
                    choices = [self._value(each) for each in right.elts]
                else:
                    known = eval(ast.unparse(right), self.function.__globals__)
                    choices = [self._literal(each, right) for each in known]
                return f"({' || '.join(f'{self._value(left)} == {choice}' for choice in choices)})"
        if type(kind) not in _COMPARED:
            raise self._error(left)
        return f"{self._value(left)} {_COMPARED[type(kind)]} {self._value(right)}"

    def _call(self, call: ast.Call) -> str:
        arguments = [self._value(each) for each in call.args]
        match call.func:
            case ast.Name("len"):
                return f"int64_t({arguments[0]}.size())"
            case ast.Name("Result"):
                return f"Result{{{', '.join(arguments)}}}"
            case ast.Attribute(owner, "size" | "stride" | "dim" | "is_contiguous" | "at" as method) if self._is_local(
                owner
            ):
                return f"{self._value(owner)}.{method}({', '.join(arguments)})"
        function = eval(ast.unparse(call.func), self.function.__globals__)
        if function.__name__ in KNOWN:
            return f"{KNOWN[function.__name__]}({', '.join(arguments)})"
        if inspect.getmodule(function) is None or not function.__module__.startswith("flashmla_ops.ops."):
            raise self._error(call)
        translated(function, self.functions)
        kinds = typing.get_type_hints(function)
        parameters = [kinds[each] for each in inspect.signature(function).parameters]
        passed = [
            self._plain(each) if kind == Tensor | None else value
            for each, kind, value in zip(call.args, parameters, arguments, strict=True)
        ]
        return f"{_name(function)}({', '.join(passed)})"

    def _is_local(self, node: ast.expr) -> bool:
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            node = node.value
        return isinstance(node, ast.Name) and node.id in self.locals

    def _literal(self, value: Any, node: ast.AST) -> str:
        if isinstance(value, bool):
            return "true" if value else "false"
        if value is None:
            return "std::nullopt"
        if isinstance(value, int):
            return f"int64_t{{{value}}}"
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, str):
            return json.dumps(value)
        if value in _DTYPES:
            return f"ScalarType::{_DTYPES[value]}"
        raise self._error(node)

    def _error(self, node: ast.AST) -> TypeError:
        what = f"{self.function.__module__}.{self.function.__name__}: {ast.unparse(node)}"
        return TypeError(f"a contract that has no translation to C++: {what}")
