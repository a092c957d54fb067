"""What a decode kernel costs, as the emulator counts it, and the time that no device can undercut: a model, no measure.

Counters are those of one block on whole tiles (`trials.counted`), beside the least that the work needs: each row of the
cache and each query once, and the multiply-adds of the block's query rows.
"""

from __future__ import annotations

from dataclasses import dataclass

from cutlass_kernels.attention.config import CallConfig, Codes
from cutlass_kernels.emulator import Counters
from flashmla_ops.cuda.verify.trials import COUNTED


@dataclass(frozen=True)
class Peak:
    """A device's bytes and operations (bf16, float32 sums, dense) a second, from its data sheet; and a block's room."""

    name: str
    bytes: float
    operations: float
    shared: int


#: By the architecture that is built for. Kernels of sm_80 also run on devices that are newer, if they have the room.
PEAKS = {
    "sm_80": (Peak("A100", 2.039e12, 312e12, 166_912), Peak("RTX 4090", 1.008e12, 165.2e12, 101_376)),
    "sm_86": (Peak("RTX 3090", 0.936e12, 71e12, 101_376),),
    "sm_89": (Peak("RTX 4090", 1.008e12, 165.2e12, 101_376),),
    "sm_90a": (Peak("H100", 3.35e12, 989e12, 232_448),),
}
#: The decode step that times are for: sequences, and rows of each, of both caches together if there are two.
SEQUENCES, TOKENS = 128, 4096


def row_bytes(config: CallConfig, codes: Codes | None) -> int:
    return 2 * config.d if codes is None else codes.head + codes.tail


def ratios(config: CallConfig, counters: Counters) -> dict[str, float]:
    """What was counted over the least: bytes that lanes read, sectors read, passes over shared memory, products."""
    tokens = COUNTED * config.tile
    sources = [config.codes, config.second_codes][: 1 + config.second]
    least = sum(tokens * row_bytes(config, codes) for codes in sources) + 2 * config.rows * config.d_qk
    products = tokens * len(sources) * config.rows * (config.d_qk + config.d_v)
    return {
        "bytes": round(counters.global_bytes_read / least, 3),
        "sectors": round(32 * counters.global_sectors_read / least, 3),
        "shared": round(counters.shared_wavefronts / max(counters.shared_ideal, 1), 3),
        "products": round(counters.mma / products, 3),
    }


def bounds(config: CallConfig, arch: str, products: float) -> dict[str, dict[str, object]]:
    """By device: microseconds of a step at least, and what binds. Devices without the room for a block are left out.

    ``products``: multiply-adds over the least, as `ratios` has them.
    """
    sources = [config.codes, config.second_codes][: 1 + config.second]
    row = sum(row_bytes(config, codes) for codes in sources) / len(sources)
    moved = SEQUENCES * (TOKENS * row + 2 * config.rows * (config.d_qk + config.d_v))
    operations = 2 * products * SEQUENCES * TOKENS * config.rows * (config.d_qk + config.d_v)
    found: dict[str, dict[str, object]] = {}
    for peak in PEAKS[arch]:
        if config.shared_bytes <= peak.shared:
            seconds = {"memory": moved / peak.bytes, "products": operations / peak.operations}
            binds = max(seconds, key=lambda each: seconds[each])
            found[peak.name] = {"us": round(1e6 * seconds[binds], 1), "binds": binds}
    return found
