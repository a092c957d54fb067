"""`explain`: a model compiled by Inductor alone and by our backend, side by side."""

from lowering.explain.explanation import Explanation, explain

__all__ = ["Explanation", "explain"]
