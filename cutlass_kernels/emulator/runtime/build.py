"""Compiles the mock runtime once for each name of libcudart, into the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import re
from functools import partial
from pathlib import Path

from cutlass_kernels.emulator.errors import RuntimeUnavailable
from flashmla_build import Store, compiler, run

STORE = Store("emulator", "the emulator's runtime", RuntimeUnavailable)
SOURCE = Path(__file__).with_name("mock.cpp")
#: Its functions call each other (-Bsymbolic), never those of a libcudart that torch has loaded.
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Wl,-Bsymbolic")
_NEEDED = re.compile(rb"\0(libcudart\.so\.[0-9.]+)\0")


def needed(library: Path) -> str:
    """The name under which a library asks for libcudart. Raises `RuntimeUnavailable` if it brings its own."""
    found = _NEEDED.search(library.read_bytes())
    if not found:
        raise RuntimeUnavailable(f"{library} does not ask for libcudart: build it with nvcc -cudart shared")
    return found[1].decode()


def build(soname: str) -> Path:
    """The mock under a SONAME, from the cache or compiled now. Raises `RuntimeUnavailable`."""
    command = [*compiler(RuntimeUnavailable), *_FLAGS]
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), soname.encode(), repr(command).encode()]))
    target = STORE.root() / f"mock-{key.hexdigest()[:16]}.so"
    return STORE.once(target, partial(_compile, command, soname))


def _compile(command: list[str], soname: str, scratch: Path) -> Path:
    versions, made = scratch / "versions", scratch / "mock.so"
    versions.write_text(f"{soname} {{ global: *; }};\n")
    link = (f"-Wl,-soname,{soname}", f"-Wl,--version-script,{versions}")
    command = [*command, *link, "-o", str(made), str(SOURCE)]
    done = run(command, scratch)
    if done.returncode:
        raise RuntimeUnavailable(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return made


def load(soname: str) -> ctypes.CDLL:
    """Load the mock into this process; libraries loaded later find it by its SONAME."""
    return ctypes.CDLL(str(build(soname)), mode=ctypes.RTLD_LOCAL)
