"""Tests of `flashmla_ops.reference`."""
