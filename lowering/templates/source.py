"""The library's headers as text to put in front of a generated kernel.

Generated code holds everything it is made of: it can be cached by its text, moved to another machine, and packaged by
AOTInductor for a process in which this library does not exist.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from flashmla_ops.cpu import build
from flashmla_ops.formats import header as formats

HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(?P<name>flashmla/[^"]+)"$', re.MULTILINE)
_COMMENT = re.compile(r"^\s*//.*\n", re.MULTILINE)


@functools.cache
def header(name: str) -> str:
    """A header of this folder with every header of ours that it includes written out, each guarded by its name."""
    return _written_out(name, (HERE / name).read_text())


def _written_out(name: str, text: str) -> str:
    """``name``: as it is included."""
    guard = "FLASHMLA_GENERATED_" + re.sub(r"\W", "_", name).upper()
    text = _COMMENT.sub("", text).replace("#pragma once\n", "").strip("\n")
    text = _INCLUDE.sub(lambda found: _written_out(found["name"], _text(found["name"])).strip("\n"), text)
    return f"#ifndef {guard}\n#define {guard}\n{text}\n#endif  // {guard}\n"


def _text(name: str) -> str:
    """A header of the library, or one that its build generates."""
    generated = formats.generated()
    return generated[name] if name in generated else (build.CSRC / name).read_text()
