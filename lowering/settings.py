"""The choices that the lowerings leave to the user. They are part of the cache key."""

from __future__ import annotations

from dataclasses import dataclass

from flashmla_ops.errors import ArgumentError

#: The values that each setting may have. They are compared with their type: 1 is not True, and "no" is not False.
CHOICES: dict[str, tuple[str | bool, ...]] = {
    "decode": ("extern", "template", "autotune"),
    "fuse_append": (True, False),
    "decode_up": ("auto", True, False),
    "gemm": ("auto", "autotune", True, False),
}


@dataclass(frozen=True)
class Settings:
    """How operators are lowered.

    ``decode``: "extern" calls the compiled library, and work after it is a kernel of its own; "template" generates one
    kernel that holds attention and the pointwise work after it; "autotune" times both for every shape, when compiling.
    ``decode_up``: whether `decode` and the product of each head's result become one operator; "auto": on the CPU, where
    it saves a copy and a dispatch.
    ``gemm``: True serves linear layers and products by head by the library's, "auto" those with few rows, where it is
    faster, and False none; "autotune" times each and what the graph had in its place, when compiling, and is "auto" in
    a package, where nothing can be timed.
    ``fuse_append``: generate `append_` into the kernel that computes the rows.
    """

    decode: str = "extern"
    fuse_append: bool = True
    decode_up: bool | str = "auto"
    gemm: str | bool = "auto"

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not any(type(value) is type(choice) and value == choice for choice in choices):
                raise ArgumentError("compile", name, f"one of {', '.join(map(repr, choices))}", repr(value))
