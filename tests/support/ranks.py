"""Real processes that talk through gloo, started once and given functions to run."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

SPAWN = torch.multiprocessing.get_context("spawn")
#: Seconds that a function may take on all ranks, and a collective on one.
PATIENCE = 120
TIMEOUT = timedelta(seconds=60)


class Ranks:
    """``n`` processes. `run` calls a function of a module in each of them, as one program on ``n`` ranks."""

    def __init__(self, n: int, folder: Path) -> None:
        store = folder / f"store-{n}"
        pipes = [SPAWN.Pipe() for _ in range(n)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            SPAWN.Process(target=_serve, args=(rank, n, str(store), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        # Each rank has one thread: several of them share the cores.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returns on each rank, which must all return."""
        for pipe in self.pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(PATIENCE) else (False, "no answer") for pipe in self.pipes]
        for rank, (done, value) in enumerate(answers):
            assert done, f"rank {rank}: {value}"
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()


def _serve(rank: int, n: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n, timeout=TIMEOUT)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            pipe.send((True, function(*args)))
        except BaseException:  # what pytest raises where something did not raise is no Exception
            pipe.send((False, traceback.format_exc()))
