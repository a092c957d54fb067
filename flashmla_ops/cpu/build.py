"""Compile the C++ kernels with the machine's own compiler, once, into a cache that every process shares.

There is one library for each instruction set and a core that uses one of them, so that an import compiles only what
this processor runs best. The folder of the cache is named by a hash of the sources, torch's version and the Python ABI,
so a stale library is never loaded; it does not name the compiler, which an image that only runs need not have. A wheel
may bring libraries of its own: they bind through torch's stable ABI, and need no key but the sources'.
Processes that build at once wait for one another on a file lock; a library appears by atomic rename.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashmla_build import Store, compiler, say
from flashmla_ops.cpu import contracts
from flashmla_ops.cpu.compiler import Compilation, Unit
from flashmla_ops.errors import BuildError
from flashmla_ops.formats import header

CSRC = Path(__file__).parent / "csrc"
#: Where a wheel that holds kernels brings them, in a folder named by `source_key`.
PACKAGED = Path(__file__).parent / "lib"
STORE = Store("", "the CPU kernels", BuildError)
COMMON_FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-pthread", "-Wall", "-Wextra", "-Wno-psabi")

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-Wno-maybe-uninitialized")
_X86 = platform.machine() in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Library:
    """A shared library, and what takes its place where it cannot be compiled."""

    name: str
    units: tuple[Unit, ...]
    links_torch: bool = False
    otherwise: Library | None = None

    @property
    def file(self) -> str:
        return f"{self.name}.so"


def kernels_of(isa: str, *flags: str) -> Library:
    """The library of one instruction set. Its largest unit comes first, since the others fit beside it."""
    flags = (f"-DFLASHMLA_ISA={isa}", *flags)
    names = ("kernels_products", "kernels_attention", "kernels_backward", "kernels_selection", "kernels")
    units = (Unit(f"{name}.cpp", flags, f"{name}_{isa}") for name in names)
    return Library(f"flashmla_cpu_{isa}", tuple(units))


#: Never chosen but by name: runs the AVX-512 BF16 layouts anywhere, slowly.
EMULATED = "emulated"
KERNELS = {
    "generic": kernels_of("generic", "-O3"),
    **(
        {
            "avx2": kernels_of("avx2", "-O3", *_AVX2),
            "avx512": kernels_of("avx512", "-O3", *_AVX512),
            # Every processor with the one has the other.
            "avx512_bf16": kernels_of("avx512_bf16", "-O3", *_AVX512, "-mavx512bf16", "-mavx512vnni"),
        }
        if _X86
        else {}
    ),
    EMULATED: kernels_of(EMULATED, "-O1", "-DFLASHMLA_EMULATE"),
}
#: Says which instruction sets this processor runs, before anything else is compiled.
ISAS = Library("flashmla_isas", (Unit("isas.cpp"),))
CORE_UNITS = (
    *(
        Unit(f"{name}.cpp")
        for name in ("isas", "dispatch", "decode", "decode_up", "sparse", "prefill", "append", "gemm", "select")
    ),
    *(Unit(f"{name}_backward.cpp") for name in ("decode", "prefill", "sparse")),
    *(Unit(f"{name}.cpp", ("-O3",)) for name in ("append_quantized", "summarize")),
)
#: Units that register the kernels with torch, by the stable ABI of the oldest torch that we support.
BINDING_UNITS = tuple(
    Unit(f"{name}.cpp", ("-O2", "-DTORCH_TARGET_VERSION=0x020b000000000000"))
    for name in (
        *("torch_attention", "torch_backward", "torch_gemm", "torch_attend_masked"),
        *("torch_decode_up", "torch_sparse", "torch_selection"),
    )
)
#: The core without them is reached through ctypes.
CTYPES = Library("flashmla_cpu_ctypes", CORE_UNITS)
STABLE_ABI = Library("flashmla_cpu", (*BINDING_UNITS, *CORE_UNITS), links_torch=True, otherwise=CTYPES)
#: The books of a KV pool.
PAGES = Library("flashmla_pages", tuple(Unit(f"pool/{name}.cpp") for name in ("pages", "pages_interface")))
#: Tells autograd of the operators. It uses more of torch than the stable ABI, and fits this version alone;
#: without it, the same runs in Python.
AUTOGRAD = Library(f"flashmla_autograd_{torch.__version__}", (Unit("autograd.cpp"),), links_torch=True)
#: Torch's CPU allocator with arenas in front, for this version alone too.
ALLOCATOR = Library(f"flashmla_allocator_{torch.__version__}", (Unit("pool/hook.cpp"),), links_torch=True)
#: Memory of CUDA devices for torch.cuda.MemPool. It needs neither torch nor CUDA to be compiled.
DEVICE_ALLOCATOR = Library("flashmla_device_allocator", (Unit("pool/device.cpp"),))
#: Units that are compiled with torch's headers.
TORCH_UNITS = (*BINDING_UNITS, *AUTOGRAD.units, *ALLOCATOR.units)


def _generated() -> dict[str, str]:
    """Every generated header by the name that it is included by."""
    return header.generated() | {contracts.NAME: contracts.text()}


def source_key() -> str:
    """A hash of what the libraries are made from."""
    digest = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.suffix in (".h", ".cpp")):
        digest.update(path.relative_to(CSRC).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(repr(_generated()).encode())
    libraries = (ISAS, PAGES, STABLE_ABI, DEVICE_ALLOCATOR, KERNELS)
    digest.update(repr((platform.machine(), COMMON_FLAGS, libraries)).encode())
    return digest.hexdigest()[:16]


def key() -> str:
    """A hash of everything that a library in the cache depends on."""
    of_this_torch = (AUTOGRAD, ALLOCATOR)
    facts = (source_key(), torch.__version__, sysconfig.get_config_var("SOABI"), of_this_torch)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def find(library: Library) -> Path | None:
    """A library, or what takes its place, in the package or in the cache; None if it has not been compiled."""
    cached = key()
    folders = [PACKAGED / source_key(), *(root / cached for root in STORE.roots())]
    return next((path for folder in folders for path in _in(folder, library) if os.path.isfile(path)), None)


def find_or_build(libraries: Sequence[Library], *, anew: bool = False, verbose: bool = False) -> list[Path]:
    """Libraries for this machine, one path each; those that are not in the package or the cache are compiled now.

    The one that takes longest had better come first: the others fit beside it.
    ``anew`` compiles all of them, whatever is there. Raises `BuildError`.
    """
    found = {library: None if anew else find(library) for library in libraries}
    if not all(found.values()):
        compiler(BuildError)  # none is the first thing to say
        folder = STORE.root() / key()
        folder.mkdir(exist_ok=True)
        with STORE.locked(folder / "lock"):
            found = {library: None if anew else find(library) for library in libraries}
            found |= _build([library for library, path in found.items() if path is None], folder, verbose=verbose)
    return [path for path in found.values() if path is not None]


def opened(
    library: Library, functions: Mapping[str, tuple[Any, Sequence[Any]]], kind: type[ctypes.CDLL] = ctypes.CDLL
) -> ctypes.CDLL:
    """A library, compiled now if need be, whose functions have these result and argument types.

    Raises `BuildError`, or OSError if it cannot be loaded.
    """
    try:
        found = kind(str(*find_or_build([library])))
    except OSError:
        # Made for another system, whose C library is newer, say: what is compiled here fits.
        found = kind(str(*find_or_build([library], anew=True)))
    for name, (result, arguments) in functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found


def in_wheels() -> list[Library]:
    """The libraries that a wheel with kernels holds: all that a processor may choose."""
    return [
        ISAS,
        PAGES,
        STABLE_ABI,
        AUTOGRAD,
        ALLOCATOR,
        DEVICE_ALLOCATOR,
        *(library for isa, library in KERNELS.items() if isa != EMULATED),
    ]


def copy_to(folder: Path, *, verbose: bool = False) -> Path:
    """Put the libraries of `in_wheels` into a folder of this one. Raises `BuildError`."""
    target = folder / source_key()
    target.mkdir(parents=True, exist_ok=True)
    for path in find_or_build(in_wheels(), verbose=verbose):
        shutil.copy(path, target)
    return target


def _in(folder: Path, library: Library) -> Iterator[Path]:
    yield folder / library.file
    if library.otherwise is not None:
        yield from _in(folder, library.otherwise)


def _build(libraries: Sequence[Library], folder: Path, *, verbose: bool) -> dict[Library, Path]:
    """Compile and link libraries into a folder: all that can be. Then the first `BuildError` is raised, if any."""
    names = ", ".join(library.name for library in libraries)
    units = dict.fromkeys(unit for library in libraries for unit in library.units)
    long = len(units) > 1
    say(f"flashmla: compiling {names} into {folder}, once; this may take a minute", lasting=long)
    built, failures = {}, []
    with STORE.scratch(folder) as scratch:
        for file, content in _generated().items():
            (scratch / file).parent.mkdir(parents=True, exist_ok=True)
            (scratch / file).write_text(content)
        with Compilation([*units], scratch, partial(_arguments, scratch), verbose=verbose) as compilation:
            for library in libraries:
                try:
                    built[library] = _link(compilation, library, folder)
                except BuildError as error:
                    failures.append(error)
    if failures:
        raise failures[0]
    say(f"flashmla: compiled {names}", lasting=long)
    return built


def _link(compilation: Compilation, library: Library, folder: Path) -> Path:
    torch_libraries = Path(torch.__file__).parent / "lib"
    flags = [f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"] if library.links_torch else []
    target = folder / library.file
    try:
        compilation.link(target, library.units, flags)
    except BuildError as error:
        if library.otherwise is None:
            raise
        target = _link(compilation, library.otherwise, folder)
        print(f"flashmla: torch's C++ headers do not serve, binding through ctypes: {error}", file=sys.stderr)
    return target


def _arguments(generated: Path, unit: Unit) -> list[str]:
    """How to compile a unit, with generated headers in a folder."""
    torch_flags = _torch_flags() if unit in TORCH_UNITS else []
    return [*COMMON_FLAGS, *unit.flags, f"-I{CSRC}", f"-I{generated}", *torch_flags, str(CSRC / unit.source)]


def _torch_flags() -> list[str]:
    include = Path(torch.__file__).parent / "include"
    return [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]
