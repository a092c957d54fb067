"""Sequences swapped out and back: the rows are the same bytes, and nothing is lost on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmla_ops.errors import OutOfPagesError, PoolBusyError, SwapError
from flashmla_ops.kv_cache import KVPool, Sequence


def pool_of(**options: Any) -> KVPool:
    return KVPool(**{"layers": 2, "n_pages": 8, "page_size": [4, 2], "d": (3, 2), "poison": True} | options)


def written(pool: KVPool, tokens: int) -> Sequence:
    sequence = pool.open(range(tokens))
    count = sequence.pending
    with pool.step([sequence], count) as step:
        for layer in range(2):
            for cache in pool.caches(layer):
                rows = torch.randn(count, *cache.shape[2:])
                torch.ops.flashmla.append_(cache, rows, step.slot_mapping)
    return sequence


def rows_of(pool: KVPool, sequence: Sequence) -> list[torch.Tensor]:
    """The rows of every tensor, in the order of the sequence."""
    with pool.step([sequence], 0) as step:
        found = []
        for layer in pool.storage.layers:
            table = step.block_tables[pool.storage.parts(layer)][0]
            pages = table[: -(-sequence.length // layer.page_size)].long()
            for cache in pool.caches(pool.storage.layers.index(layer)):
                found.append(cache[pages].flatten(0, 1)[: sequence.length].clone())
    return found


@pytest.mark.parametrize("to_file", [False, True])
def test_there_and_back(to_file: bool, tmp_path: Path) -> None:
    pool = pool_of()
    a, b = written(pool, 10), written(pool, 9)
    before = rows_of(pool, a)
    pool.swap_out(a, tmp_path / "a.kv" if to_file else None)
    assert (a.length, a.pages, pool.stats().used) == (10, [], 3)
    pool.release(b)
    pool.evict()
    filler = written(pool, 12)
    pool.swap_in(a)
    torch.testing.assert_close(rows_of(pool, a), before, rtol=0, atol=0)
    assert filler.length == 12
    pool.release(a)
    assert pool.stats().used == 3


def test_a_swapped_sequence_can_be_released() -> None:
    pool = pool_of()
    a = written(pool, 10)
    pool.swap_out(a)
    pool.release(a)
    pool.evict()
    assert pool.stats().free == 8


def test_another_pool_reads_the_file(tmp_path: Path) -> None:
    pool, other = pool_of(), pool_of(n_pages=20)
    a = written(pool, 10)
    before = rows_of(pool, a)
    pool.swap_out(a, tmp_path / "a.kv")
    again = other.restore(tmp_path / "a.kv")
    assert again.tokens.tolist() == list(range(10))
    torch.testing.assert_close(rows_of(other, again), before, rtol=0, atol=0)
    assert other.open(range(10)).cached == 8
    with pytest.raises(SwapError, match="another pool"):
        pool_of(d=(4, 2)).restore(tmp_path / "a.kv")


def test_not_while_a_step_of_it_is_open() -> None:
    pool = pool_of()
    a, b = written(pool, 3), written(pool, 3)
    with pool.step([a]):
        with pytest.raises(PoolBusyError):
            pool.swap_out(a)
        pool.swap_out(b)
    assert a.length == 4


def test_no_room_to_come_back() -> None:
    pool = pool_of()
    a = written(pool, 10)
    pool.swap_out(a)
    filler = written(pool, 27)
    with pytest.raises(OutOfPagesError):
        pool.swap_in(a)
    assert (a.length, pool.stats().used) == (10, 7)
    pool.release(filler)
    pool.swap_in(a)
    assert a.length == 10


@pytest.mark.parametrize("damage", ["cut", "flip", "other", "gone", "empty"])
def test_damage_is_found(damage: str, tmp_path: Path) -> None:
    pool, path = pool_of(), tmp_path / "a.kv"
    a = written(pool, 10)
    pool.swap_out(a, path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "flip":
        data[-5] ^= 1
        path.write_bytes(data)
    elif damage == "other":
        pool.swap_out(written(pool, 10), path)
    elif damage == "gone":
        path.unlink()
    else:
        path.write_bytes(b"")
    with pytest.raises(SwapError):
        pool.swap_in(a)
    pool.evict()
    assert (a.length, pool.stats().used) == (10, 0)


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_swap_that_fails_loses_nothing(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, path = pool_of(), tmp_path / "a.kv"
    first = written(pool, 5)
    pool.swap_out(first, path)
    a = written(pool, 10)
    before, used = rows_of(pool, a), pool.stats().used

    def fails(*_: object) -> None:
        raise OSError("no space left on the disk")

    with monkeypatch.context() as patched:
        if where == "write":
            patched.setattr(os, "fdopen", fails)
        else:
            patched.setattr(os, where, fails)
        with pytest.raises(OSError, match="no space left"):
            pool.swap_out(a, path)
    torch.testing.assert_close(rows_of(pool, a), before, rtol=0, atol=0)
    assert pool.stats().used == used
    assert [each.name for each in tmp_path.iterdir()] == ["a.kv"]
    pool.swap_in(first)  # the file is still the first's


KILLED = """
import os, signal, sys, torch
from flashmla_ops.kv_cache import KVPool
pool = KVPool(n_pages=8, page_size=4, d=2)
for value in (1.0, 2.0):
    sequence = pool.open(range(5))
    with pool.step([sequence], sequence.pending) as step:
        pool.cache().flatten(0, 1)[step.slot_mapping] = value
    if value == 2.0:
        sync = os.fsync
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
    pool.swap_out(sequence, sys.argv[1])
    pool.evict()
"""


def test_a_killed_swap_leaves_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], capture_output=True)
    assert done.returncode == -9
    pool = KVPool(n_pages=8, page_size=4, d=2)
    assert rows_of_one(pool, pool.restore(path)) == [1.0] * 5


def rows_of_one(pool: KVPool, sequence: Sequence) -> list[float]:
    return pool.cache()[sequence.pages].flatten(0, 1)[: sequence.length, 0, 0].tolist()
