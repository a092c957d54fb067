"""The constants of all formats as C++: ``flashmla/formats.h``, which every compilation of the kernels is given."""

from __future__ import annotations

from collections.abc import Iterable

from flashmla_ops.formats import QUANTIZED
from flashmla_ops.formats.row_format import RowFormat

#: The name by which C++ includes it.
NAME = "flashmla/formats.h"


def text() -> str:
    """The header. The same formats give the same bytes."""
    formats = QUANTIZED.values()
    parts = [
        "// Generated from flashmla_ops/formats: do not edit.",
        "#pragma once",
        "#include <cstdint>",
        *(_layout(each) for each in formats),
        "namespace flashmla {\nstruct RowFormat {\n  const char* name;\n  int64_t elements, bytes, tail;\n};",
        "// By number; 0 is native.",
        f"constexpr RowFormat kRowFormats[] = {{{_table(formats)}}};",
        "}  // namespace flashmla",
        "// X(number, struct) for each quantised format.",
        f"#define FLASHMLA_QUANTIZED_FORMATS(X) {' '.join(f'X({i}, {each.cpp})' for i, each in enumerate(formats, 1))}",
    ]
    return "\n".join(parts) + "\n"


def includes() -> str:
    """The C++ codecs of all formats: ``flashmla/format_codecs.h``."""
    lines = [f'#include "flashmla/formats/{name}.h"' for name in QUANTIZED]
    return "\n".join(["// Generated from flashmla_ops/formats: do not edit.", "#pragma once", *lines]) + "\n"


def generated() -> dict[str, str]:
    """Every generated header by the name that it is included by."""
    return {NAME: text(), "flashmla/format_codecs.h": includes()}


def _layout(each: RowFormat) -> str:
    numbers = {"elements": each.elements, "bytes": each.bytes, "tail": each.tail, **each.constants()}
    lines = [f"  static constexpr int64_t {name} = {value};" for name, value in numbers.items()]
    return "\n".join(["namespace flashmla {", f"struct {each.cpp}Layout {{", *lines, "};", "}  // namespace flashmla"])


def _table(formats: Iterable[RowFormat]) -> str:
    rows = [f'{{"{each.name}", {each.elements}, {each.bytes}, {each.tail}}}' for each in formats]
    return ", ".join(['{"native", 0, 0, 0}', *rows])
