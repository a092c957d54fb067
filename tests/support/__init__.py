"""Helpers that tests share: cases, poison, comparison with the float64 reference."""
