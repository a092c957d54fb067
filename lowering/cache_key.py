"""Facts that compiled code depends on besides the graph, as part of every cache key of torch.compile.

Inductor's caches know the graph, the configuration and torch's own sources. They do not know lowerings: with a changed
lowering they would return the old kernel. So a hash of our sources, the instruction set that the library runs, and
generated kernels with it, and the settings in force are appended to ``torch.compiler.config.cache_key_tag``, and
whatever stands in it stays there.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import torch

from flashmla_ops import cpu
from flashmla_ops.cpu import build

SOURCES = Path(__file__).parent


@functools.cache
def source_hash() -> str:
    """A hash of everything that decides what is generated: this package, and the C++ that templates include."""
    digest = hashlib.sha256(torch.__version__.encode())
    for root in (SOURCES, build.CSRC):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".h", ".cpp")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def extended_tag(tag: str, settings: object) -> str:
    """``tag`` with our part appended, once however often it is asked for."""
    ours = f"flashmla-{source_hash()}-{cpu.STATE.active}-{settings}"
    parts = [part for part in tag.split("+") if part and part != ours]
    return "+".join([*parts, ours])
