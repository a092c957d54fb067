"""Errors of this package. It imports nothing of `flashmla_ops`, so it has its own, in the same form."""

from __future__ import annotations


class CutlassKernelsError(RuntimeError):
    """Base class of the errors of this package."""


class ConfigError(CutlassKernelsError, ValueError):
    """A configuration that no kernel can have. ``problems`` lists every rule that it breaks."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.name, self.problems = name, problems
        super().__init__(f"{name}: " + "; ".join(problems))


class MissingToolError(CutlassKernelsError):
    """Something that only generation or compilation needs is not installed; the message says how to get it."""


class GenerateError(CutlassKernelsError):
    """CUTLASS emitted something that this package does not understand."""


class BuildError(CutlassKernelsError):
    """nvcc failed, or what it produced may not ship: spills, local memory or serialised wgmma."""


class CallError(CutlassKernelsError, ValueError):
    """A kernel refused a problem. The message has CUTLASS's own word for it."""
