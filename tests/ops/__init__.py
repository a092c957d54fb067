"""Tests of `flashmla_ops.ops`."""
