"""FlashMLA: Multi-head Latent Attention over one paged latent cache, as ``torch.ops.flashmla.*``."""

import torch

from flashmla_ops import cpu, cuda, ops, versions
from flashmla_ops.api import (
    FlashMLASchedMeta,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_mla_sparse_fwd,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flashmla_ops.compiler import enable_compile

__all__ = [
    "FlashMLASchedMeta",
    "enable_compile",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "ops",
]
__version__ = "0.1.0"

versions.warn_if_untested("torch", torch.__version__)
cpu.load()
cuda.load()
ops.complete()
