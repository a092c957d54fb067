"""The library's headers as text to put in front of a generated kernel.

Generated code holds everything it is made of: it can be cached by its text, moved to another machine, and packaged by
AOTInductor for a process in which this library does not exist.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from flashmla_ops.cpu import build

HERE = Path(__file__).parent
_INCLUDE = re.compile(r'^#include "(?P<name>flashmla/[^"]+)"$', re.MULTILINE)
_COMMENT = re.compile(r"^\s*//.*\n", re.MULTILINE)


@functools.cache
def header(name: str) -> str:
    """A header of this folder with every header of ours that it includes written out, each guarded by its name."""
    return _written_out(HERE / name)


def _written_out(path: Path) -> str:
    guard = "FLASHMLA_GENERATED_" + re.sub(r"\W", "_", path.name if path.parent == HERE else _name(path)).upper()
    text = _COMMENT.sub("", path.read_text()).replace("#pragma once\n", "").strip("\n")
    text = _INCLUDE.sub(lambda found: _written_out(build.CSRC / found["name"]).strip("\n"), text)
    return f"#ifndef {guard}\n#define {guard}\n{text}\n#endif  // {guard}\n"


def _name(path: Path) -> str:
    return path.relative_to(build.CSRC).as_posix()
