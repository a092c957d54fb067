"""transformers models whose attention is MLA, served by `torch.ops.flashmla.*`.

enable(model)     # absorbed attention on transformers' own caches
model.generate(...)
disable(model)
"""

from flashmla_ops.integrations.transformers import versions as versions
from flashmla_ops.integrations.transformers.attention import ABSORBED_ATTENTION
from flashmla_ops.integrations.transformers.hook import SUPPORTED_MODEL_TYPES, disable, enable, is_enabled, why_not
from flashmla_ops.integrations.transformers.paged_cache import PagedLatentCache, StaticPagedLatentCache

__all__ = [
    "ABSORBED_ATTENTION",
    "SUPPORTED_MODEL_TYPES",
    "PagedLatentCache",
    "StaticPagedLatentCache",
    "disable",
    "enable",
    "is_enabled",
    "why_not",
]
