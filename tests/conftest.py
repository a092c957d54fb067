"""Hypothesis profiles: `fixed` (the default) repeats the same cases everywhere, `explore` draws new ones each time."""

from hypothesis import HealthCheck, settings

import flashmla_ops  # noqa: F401 (defines torch.ops.flashmla)

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": False}

settings.register_profile("fixed", derandomize=True, database=None, **_COMMON)
settings.register_profile("explore", max_examples=1000, **_COMMON)
settings.load_profile("fixed")
