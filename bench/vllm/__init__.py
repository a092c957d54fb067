"""vLLM on our operators and on its own, in processes of the venv that `make vllm` makes.

`engine` is a process with an engine that decodes when it is told to, `engines` starts such processes, `checkpoints`
writes the models that both have, and ``python -m bench.vllm`` is a server under load (`load`).
"""

from __future__ import annotations

import os
from pathlib import Path

from flashmla_ops.integrations.vllm.__main__ import SETTINGS

ROOT = Path(__file__).parents[2]


def python() -> Path:
    """The Python that has vLLM: that of `make vllm`, or the one that the environment names."""
    return Path(os.environ.get("FLASHMLA_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))


def missing() -> str | None:
    """Why vLLM cannot run, or None."""
    return None if python().exists() else "vLLM is not installed: make vllm"


def environment(threads: int, *, ours: bool, gigabytes: int = 1) -> dict[str, str]:
    """Of a process of vLLM: with our plugin, or with its own attention."""
    settings = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        **SETTINGS,
        "VLLM_CPU_KVCACHE_SPACE": str(gigabytes),
        "HF_HUB_OFFLINE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return {**os.environ, **settings, **({} if ours else {"VLLM_PLUGINS": ""})}
