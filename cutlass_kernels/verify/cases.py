"""Which problems a kernel is verified on: the smallest, odd ones past a tile, large k, batches, splits, groups."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cutlass_kernels.config import GemmConfig


@dataclass(frozen=True)
class Case:
    """A problem. ``groups`` has the rows of each group of a grouped kernel, whose sum is m."""

    m: int
    n: int
    k: int
    fill: str = "normal"  # or "integers": small ones, whose sums are exact
    batch: int = 1
    splits: int = 1
    groups: tuple[int, ...] = ()
    optional: bool = True  # scales and bias given; or null pointers
    c: str = "matrix"  # plain epilogues: "matrix", "row" (a bias through a stride of 0) or "none"
    strided: bool = False  # rows are longer than what is used of them
    seed: int = 0

    def __str__(self) -> str:
        text = f"{self.m}x{self.n}x{self.k} {self.fill}"
        for name, default in (("batch", 1), ("splits", 1), ("groups", ()), ("c", "matrix")):
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
    ]
    if config.batches:
        cases += [Case(7, tile_n, tile_k + step_k, fill, batch=3, strided=True) for fill in ("integers", "normal")]
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
    ]
