"""Loading the compiled kernels into the process, and the record of what happened that `capability` explains."""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from flashmla_ops.cpu import build, ctypes_binding
from flashmla_ops.errors import ArgumentError, BuildError

REFERENCE = "reference"


@dataclass
class State:
    """What runs on the CPU. ``active`` is an instruction set's name, or "reference"."""

    active: str = REFERENCE
    binding: str = "none"
    path: str = ""
    reason: str = "not loaded yet"
    #: Instruction sets compiled into the library, fastest first, and whether this processor runs them.
    isas: dict[str, bool] = field(default_factory=dict)
    library: ctypes.CDLL | None = None


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
        built = build.find_or_build(os.environ.get("FLASHMLA_BINDING"))
        if built.binding == "stable ABI":
            torch.ops.load_library(built.path)
        STATE.library = ctypes.CDLL(str(built.path))
        if built.binding == "ctypes":
            ctypes_binding.register(STATE.library)
    except (BuildError, OSError) as error:
        STATE.reason = str(error)
        warnings.warn(f"flashmla: the float64 reference runs instead of C++ kernels: {error}", stacklevel=2)
        return STATE
    STATE.path, STATE.binding = str(built.path), built.binding
    _choose_isa(STATE.library, wanted)
    return STATE


def _choose_isa(library: ctypes.CDLL, wanted: str) -> None:
    library.flashmla_isa_names.restype = ctypes.POINTER(ctypes.c_char_p)
    library.flashmla_isa_active.restype = ctypes.c_char_p
    names = library.flashmla_isa_names()
    for i in range(16):
        if names[i] is None:
            break
        STATE.isas[names[i].decode()] = bool(library.flashmla_isa_supported(names[i]))
    STATE.reason = "the fastest this processor has"
    if wanted:
        if library.flashmla_isa_select(wanted.encode()) == 0:
            STATE.reason = f"FLASHMLA_CPU={wanted}"
        else:
            known = ", ".join(STATE.isas)
            why = "this processor cannot run it" if wanted in STATE.isas else f"unknown; known are {known}, {REFERENCE}"
            STATE.reason = f"the fastest this processor has (FLASHMLA_CPU={wanted}: {why})"
            warnings.warn(f"flashmla: FLASHMLA_CPU={wanted} ignored: {why}", stacklevel=3)
    STATE.active = library.flashmla_isa_active().decode()


@contextlib.contextmanager
def using(isa: str) -> Iterator[None]:
    """Run the whole process on another instruction set of `STATE.isas` for a while (tests, comparisons)."""
    library, before = STATE.library, STATE.active
    if library is None or library.flashmla_isa_select(isa.encode()) != 0:
        runnable = [name for name, supported in STATE.isas.items() if supported]
        raise ArgumentError("cpu.using", "isa", f"one of {runnable}", isa)
    STATE.active = isa
    try:
        yield
    finally:
        library.flashmla_isa_select(before.encode())
        STATE.active = before
