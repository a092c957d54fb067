"""FlashMLA: Multi-head Latent Attention over one paged latent cache, as ``torch.ops.flashmla.*``."""

from flashmla_ops import ops  # first: it defines the operators that everything below calls
from flashmla_ops.api import FlashMLASchedMeta, flash_mla_with_kvcache, get_mla_metadata

__all__ = ["FlashMLASchedMeta", "flash_mla_with_kvcache", "get_mla_metadata", "ops"]
__version__ = "0.1.0"
