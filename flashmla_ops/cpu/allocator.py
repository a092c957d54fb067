"""The library that puts arenas in front of torch's CPU allocator (csrc/pool/): compiled and loaded at first use."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import POINTER, Structure, c_bool, c_size_t, c_uint32, c_uint64, c_void_p
from typing import Any

from flashmla_build import compiler
from flashmla_ops.cpu import build
from flashmla_ops.errors import ArenaUnavailableError, BuildError


class Options(Structure):
    _fields_ = (
        ("bytes", c_uint64),
        ("most_bytes", c_uint64),
        ("growth", c_uint64),
        ("huge_pages", c_uint32),
        ("preallocate", c_uint32),
        ("poison", c_uint32),
    )


class Stats(Structure):
    NAMES = (
        *("size", "limit", "in_use", "peak", "blocks", "largest_free", "free_blocks"),
        *("deferred", "deferred_blocks", "epochs", "fallthroughs", "fallthrough_bytes"),
    )
    _fields_ = tuple((name, c_uint64) for name in NAMES)


_FUNCTIONS = {
    "flashmla_hook_install": (c_bool, ()),
    "flashmla_arena_new": (c_void_p, (POINTER(Options),)),
    "flashmla_arena_drop": (None, (c_void_p,)),
    "flashmla_arena_enter": (c_void_p, (c_void_p, c_bool, c_bool)),
    "flashmla_arena_leave": (None, (c_void_p,)),
    "flashmla_arena_open_epoch": (c_uint64, (c_void_p,)),
    "flashmla_arena_close_epoch": (c_bool, (c_void_p, c_uint64)),
    "flashmla_arena_stats": (None, (c_void_p, POINTER(Stats))),
    "flashmla_arena_of": (c_void_p, (c_void_p,)),
    "flashmla_arena_dirty": (c_size_t, ()),
}


def loaded(library: build.Library, functions: Mapping[str, tuple[Any, tuple[Any, ...]]]) -> ctypes.CDLL:
    """`build.opened`. Raises `ArenaUnavailableError`, which says why the library could not be had."""
    try:
        return build.opened(library, functions)
    except (BuildError, OSError) as error:
        raise ArenaUnavailableError(f"the allocator's library could not be had: {error}") from error


@functools.cache
def library() -> ctypes.CDLL:
    """The library, installed as torch's CPU allocator for the rest of the process.

    Raises `ArenaUnavailableError` where it cannot be compiled, loaded or installed.
    """
    found = loaded(build.ALLOCATOR, _FUNCTIONS)
    if not found.flashmla_hook_install():
        raise ArenaUnavailableError("another library has set torch's CPU allocator, at a higher priority than ours")
    return found


def explain() -> str:
    """Whether arenas can serve torch's CPU tensors, as text. Compiles nothing."""
    if library.cache_info().currsize:
        return "arenas serve torch's CPU tensors in this process"
    if path := build.find(build.ALLOCATOR):
        return f"arenas can serve torch's CPU tensors ({path})"
    try:
        compiler(BuildError)
    except BuildError as error:
        return f"arenas cannot serve torch's CPU tensors: {error}"
    return "arenas can serve torch's CPU tensors; their library is compiled at first use"
