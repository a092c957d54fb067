"""How compiled things are made once and kept: the cache's folders, locks, atomic renames, progress, the C++ compiler.

The CPU library, the CUDA kernels and the emulator's runtime are built on it. It imports nothing of this project.
"""

from flashmla_build.compiler import compiler, run
from flashmla_build.progress import Progress, say
from flashmla_build.store import Store

__all__ = ["Progress", "Store", "compiler", "run", "say"]
