"""Compile the C++ kernels with the machine's own compiler, once, into a cache that every process shares.

The cache folder is named by a hash of the sources, the compiler, torch's version and the Python ABI, so a stale library
is never loaded. Processes that build at once wait for one another on a file lock; a library appears by atomic rename.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashmla_ops.errors import BuildError

CSRC = Path(__file__).parent / "csrc"
#: By binding, the better one first.
LIBRARIES = {"stable ABI": "flashmla_cpu.so", "ctypes": "flashmla_cpu_ctypes.so"}
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-psabi")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-maybe-uninitialized")
_X86 = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Unit:
    """One translation unit: a source compiled with flags of its own."""

    source: str
    flags: tuple[str, ...] = ("-O2",)
    name: str = field(default="")

    @property
    def object_name(self) -> str:
        return f"{self.name or Path(self.source).stem}.o"


def _kernels(isa: str, *flags: str) -> Unit:
    return Unit("kernels.cpp", (f"-DFLASHMLA_ISA={isa}", *flags), name=f"kernels_{isa}")


#: kernels.cpp once for each instruction set. `emulated` runs the AVX-512 BF16 layouts anywhere, slowly.
KERNEL_UNITS = (
    _kernels("generic", "-O3"),
    _kernels("emulated", "-O1", "-DFLASHMLA_EMULATE"),
    *(
        (
            _kernels("avx2", "-O3", *_AVX2),
            _kernels("avx512", "-O3", *_AVX512),
            _kernels("avx512_bf16", "-O3", *_AVX512, "-mavx512bf16"),
        )
        if _X86
        else ()
    ),
)
CORE_UNITS = (
    *(Unit(f"{name}.cpp") for name in ("dispatch", "decode", "decode_up", "prefill", "append", "gemm")),
    Unit("append_quantized.cpp", ("-O3",)),
)
#: What registers the kernels with torch; a build without them is reached through ctypes.
BINDING_UNITS = tuple(
    Unit(f"{name}.cpp")
    for name in ("torch_attention", "torch_attend_masked", "torch_decode_up", "torch_gemm", "requires_grad")
)


@dataclass(frozen=True)
class Built:
    """A compiled library. ``binding`` is "stable ABI" if it registers itself with torch, else "ctypes"."""

    path: Path
    binding: str


def compiler() -> str | None:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++ on PATH; None if there is none."""
    wanted = os.environ.get("CXX")
    names = [wanted] if wanted else ["g++", "c++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _compiler_version(cxx: str) -> str:
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout.split("\n")[0]


def key(cxx: str) -> str:
    """What a library depends on, hashed."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp")):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    units = (*KERNEL_UNITS, *CORE_UNITS, *BINDING_UNITS)
    facts = (torch.__version__, sysconfig.get_config_var("SOABI"), platform.machine(), _compiler_version(cxx))
    digest.update(repr((facts, COMMON_FLAGS, units)).encode())
    return digest.hexdigest()[:16]


def cache_root() -> Path:
    """$FLASHMLA_CACHE, else the user's cache folder; a folder under the temporary one if that cannot be written."""
    override = os.environ.get("FLASHMLA_CACHE")
    root = Path(override) if override else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmla"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        fallback = Path(tempfile.gettempdir()) / f"flashmla-{os.getuid()}"
        fallback.mkdir(mode=0o700, exist_ok=True)
        if fallback.stat().st_uid != os.getuid():
            raise BuildError(f"no cache folder: {root} cannot be written and {fallback} is another user's") from None
        return fallback


def find_or_build(binding: str | None = None, *, verbose: bool = False) -> Built:
    """The library for this machine, compiled now if it is not in the cache. Raises `BuildError`.

    ``binding`` "ctypes" asks for the library that does not register itself; None for the best that can be had.
    """
    cxx = compiler()
    if cxx is None:
        raise BuildError("no C++ compiler found: install g++ or set CXX")
    folder = cache_root() / key(cxx)
    if (built := _cached(folder, binding)) is None:
        folder.mkdir(exist_ok=True)
        with _locked(folder / "lock"):
            built = _cached(folder, binding) or _build(cxx, folder, binding, verbose=verbose)
    return built


def _cached(folder: Path, binding: str | None) -> Built | None:
    for name, library in LIBRARIES.items():
        if binding in (None, name) and (folder / library).is_file():
            return Built(folder / library, name)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(cxx: str, folder: Path, binding: str | None, *, verbose: bool) -> Built:
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        objects = _compile(cxx, (*KERNEL_UNITS, *CORE_UNITS), scratch, verbose=verbose)
        if binding != "ctypes":
            try:
                glue = _compile(cxx, BINDING_UNITS, scratch, verbose=verbose)
                return _link(cxx, [*objects, *glue], folder, scratch, "stable ABI")
            except BuildError as error:
                print(f"flashmla: torch's C++ headers do not serve, binding through ctypes: {error}", file=sys.stderr)
        return _link(cxx, objects, folder, scratch, "ctypes")


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]


def _compile(cxx: str, units: tuple[Unit, ...], scratch: Path, *, verbose: bool) -> list[Path]:
    started, done = time.monotonic(), 0

    def compile_one(unit: Unit) -> Path:
        nonlocal done
        target = scratch / unit.object_name
        torch_flags = _torch_flags() if unit in BINDING_UNITS else []
        command = [cxx, *COMMON_FLAGS, *unit.flags, f"-I{CSRC}", *torch_flags, "-c", str(CSRC / unit.source), "-o"]
        _run([*command, str(target)], verbose=verbose)
        done += 1
        _progress(f"flashmla: compiled {done}/{len(units)} ({unit.object_name}, {time.monotonic() - started:.0f} s)")
        return target

    with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, units))


def _link(cxx: str, objects: list[Path], folder: Path, scratch: Path, binding: str) -> Built:
    libraries = Path(torch.__file__).parent / "lib"
    torch_flags = [f"-L{libraries}", "-ltorch_cpu", "-lc10"] if binding == "stable ABI" else []
    finished, target = scratch / LIBRARIES[binding], folder / LIBRARIES[binding]
    _run([cxx, "-shared", "-pthread", "-o", str(finished), *map(str, objects), *torch_flags])
    finished.replace(target)
    _progress(f"flashmla: kernels built ({target})", end=True)
    return Built(target, binding)


def _run(command: list[str], *, verbose: bool = False) -> None:
    if verbose:
        print(" ".join(command), file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


def _progress(text: str, *, end: bool = False) -> None:
    """One line, rewritten in place on a terminal; elsewhere only the last one is printed."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\n" if end else "", file=sys.stderr, flush=True)
    elif end:
        print(text, file=sys.stderr, flush=True)
