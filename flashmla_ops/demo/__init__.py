"""``python -m flashmla_ops.demo``: a trained MLA model through FlashMLA, and what a decode step gains."""
