"""transformers models, served by `torch.ops.flashmla.*`.

enable(model)     # MLA, GQA, MHA and MQA models: our attention on transformers' own caches, or on paged ones
compile(model)    # any language model: generate's decode steps through torch.compile(backend="flashmla")
model.generate(...)
uncompile(model)
disable(model)
"""

from flashmla_ops.integrations.transformers import versions as versions
from flashmla_ops.integrations.transformers.attention import ABSORBED_ATTENTION
from flashmla_ops.integrations.transformers.compiled import compile, uncompile
from flashmla_ops.integrations.transformers.grouped import GROUPED_ATTENTION
from flashmla_ops.integrations.transformers.hook import SUPPORTED_MODEL_TYPES, disable, enable, is_enabled, why_not
from flashmla_ops.integrations.transformers.paged_cache import PagedLatentCache, StaticPagedLatentCache

__all__ = [
    "ABSORBED_ATTENTION",
    "GROUPED_ATTENTION",
    "SUPPORTED_MODEL_TYPES",
    "PagedLatentCache",
    "StaticPagedLatentCache",
    "compile",
    "disable",
    "enable",
    "is_enabled",
    "uncompile",
    "why_not",
]
