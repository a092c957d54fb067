"""FlashMLA: Multi-head Latent Attention over one paged latent cache, as ``torch.ops.flashmla.*``."""

from flashmla_ops import ops

__all__ = ["ops"]
__version__ = "0.1.0"
