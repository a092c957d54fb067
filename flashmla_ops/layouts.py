"""Row formats: how one token of one KV head lies in memory.

A cache row is a *value* (its first ``d_v`` elements) and a *key* (its elements from ``qk_start`` on, followed by the
row of a second tensor where one is given). ``native`` rows hold the elements themselves in the cache tensor's dtype; a
quantised format says where its values, scales and rotary part lie. Its cache tensor holds bytes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class NativeRow:
    """Elements stored as they are; the cache tensor's last dimension is the row."""

    name: str = "native"


@dataclass(frozen=True)
class Fp8V32Row:
    """The FP8 cache of DeepSeek's FlashMLA for DeepSeek-V3.2, 656 bytes a token.

    512 values in e4m3; for each group of 128 of them a scale, a power of two in float32; then 64 rotary elements in
    bfloat16.
    """

    name: str = "fp8_v32"
    values: int = 512
    group: int = 128
    rope: int = 64
    #: An e4m3 number is at most this.
    largest: float = 448.0
    #: Scales are at least 2 to this: the official package's 1e-4, rounded up to a power of two.
    least_exponent: int = -13

    @property
    def elements(self) -> int:
        return self.values + self.rope

    @property
    def groups(self) -> int:
        return self.values // self.group

    @property
    def scales_at(self) -> int:
        """Where the scales begin, in bytes."""
        return self.values

    @property
    def rope_at(self) -> int:
        return self.scales_at + 4 * self.groups

    @property
    def bytes(self) -> int:
        return self.rope_at + 2 * self.rope


NATIVE = NativeRow()
FP8_V32 = Fp8V32Row()
#: Those that `decode` reads.
ROW_FORMATS: dict[str, NativeRow] = {NATIVE.name: NATIVE}
#: Those that `append_` writes into a cache of bytes, and `quantize_rows` makes.
QUANTIZED_FORMATS: dict[str, Fp8V32Row] = {FP8_V32.name: FP8_V32}
