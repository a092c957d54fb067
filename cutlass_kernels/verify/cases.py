"""Which problems a kernel is verified on: the smallest, odd ones past a tile, large k, batches, splits, groups, NaN."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cutlass_kernels.gemm.config import GemmConfig


@dataclass(frozen=True)
class Case:
    """A problem. ``groups`` has the rows of each group of a grouped kernel, whose sum is m."""

    m: int
    n: int
    k: int
    fill: str = "normal"  # "integers": small ones, whose sums are exact; "special": NaN, infinities, subnormal numbers
    batch: int = 1
    splits: int = 1
    groups: tuple[int, ...] = ()
    offsets: tuple[int, ...] = ()  # what says where groups start; none: their true starts
    optional: bool = True  # scales and bias given; or null pointers
    c: str = "matrix"  # plain epilogues: "matrix", "row" (a bias through a stride of 0) or "none"
    strided: bool = False  # rows are longer than what is used of them
    sm_count: int = 0  # multiprocessors for a persistent kernel, so that a block has several tiles; 0: all
    seed: int = 0

    def __str__(self) -> str:
        text = f"{self.m}x{self.n}x{self.k} {self.fill}"
        for name, default in (
            ("batch", 1),
            ("splits", 1),
            ("groups", ()),
            ("offsets", ()),
            ("c", "matrix"),
            ("sm_count", 0),
        ):
            if (value := getattr(self, name)) != default:
                text += f" {name}={value}"
        return text + ("" if self.optional else " nulls") + (" strided" if self.strided else "")


def cases_of(config: GemmConfig) -> list[Case]:
    """Every case of a kernel, cheapest first."""
    tile_m, tile_n, tile_k = config.tile
    step_n = config.alignment("d")
    if config.family == "batched":
        step_n = max(step_n, config.alignment("weight"))
    step_k = max(config.alignment("a"), config.alignment("weight"))
    if config.family == "grouped":
        return _grouped_cases(config, step_n, step_k)
    small = Case(1, step_n, step_k, "integers")
    odd = Case(tile_m + 3, tile_n + step_n, 2 * tile_k + step_k, "integers", strided=True)
    cases = [
        small,
        replace(small, fill="normal", optional=False, c="none"),
        odd,
        # On sm_80 a stride of 0 makes a bias of c.
        replace(odd, fill="normal", c="row" if config.arch == "sm_80" else "matrix"),
        Case(5, 2 * step_n, 2048, "integers"),
        Case(5, 2 * step_n, 2048 + step_k),
        Case(tile_m, tile_n, (config.stages or 4) * tile_k, optional=False),
        Case(11, 3 * step_n, tile_k + step_k, "special"),
    ]
    if config.batches:
        cases += [Case(7, tile_n, tile_k + step_k, fill, batch=3, strided=True) for fill in ("integers", "normal")]
    if config.arch == "sm_90a":
        cases += [Case(4 * tile_m + 3, tile_n + step_n, 2 * tile_k + step_k, "integers", sm_count=2)]
    if config.splits:
        cases += [Case(9, tile_n, 5 * tile_k, fill, splits=3) for fill in ("integers", "normal")]
    return cases


def _grouped_cases(config: GemmConfig, step_n: int, step_k: int) -> list[Case]:
    tile_m, tile_n, tile_k = config.tile
    groups = (5, 0, tile_m + 1, 1)
    rows = sum(groups)
    return [
        Case(1, step_n, step_k, "integers", groups=(1,)),
        Case(rows, tile_n + step_n, 2 * tile_k + step_k, "integers", groups=groups, strided=True),
        Case(rows, tile_n + step_n, 2 * tile_k + step_k, groups=groups),
        Case(3, step_n, 1024, groups=(0, 0, 3)),
        Case(11, 3 * step_n, tile_k + step_k, "special", groups=(4, 0, 7)),
        # Garbage, which must be cut to the rows that there are.
        Case(11, step_n, step_k, "integers", groups=(4, 7, 0), offsets=(-7, 4, 2**31 - 1, 9)),
        Case(4 * tile_m, 2 * tile_n, tile_k, "integers", groups=(3 * tile_m, 0, tile_m), sm_count=1),
    ]


def mutation_cases(config: GemmConfig) -> list[Case]:
    """Cases that pass through all of a kernel's synchronisation: every buffer is used again, and k is split."""
    m, n, k = config.tile
    if config.family == "grouped":
        return [Case(8 * m, n, 2 * config.stages * k, groups=(5 * m, 0, 3 * m), sm_count=1)]
    if config.arch == "sm_90a" and not config.stream_k:
        # At most 14 tiles of k are in flight, over tiles of d that belong to one block.
        return [Case(6 * m * config.cluster[0], n * config.cluster[1], 6 * k, sm_count=config.cluster[0])]
    cases = [Case(m, n, (config.stages or 6) * k * 2)]
    if config.stream_k:
        # Enough for several blocks, and few enough blocks to look for races between them.
        cases += [Case(m, n, 32 * k, sm_count=8)]
    return [*cases, Case(m, n, 4 * k, splits=2)] if config.splits else cases
