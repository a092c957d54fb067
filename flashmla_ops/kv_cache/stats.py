"""A pool in numbers and in sentences."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flashmla_ops.kv_cache.sizes import in_words
from flashmla_ops.kv_cache.storage import Storage
from flashmla_ops.kv_cache.tables import PageCounts


@dataclass(frozen=True)
class PoolStats:
    """Pages are those of the pool, each with its rows in all layers; shares lie in [0, 1]."""

    n_pages: int
    page_size: int  # tokens
    free: int
    used: int
    shared: int  # of the used ones: held by several sequences
    evictable: int  # held by nobody but the prefix cache
    deferred: int  # released, but a step that is open may read them
    reserved: int  # of the used ones: for tokens to come
    peak: int  # the most that were used at once
    sequences: int
    open_steps: int
    tokens: int  # rows in used pages, a shared one counted once
    utilisation: float  # of the rows of used pages: how many hold a token
    internal_fragmentation: float  # the others
    external_fragmentation: (
        float  # of the free pages: those outside the longest free run. Costs no page, only compaction
    )
    lookups: int  # tokens that prompts could have had from the prefix cache
    hits: int  # those that they had
    hit_rate: float
    collisions: int
    evictions: int
    bytes: int
    page_bytes: int
    token_bytes: dict[str, int]  # by row format, in all its layers

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def share(part: int, whole: int, of_nothing: float = 0.0) -> float:
    return part / whole if whole else of_nothing


def gather(
    counts: PageCounts, storage: Storage, sequences: int, open_steps: int, lookups: tuple[int, int, int]
) -> PoolStats:
    """``lookups``: tokens looked up and found, and collisions."""
    looked_up, found, collisions = lookups
    utilisation = share(counts.rows, counts.used * storage.page_size, 1.0)
    token_bytes: dict[str, int] = {}
    for layer in storage.layers:
        token_bytes[layer.format] = token_bytes.get(layer.format, 0) + layer.token_bytes
    return PoolStats(
        n_pages=storage.n_pages,
        page_size=storage.page_size,
        free=counts.free,
        used=counts.used,
        shared=counts.shared,
        evictable=counts.evictable,
        deferred=counts.deferred,
        reserved=counts.reserved,
        peak=counts.peak,
        sequences=sequences,
        open_steps=open_steps,
        tokens=counts.rows,
        utilisation=utilisation,
        internal_fragmentation=1 - utilisation,
        external_fragmentation=share(counts.free - counts.longest_free, counts.free),
        lookups=looked_up,
        hits=found,
        hit_rate=share(found, looked_up),
        collisions=collisions,
        evictions=counts.evictions,
        bytes=storage.n_bytes,
        page_bytes=storage.page_bytes,
        token_bytes=token_bytes,
    )


def explain(stats: PoolStats, storage: Storage) -> str:
    """The pool in a few sentences."""
    capacity = stats.n_pages * stats.page_size
    layers = f" x {len(storage.layers)} layer{'s' * (len(storage.layers) != 1)}" if storage.layers else ""
    pages = f"{stats.n_pages:,} pages of {stats.page_size} tokens{layers}"
    lines = [f"{in_words(stats.bytes)} hold {pages}: {capacity:,} tokens."]
    for name, size in stats.token_bytes.items():
        lines.append(f"A token takes {size:,} bytes as {name}.")
    lines.append(
        f"{stats.used:,} pages are used by {stats.sequences:,} sequences ({stats.utilisation:.1%} of their rows hold"
        f" tokens, {stats.shared:,} pages are shared), {stats.free:,} are free."
    )
    if stats.evictable:
        lines.append(f"{stats.evictable:,} pages are kept for prompts that begin alike, until they are needed.")
    if stats.deferred:
        lines.append(f"{stats.deferred:,} released pages wait for {stats.open_steps:,} open steps.")
    if stats.reserved:
        lines.append(f"{stats.reserved:,} used pages are reserved for tokens to come.")
    if stats.lookups:
        lines.append(f"{stats.hit_rate:.1%} of the tokens of prompts were in the prefix cache.")
    return "\n".join(lines)
