"""Loading the compiled kernels into the process, and the record of what happened that `capability` explains."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashmla_ops.cpu import build, ctypes_binding
from flashmla_ops.errors import ArgumentError, BuildError

REFERENCE = "reference"


@dataclass
class State:
    """The implementation that runs on the CPU. ``active`` is an instruction set's name, or "reference"."""

    active: str = REFERENCE
    binding: str = "none"
    path: str = ""
    reason: str = "not loaded yet"
    #: Instruction sets that there are kernels for, fastest first, and whether this processor runs them.
    isas: dict[str, bool] = field(default_factory=dict)
    library: ctypes.CDLL | None = None
    #: The libraries of instruction sets that have been loaded.
    kernels: dict[str, ctypes.CDLL] = field(default_factory=dict)


STATE = State()


def load() -> State:
    """Load the kernels, compiled now if need be, and register them with torch. Never raises: the reference remains."""
    if STATE.library is not None:
        return STATE
    wanted = os.environ.get("FLASHMLA_CPU", "")
    if wanted == REFERENCE:
        STATE.reason = "FLASHMLA_CPU=reference"
        return STATE
    try:
        try:
            _load(wanted, anew=False)
        except OSError:
            # Made for another system, whose C library is newer, say: what is compiled here fits.
            _load(wanted, anew=True)
    except (BuildError, OSError) as error:
        STATE.reason = str(error)
        warnings.warn(f"flashmla: the float64 reference runs instead of C++ kernels: {error}", stacklevel=2)
    return STATE


@contextlib.contextmanager
def using(isa: str) -> Iterator[None]:
    """Run the whole process on another instruction set of `STATE.isas` for a while (tests, comparisons).

    Its kernels are compiled now if they have not been. Raises `ArgumentError` where there are none, or the processor
    cannot run them.
    """
    before = STATE.active
    if STATE.library is None or not STATE.isas.get(isa):
        runnable = [name for name, supported in STATE.isas.items() if supported]
        raise ArgumentError("cpu.using", "isa", f"one of {runnable}", isa)
    if isa not in STATE.kernels:
        STATE.kernels[isa] = _kernels(*build.find_or_build([build.KERNELS[isa]]))
    _use(isa)
    try:
        yield
    finally:
        _use(before)


def _load(wanted: str, *, anew: bool) -> None:
    """The core, and the kernels that are wanted or the fastest that can be had. The core comes last: it registers."""
    isas = _isas(*build.find_or_build([build.ISAS], anew=anew))
    isa, core, kernels, reason = _choose(isas, wanted, anew=anew)
    table = _kernels(kernels)
    stable = core.name == build.STABLE_ABI.file
    if stable:
        torch.ops.load_library(core)
    STATE.library = ctypes.CDLL(str(core))
    STATE.kernels, STATE.isas = {isa: table}, isas
    STATE.path, STATE.binding, STATE.reason = str(core), "stable ABI" if stable else "ctypes", reason
    _use(isa)
    if not stable:
        ctypes_binding.register(STATE.library)
        return
    with contextlib.suppress(BuildError, OSError):
        torch.ops.load_library(*build.find_or_build([build.AUTOGRAD], anew=anew))


def _isas(path: Path) -> dict[str, bool]:
    library = ctypes.CDLL(str(path))
    library.flashmla_isa_names.restype = ctypes.POINTER(ctypes.c_char_p)
    names = []
    for name in library.flashmla_isa_names():
        if name is None:
            break
        names.append(name)
    return {name.decode(): bool(library.flashmla_isa_supported(name)) for name in names}


def _choose(isas: dict[str, bool], wanted: str, *, anew: bool) -> tuple[str, Path, Path, str]:
    """The instruction set that runs, the paths of the core and of its kernels, and why it is this one."""
    core = _core()
    chosen, reason = [name for name, runs in isas.items() if runs and name != build.EMULATED], ""
    if isas.get(wanted):
        chosen.insert(0, wanted)
    elif wanted:
        known = f"unknown; known are {', '.join(isas)}, {REFERENCE}"
        reason = _ignored(wanted, "this processor cannot run it" if wanted in isas else known)
    for isa in chosen:
        try:
            kernels, path = build.find_or_build([build.KERNELS[isa], core], anew=anew)
        except BuildError as error:
            if build.find(core) is None or isa == chosen[-1]:
                raise
            reason = _ignored(wanted, str(error)) if isa == wanted else reason or f", but for {isa}: {error}"
            continue
        if isa == wanted:
            return isa, path, kernels, f"FLASHMLA_CPU={wanted}"
        return isa, path, kernels, f"the fastest this processor has{reason}"
    raise BuildError("this processor runs no instruction set that there are kernels for")


def _ignored(wanted: str, why: str) -> str:
    warnings.warn(f"flashmla: FLASHMLA_CPU={wanted} ignored: {why}", stacklevel=5)
    return f" (FLASHMLA_CPU={wanted}: {why})"


def _core() -> build.Library:
    binding = os.environ.get("FLASHMLA_BINDING")
    if binding not in (None, "", "ctypes"):
        raise BuildError(f"FLASHMLA_BINDING={binding}: expected ctypes, or nothing")
    return build.CTYPES if binding else build.STABLE_ABI


def _kernels(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.flashmla_kernels.restype = ctypes.c_void_p
    return library


def _use(isa: str) -> None:
    """Have all operators run on the kernels of an instruction set that this processor has."""
    assert STATE.library is not None
    STATE.library.flashmla_use(ctypes.c_void_p(STATE.kernels[isa].flashmla_kernels()))
    STATE.active = isa
