from flashmla_ops import ops  # noqa
