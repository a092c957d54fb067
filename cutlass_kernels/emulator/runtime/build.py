"""Compiles the mock runtime once for each name of libcudart, into the user's cache folder."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from cutlass_kernels.cache import cache_root
from cutlass_kernels.emulator.errors import RuntimeUnavailable
from cutlass_kernels.errors import BuildError

SOURCE = Path(__file__).with_name("mock.cpp")
_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra")
_NEEDED = re.compile(rb"\0(libcudart\.so\.[0-9.]+)\0")


def needed(library: Path) -> str:
    """The name under which a library asks for libcudart. Raises `RuntimeUnavailable` if it brings its own."""
    found = _NEEDED.search(library.read_bytes())
    if not found:
        raise RuntimeUnavailable(f"{library} does not ask for libcudart: build it with nvcc -cudart shared")
    return found[1].decode()


def compiler() -> str:
    """$CXX or the first C++ compiler on PATH. Raises `RuntimeUnavailable`."""
    wanted = os.environ.get("CXX")
    path = next(filter(None, map(shutil.which, [wanted] if wanted else ["g++", "c++", "clang++"])), None)
    if path is None:
        why = f"CXX={wanted} names nothing that runs" if wanted else "install g++ or set CXX"
        raise RuntimeUnavailable(f"the mock CUDA runtime needs a C++ compiler: {why}")
    return path


def build(soname: str) -> Path:
    """The mock under a SONAME, from the cache or compiled now. Raises `RuntimeUnavailable`."""
    cxx = compiler()
    key = hashlib.sha256(b"\0".join([SOURCE.read_bytes(), soname.encode(), cxx.encode(), repr(_FLAGS).encode()]))
    try:
        folder = cache_root("emulator")
    except BuildError as error:
        raise RuntimeUnavailable(str(error)) from error
    target = folder / f"mock-{key.hexdigest()[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _compile(cxx, soname, folder, target)
    return target


def _compile(cxx: str, soname: str, folder: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        versions, made = Path(scratch) / "versions", Path(scratch) / "mock.so"
        versions.write_text(f"{soname} {{ global: *; }};\n")
        link = (f"-Wl,-soname,{soname}", f"-Wl,--version-script,{versions}")
        command = [cxx, *_FLAGS, *link, "-o", str(made), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeUnavailable(f"{' '.join(command)}\n{done.stderr[-2000:]}")
        made.replace(target)


def load(soname: str) -> ctypes.CDLL:
    """Load the mock into this process; libraries loaded later find it by its SONAME."""
    return ctypes.CDLL(str(build(soname)), mode=ctypes.RTLD_LOCAL)
