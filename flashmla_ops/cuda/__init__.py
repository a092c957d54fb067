"""CUDA: launchers for what `cutlass_kernels` built, registered with torch where a CUDA device is."""

from flashmla_ops.cuda.autotune import register_autotuning
from flashmla_ops.cuda.loader import OPERATORS, explain, launcher, load

__all__ = ["OPERATORS", "explain", "launcher", "load", "register_autotuning"]
