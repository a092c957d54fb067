"""Finding nvcc, and the folder in which built kernels are kept."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cutlass_kernels.errors import BuildError, MissingToolError

HOW_TO_GET_IT = "install the CUDA toolkit (12.8 or newer), pip install nvidia-cuda-nvcc, or set NVCC"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler. ``version`` as in "13.0"; ``release`` is the full line, for cache keys."""

    path: str
    version: str
    release: str


@cache
def nvcc() -> Nvcc:
    """$NVCC, or nvcc on PATH, in CUDA_HOME, or in pip's package. Raises `MissingToolError`."""
    for path in _candidates():
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and (found := re.search(r"release (\d+\.\d+), (V\S+)", done.stdout)):
            return Nvcc(path, found[1], found[2])
    raise MissingToolError(f"building kernels needs nvcc: {HOW_TO_GET_IT}")


def _candidates() -> list[str]:
    if wanted := os.environ.get("NVCC"):
        return [found] if (found := shutil.which(wanted)) else []
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    places = [shutil.which("nvcc"), shutil.which("nvcc", path=f"{home}/bin")]
    # pip's packages unpack beside one another into nvidia/: cu13/bin for CUDA 13, cuda_nvcc/bin before.
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        places += [str(path) for pattern in ("cu*/bin/nvcc", "cuda_nvcc/bin/nvcc") for path in Path(root).glob(pattern)]
    return [place for place in places if place]


def cache_root() -> Path:
    """``cutlass`` in $FLASHMLA_CACHE, else in the user's cache folder: where flashmla_ops keeps its libraries too.

    A temporary folder of this user's if that cannot be written.
    """
    override = os.environ.get("FLASHMLA_CACHE")
    base = Path(override) if override else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashmla"
    root = base / "cutlass"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            return root
    except OSError:
        fallback = Path(tempfile.gettempdir()) / f"flashmla-{os.getuid()}" / "cutlass"
        fallback.mkdir(mode=0o700, parents=True, exist_ok=True)
        if fallback.parent.stat().st_uid != os.getuid():
            raise BuildError(f"no cache folder: {root} cannot be written and {fallback} is another user's") from None
        return fallback
