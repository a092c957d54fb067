"""Finding nvcc."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cutlass_kernels.errors import MissingToolError

HOW_TO_GET_IT = "install the CUDA toolkit (12.8 or newer), pip install nvidia-cuda-nvcc, or set NVCC"


@dataclass(frozen=True)
class Nvcc:
    """A CUDA compiler. ``version`` as in "13.0"; ``release`` is the full line, for cache keys."""

    path: str
    version: str
    release: str

    def link_flags(self, scratch: Path) -> tuple[str, ...]:
        """Where the linker finds CUDA's runtime as ``libcudart.so``.

        A toolkit has it under that name, in a folder that nvcc knows. pip's package has it under the full name alone,
        so that a link is made in ``scratch``.
        """
        folder = Path(self.path).parents[1] / "lib"
        runtimes = sorted(folder.glob("libcudart.so.*"))
        if not runtimes or (folder / "libcudart.so").exists():
            return ()
        (scratch / "libcudart.so").symlink_to(runtimes[-1])
        return (f"-L{scratch}", f"-L{folder}")


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
