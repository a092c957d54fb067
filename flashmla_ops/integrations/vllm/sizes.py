"""What both backends say to vLLM of what they take."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import MultipleOf


class AnySize:
    """Pages and heads of any size, in any type that operators take. It comes before vLLM's own backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # all

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(1)]
