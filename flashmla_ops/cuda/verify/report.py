"""Results of a verification: as JSON, and docs/cuda_attention.md, which is made from it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cutlass_kernels.tables import markdown

Row = Mapping[str, Any]
#: Why nothing misses a synchronising instruction that was left out: the first of these that its text begins with.
#: All but the last are for what a device may do, and the emulator does not (`emulator.LIMITS`).
REASONS = {
    "bar.warp.sync": "lanes of a warp run in step here; on a device one must not arrive for others that still read",
    "bar.sync 3": "a wait ends a product for all four warps here; on a device another one may still read the keys",
    "wgmma.fence": "registers of the product were only read since the last fence, which only a device minds",
    "fence.proxy.async": "that of who waits for a tile's first block, which is for the queries, serves the block too",
}
RESULTS = Path("bench/results/cuda_attention.json")
PAGE = Path("docs/cuda_attention.md")


@dataclass(frozen=True)
class KernelResult:
    """A kernel. ``state``: "verified", "wrong", "hazards" or "not run", and ``why`` for the last three."""

    name: str
    arch: str
    kind: str
    state: str
    why: str = ""
    runs: int = 0
    error: float = 0.0  # the largest one, over what is allowed
    seconds: float = 0.0
    registers: int = 0
    stack_bytes: int = 0
    shared_bytes: int = 0
    ratios: dict[str, float] = field(default_factory=dict)  # counted over the least that is needed
    bounds: dict[str, dict[str, object]] = field(default_factory=dict)  # modelled, by device
    mutants: int | None = None
    detected: int | None = None
    undetected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{self.name} {self.arch}: {self.state}, {self.runs} runs, error {self.error:.2f} of what is allowed"
        text += f", {self.registers} registers, {self.stack_bytes} bytes of local memory, {self.seconds:.1f} s"
        if self.mutants is not None:
            text += f", {self.detected} of {self.mutants} mutants noticed"
        return " ".join([text, self.why, *self.undetected]).strip()


def write(path: Path, results: Iterable[KernelResult], dsl: str) -> None:
    """Results by name and architecture into a file; those of kernels that were not verified this time stay.

    So do mutants of a kernel that was verified without them.
    """
    known = {(row["arch"], row["name"]): row for row in load(path)["kernels"]} if path.exists() else {}
    for result in results:
        row, before = asdict(result), known.get((result.arch, result.name), {})
        if result.mutants is None:
            row |= {name: before[name] for name in ("mutants", "detected", "undetected") if name in before}
        known[result.arch, result.name] = row
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"dsl": dsl, "kernels": [known[key] for key in sorted(known)]}, indent=1) + "\n")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def reason(undetected: str) -> str | None:
    """Why a kernel does not miss an instruction, "line N: TEXT"; None if no reason is known."""
    text = undetected.partition(": ")[2]
    return next((why for start, why in REASONS.items() if text.startswith(start)), None)


def page(results: Mapping[str, Any]) -> str:
    """docs/cuda_attention.md."""
    rows: list[Row] = results["kernels"]
    parts = [_summary(rows, results["dsl"]), _kernels(rows), _local(rows), _bounds(rows), _mutants(rows)]
    return "\n\n".join(["# Attention kernels on CUDA, verified in the emulator", *parts]) + "\n"


def _summary(rows: Sequence[Row], dsl: str) -> str:
    verified, runs = (sum(row["state"] == "verified" for row in rows), sum(row["runs"] for row in rows))
    return (
        "Nothing of this page ran on hardware; [cuda.md](cuda.md#on-a-gpu) says what did. Made by"
        f" `python -m flashmla_ops verify` with {dsl}: {verified} of {len(rows)} kernels verified in {runs} runs,"
        " without a hazard.\n\n"
        "Each kernel of the catalogue runs through the operators that it serves, with copies landing as late and as"
        " early as they may: lengths of 0, 1 and around the borders of tiles, causal masks, sinks, several query"
        " tokens, one sequence in several parts, indices that name nothing; and NaN in every row that no query may"
        ' read. "error" is the largest distance of a query\'s result from float64, over what is allowed'
        " ([`trials.py`](../flashmla_ops/cuda/verify/trials.py)); caches and schedules must be right bit for bit."
    )


def _kernels(rows: Sequence[Row]) -> str:
    counted = ["bytes", "sectors", "shared", "products"]
    header = ["kernel", "for", "state", "runs", "error", "registers", *counted, "mutants"]
    table = []
    for row in rows:
        state = row["state"] + (f": {_one_line(row['why'])}" if row["why"] else "")
        ratios = [f"{row['ratios'][name]:.2f}" if row["ratios"] else "–" for name in counted]
        mutants = "–" if row["mutants"] is None else f"{row['detected']}/{row['mutants']}"
        counts = (row["runs"], f"{row['error']:.2f}", row["registers"], *ratios, mutants)
        table.append([f"`{row['name']}`", row["arch"], state, *counts])
    return (
        "## Kernels\n\n"
        "Registers are those that a thread begins with; kernels named sm90 then move them between warpgroups. The next"
        " four columns are counted over the least that the work needs, in one block whose query rows are all used, on"
        " eight tiles of each cache: bytes that threads read from memory, the 32-byte sectors around them (again for"
        " each instruction that touches one, which a cache may serve), passes over shared memory (wgmma and what it"
        " reads are not among them), and multiply-adds of tensor cores. Mutants:"
        " noticed of those [below](#mutants).\n\n" + markdown(header, table, texts=3)
    )


def _local(rows: Sequence[Row]) -> str:
    having = [row for row in rows if row["stack_bytes"]]
    table = [[f"`{row['name']}`", row["arch"], row["registers"], row["stack_bytes"]] for row in having]
    text = f"## Local memory\n\nIt should be 0 bytes, as it is in {len(rows) - len(having)} of {len(rows)} kernels."
    if having:
        text += " The others keep a little there:\n\n"
        text += markdown(["kernel", "for", "registers", "bytes a thread"], table, texts=2)
    return text


def _bounds(rows: Sequence[Row]) -> str:
    by_name: dict[str, dict[str, str]] = {}
    for row in rows:
        for device, bound in row["bounds"].items():
            by_name.setdefault(row["name"], {})[device] = f"{bound['us']:.0f} ({bound['binds']})"
    devices = sorted({device for found in by_name.values() for device in found})
    table = [[f"`{name}`", *(found.get(device, "–") for device in devices)] for name, found in by_name.items()]
    return (
        "## Bounds, modelled\n\n"
        "Microseconds that a decode step of 128 sequences of 4096 rows (half of each cache, if there are two) takes"
        " at least, with as many query rows as one block has: rows, queries and results, each once, over the memory"
        " bandwidth of the data sheet, or the counted multiply-adds over the tensor cores' rate, whichever is more."
        " It is a model: no kernel was timed for it. –: not built for this device, or it has no room for a block.\n\n"
        + markdown(["kernel", *devices], table)
    )


def _mutants(rows: Sequence[Row]) -> str:
    surveyed = [row for row in rows if row["mutants"] is not None]
    found, every = (sum(row[name] for row in surveyed) for name in ("detected", "mutants"))
    text = (
        "## Mutants\n\n"
        "With `--mutations` each wait, barrier, arrival and fence that a kernel executes is left out in turn, and what"
        " is not missed alone is left out with the others that are not. A mutant counts as noticed if a hazard is"
        f" reported, the emulator stops, or a result is wrong. Noticed: {found} of {every}, in {len(surveyed)} kernels;"
        " some of these, such as those that combine and merge, have no synchronisation but within a warp."
    )
    table = []
    for row in surveyed:
        for why, count in Counter(map(reason, row["undetected"])).items():
            start = next((start for start, known in REASONS.items() if known == why), "others")
            table.append([f"`{row['name']}`", row["arch"], f"`{start}`", why or "unknown", count])
    if table:
        header = ["kernel", "for", "instruction", "why it is not missed", "of them"]
        text += "\n\n" + markdown(header, table, texts=4)
    return text


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")[:120]
