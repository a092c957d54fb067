"""Inductor's own CUTLASS backend on the pip package of CUTLASS.

Inductor looks for a clone of the CUTLASS repository (``torch._inductor.config.cuda.cutlass_dir``, in newer versions
``config.cutlass.cutlass_dir``). The package nvidia-cutlass has the same files in other places; a folder of links puts
them where Inductor looks::

    torch._inductor.config.cutlass.cutlass_dir = cutlass_kernels.inductor_cutlass_dir()
"""

from __future__ import annotations

import contextlib
from importlib.util import find_spec
from pathlib import Path

from cutlass_kernels.build.store import STORE
from cutlass_kernels.errors import MissingToolError
from cutlass_kernels.gemm.cppgen import HOW_TO_GET_IT

#: Place in a clone -> package, and the place in it.
LINKS = {
    "python/cutlass_library": ("cutlass_library", ""),
    "python/cutlass_cppgen": ("cutlass_cppgen", ""),
    "python/pycute": ("pycute", ""),
    "include": ("cutlass_library", "source/include"),
    "tools": ("cutlass_library", "source/tools"),
    "examples": ("cutlass_library", "source/examples"),
}


def inductor_cutlass_dir(folder: Path | None = None) -> str:
    """A folder that looks like a clone of CUTLASS, made in ``folder`` (None: in the cache). Links that are right stay.

    Raises `MissingToolError` without nvidia-cutlass.
    """
    folder = folder or STORE.root() / "inductor_cutlass_dir"
    for place, (package, inside) in LINKS.items():
        source = _package(package) / inside
        if not source.is_dir():
            continue  # a version of the package without examples
        link = folder / place
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and link.resolve() != source.resolve():
            link.unlink()
        with contextlib.suppress(FileExistsError):  # made just now, or by another process
            link.symlink_to(source)
    return str(folder)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolError(f"no package {name}: {HOW_TO_GET_IT}")
    return Path(next(iter(spec.submodule_search_locations)))
