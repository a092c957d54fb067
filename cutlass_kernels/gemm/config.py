"""One kernel, described: what `GemmConfig` may be, and why not.

A kernel computes ``d = epilogue(a b)`` with a ``[m, k]`` row-major and, by its family:

    linear   weight [n, k], as in torch.nn.Linear; a batch of such products at constant strides too
    batched  weight [batch, k, n], rows along n: the absorbed W_UK
    grouped  weight [groups, n, k], and rows of a in consecutive runs, one run a group: experts
"""

from __future__ import annotations

from dataclasses import dataclass, field

from cutlass_kernels.errors import ConfigError
from cutlass_kernels.gemm.epilogue import Epilogue

Triple = tuple[int, int, int]

#: Shared memory that one thread block may use, bytes (CUDA C++ Programming Guide, table of compute capabilities).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90a": 227 * 1024}
BYTES = {"bf16": 2, "fp16": 2, "e4m3": 1, "s8": 1, "f32": 4}
#: (a, weight) -> outputs, by architecture: what the tensor cores multiply, and what cutlass_cppgen 4.2 can emit.
TYPES: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "sm_80": {
        ("bf16", "bf16"): ("bf16", "f32"),
        ("fp16", "fp16"): ("fp16", "f32"),
        ("bf16", "s8"): ("bf16",),
        ("s8", "s8"): ("bf16",),
    },
    "sm_90a": {
        ("bf16", "bf16"): ("bf16", "f32"),
        ("fp16", "fp16"): ("fp16", "f32"),
        ("e4m3", "e4m3"): ("bf16",),
    },
}
FAMILIES = ("linear", "batched", "grouped")
SCHEDULES = {"sm_80": ("multistage",), "sm_90a": ("pingpong", "cooperative")}
#: float32 sums that a thread can hold without spilling, measured with ptxas 13.0. On sm_80: 128 with the plain
#: epilogue, 64 grouped or with stream-K (128 spill 20 and 8 bytes). On sm_90a: 128 with the plain one, 64 with any
#: other (128 spill 4,850 bytes).
MOST_SUMS = 128
MOST_SUMS_SM80_PERSISTENT = 64
MOST_SUMS_SM90_FUSED = 64


@dataclass(frozen=True)
class GemmConfig:
    """A kernel. Raises `ConfigError`, which names every broken rule."""

    arch: str
    tile: Triple  # m, n, k of a thread block
    a: str = "bf16"
    weight: str = "bf16"
    d: str = "bf16"
    family: str = "linear"
    warps: Triple = (2, 2, 1)  # sm_80: how warps divide the tile. sm_90a: ignored, must be the default
    stages: int = 3  # sm_80: tiles in flight. sm_90a: 0, as many as fit
    cluster: Triple = (1, 1, 1)
    schedule: str = "multistage"
    stream_k: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)

    def __post_init__(self) -> None:
        if broken := problems(self):
            raise ConfigError(self.name, broken)

    @property
    def name(self) -> str:
        """Unique in the catalogue, a C identifier."""
        types = self.a if (self.a, self.weight) == (self.d, self.d) else f"{self.a}_{self.weight}_{self.d}"
        parts = [self.arch.replace("_", ""), self.family, types, "x".join(map(str, self.tile))]
        if self.arch == "sm_80":
            parts.append(f"w{self.warps[0]}x{self.warps[1]}_s{self.stages}")
        else:
            parts.append(f"c{self.cluster[0]}x{self.cluster[1]}_{self.schedule}")
        return "_".join([*parts, *(["streamk"] if self.stream_k else []), self.epilogue.name])

    @property
    def threads(self) -> int:
        """Threads of a block that hold sums."""
        if self.arch == "sm_80":
            return 32 * self.warps[0] * self.warps[1] * self.warps[2]
        return 256 if self.schedule == "cooperative" else 128

    @property
    def splits(self) -> bool:
        """Whether a call may split k over blocks that add to one output one after the other (serial split-K)."""
        return self.arch == "sm_80" and self.family == "linear" and self.epilogue.plain and not self.stream_k

    @property
    def batches(self) -> bool:
        """Whether a call may have more than one product."""
        return self.family != "grouped" and self.epilogue.plain and not self.stream_k

    def alignment(self, operand: str) -> int:
        """Elements of "a", "weight" or "d" in the 16 bytes that a thread moves: strides and extents are multiples."""
        return 16 // BYTES[{"a": self.a, "weight": self.weight, "d": self.d}[operand]]

    def shared_memory(self) -> int:
        """Bytes of the tiles in flight; on sm_90a, of the two that a pipeline needs at least, and the output's."""
        m, n, k = self.tile
        stage = (m * BYTES[self.a] + n * BYTES[self.weight]) * k
        return stage * self.stages if self.arch == "sm_80" else 2 * stage + m * n * BYTES[self.d]


def problems(config: GemmConfig) -> list[str]:
    """Every rule that a configuration breaks, as "argument: expected ..., got ..."."""
    if config.arch not in TYPES:
        return [f"arch: expected one of {', '.join(TYPES)}, got {config.arch}"]
    if len(config.tile) != 3 or min(config.tile) < 1:
        return [f"tile: expected three positive sizes, got {config.tile}"]
    return [
        *_type_problems(config),
        *config.epilogue.problems(),
        *_family_problems(config),
        *(_sm80_problems(config) if config.arch == "sm_80" else _sm90_problems(config)),
    ]


def _expect(broken: list[str], condition: bool, argument: str, expected: str, actual: object) -> None:
    if not condition:
        broken.append(f"{argument}: expected {expected}, got {actual}")


def _type_problems(config: GemmConfig) -> list[str]:
    broken: list[str] = []
    known = TYPES[config.arch]
    pair = (config.a, config.weight)
    _expect(broken, pair in known, "a, weight", f"one of {sorted(known)} on {config.arch}", pair)
    if pair in known:
        _expect(broken, config.d in known[pair], "d", f"one of {known[pair]} from {pair}", config.d)
    scaled = config.epilogue.row_scale or config.epilogue.col_scale
    narrow = "s8" in pair or "e4m3" in pair
    _expect(broken, scaled or not narrow, "epilogue", f"a scale with {pair}", config.epilogue.name)
    return broken


def _family_problems(config: GemmConfig) -> list[str]:
    broken: list[str] = []
    epilogue = config.epilogue
    _expect(broken, config.family in FAMILIES, "family", f"one of {', '.join(FAMILIES)}", config.family)
    if config.family != "linear":
        # The visitors of both architectures are traced without a batch dimension.
        _expect(broken, epilogue.plain, "epilogue", f"the plain one with {config.family}", epilogue.name)
        _expect(broken, not config.stream_k, "stream_k", f"False with {config.family}", config.stream_k)
        same = config.a == config.weight
        _expect(broken, same, "weight", f"{config.a} with {config.family}, as a", config.weight)
    if config.family == "grouped":
        _expect(broken, config.arch == "sm_80", "arch", "sm_80 with grouped (which sm_90 runs too)", config.arch)
    _expect(broken, not config.stream_k or epilogue.plain, "epilogue", "the plain one with stream-K", epilogue.name)
    return broken


def _sm80_problems(config: GemmConfig) -> list[str]:
    broken: list[str] = []
    (m, n, k), (wm, wn, wk) = config.tile, config.warps
    _expect(broken, config.schedule in SCHEDULES["sm_80"], "schedule", "multistage on sm_80", config.schedule)
    _expect(broken, config.cluster == (1, 1, 1), "cluster", "(1, 1, 1) on sm_80", config.cluster)
    _expect(broken, 3 <= config.stages <= 8, "stages", "3 to 8 on sm_80", config.stages)
    # Slices of k would need a reduction between warps, which halves what the tensor cores gain on these shapes.
    _expect(broken, wk == 1, "warps", "1 along k", wk)
    if min(wm, wn) < 1 or wk != 1:
        return [*broken, f"warps: expected positive numbers, got {config.warps}"] if min(wm, wn) < 1 else broken
    _expect(broken, wm * wn in (2, 4, 8), "warps", "2, 4 or 8 of them", wm * wn)
    fits = m % (16 * wm) == 0 and n % (16 * wn) == 0
    _expect(broken, fits, "tile", f"multiples of 16 for each warp of {config.warps}", config.tile)
    # 64 elements of k: 128 bytes of a row, the swizzle that the shared-memory layouts of CUTLASS 2.x are made for.
    _expect(broken, k in (32, 64), "tile", "32 or 64 along k", k)
    # The epilogue stores 8 rows of a slab at a time, 16 bytes a thread: wn warps must not have more rows than that.
    least = 4 * config.alignment("d") * wn
    _expect(broken, n >= least, "tile", f"at least {least} along n for {wn} warps and {config.d} output", n)
    if fits:
        persistent = config.family == "grouped" or config.stream_k
        most = MOST_SUMS_SM80_PERSISTENT if persistent else MOST_SUMS
        sums = m * n // config.threads
        _expect(broken, sums <= most, "tile", f"at most {most} sums a thread", sums)
    limit = SHARED_MEMORY["sm_80"]
    _expect(broken, config.shared_memory() <= limit, "stages", f"{limit} bytes of tiles", config.shared_memory())
    return broken


def _sm90_problems(config: GemmConfig) -> list[str]:
    broken: list[str] = []
    (m, n, k), (cm, cn, ck) = config.tile, config.cluster
    _expect(broken, config.schedule in SCHEDULES["sm_90a"], "schedule", "pingpong or cooperative", config.schedule)
    _expect(broken, config.stages == 0, "stages", "0 on sm_90a: as many as fit", config.stages)
    _expect(broken, config.warps == (2, 2, 1), "warps", "the default on sm_90a: warp groups divide m", config.warps)
    _expect(broken, cm in (1, 2) and cn in (1, 2) and ck == 1, "cluster", "1 or 2, 1 or 2, 1", config.cluster)
    rows = 128 if config.schedule == "cooperative" else 64  # a warp group multiplies 64 rows
    _expect(broken, m % rows == 0, "tile", f"a multiple of {rows} along m with {config.schedule}", m)
    _expect(broken, n % 16 == 0 and 16 <= n <= 256, "tile", "16 to 256 in steps of 16 along n", n)
    row = k * BYTES.get(config.a, 2)
    _expect(broken, row in (128, 256), "tile", "128 or 256 bytes along k (a TMA swizzle is 128)", row)
    cooperative = config.schedule == "cooperative"
    _expect(broken, cooperative or not config.stream_k, "stream_k", "False unless cooperative", config.stream_k)
    most = MOST_SUMS if config.epilogue.plain else MOST_SUMS_SM90_FUSED
    sums = m * n // config.threads
    _expect(broken, sums <= most, "tile", f"at most {most} sums a thread", sums)
    limit = SHARED_MEMORY["sm_90a"]
    _expect(broken, config.shared_memory() <= limit, "tile", f"{limit} bytes of tiles", config.shared_memory())
    return broken
