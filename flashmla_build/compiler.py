"""The machine's own C++ compiler: finding it, and running it or another one."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

NAMES = ("g++", "c++", "clang++")


def compiler(error: type[Exception]) -> list[str]:
    """The C++ compiler as a command: $CXX, or the first of `NAMES` on PATH. Raises ``error`` if there is none."""
    wanted = os.environ.get("CXX", "").strip()
    if not wanted:
        if found := next(filter(None, map(shutil.which, NAMES)), None):
            return [found]
        raise error(f"no C++ compiler found: none of {', '.join(NAMES)} is on PATH; install g++ or set CXX")
    try:
        command = shlex.split(wanted)  # with arguments: "ccache g++"
    except ValueError:
        command = [wanted]
    if shutil.which(command[0]) is None:
        raise error(f"CXX={wanted} names nothing that runs: set it to a C++ compiler, or unset it to use PATH's")
    return command


def run(command: Sequence[str], scratch: Path) -> subprocess.CompletedProcess[str]:
    """Run a compiler, with its temporary files in a folder that is known to be writable.

    The caller looks at the exit status. Raises `OSError` where the command does not start.
    """
    environment = {**os.environ, "TMPDIR": str(scratch)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
