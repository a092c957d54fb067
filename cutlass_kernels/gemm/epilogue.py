"""The epilogue: the work of a kernel on a finished sum before it is rounded and stored.

    d = act(alpha * acc * row_scale[m] * col_scale[n] + bias[n]) * silu(c) + c

with only the parts that the `Epilogue` names (``gate`` is ``* silu(c)``, ``residual`` is ``+ c``; c is one tensor, so
they exclude each other). Scales and bias may be absent in a call: a null pointer stands for 1 and 0. The plain epilogue
is ``d = alpha * acc + beta * c``, the one that split-K, batched and grouped kernels can have.
"""

from __future__ import annotations

from dataclasses import dataclass

#: In cutlass_cppgen's vocabulary too. gelu is the exact one (erf), as in `flashmla_ops.reference`.
ACTIVATIONS = ("none", "relu", "gelu", "silu")


@dataclass(frozen=True)
class Epilogue:
    """See the module. ``Epilogue()`` is the plain one."""

    row_scale: bool = False  # float32 [m]: the scale of a row of a
    col_scale: bool = False  # float32 [n]: the scale of a row of weight
    bias: bool = False  # [n], of the output's type
    activation: str = "none"
    gate: bool = False
    residual: bool = False

    @property
    def plain(self) -> bool:
        return self == Epilogue()

    @property
    def reads_c(self) -> bool:
        return self.plain or self.gate or self.residual

    @property
    def name(self) -> str:
        if self.plain:
            return "plain"
        parts = [part for part in ("row_scale", "col_scale", "bias") if getattr(self, part)]
        parts += [self.activation] if self.activation != "none" else []
        parts += [part for part in ("gate", "residual") if getattr(self, part)]
        return "_".join(part.replace("_", "") for part in parts)

    def problems(self) -> list[str]:
        """Every rule that it breaks."""
        broken = []
        if self.activation not in ACTIVATIONS:
            broken.append(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {self.activation}")
        if self.gate and self.residual:
            broken.append("gate and residual: expected at most one (both read c), got both")
        if self.gate and self.activation != "none":
            broken.append(f"gate: expected no activation beside it (silu is that of c), got {self.activation}")
        return broken

    def source(self) -> str:
        """The epilogue as the Python function that `cutlass_cppgen.epilogue.trace` reads; one operation a line."""
        arguments = ["accum", "alpha"]
        value = "alpha * accum"
        for scale in ("row_scale", "col_scale"):
            if getattr(self, scale):
                arguments.append(scale)
                value += f" * {scale}"
        if self.bias:
            arguments.append("bias")
            value += " + bias"
        if self.activation != "none":
            value = f"{self.activation}({value})"
        if self.gate:
            value = f"({value}) * silu(C)"
        if self.residual:
            value += " + C"
        if self.gate or self.residual:
            arguments.append("C")
        return f"def epilogue({', '.join(arguments)}):\n    D = {value}\n    return D\n"
