"""Real processes on this machine that talk through gloo, started once and given functions to run."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from flashmla_ops.errors import RankError


class LocalRanks:
    """``n`` processes of one thread each. `run` calls a function of a module in each, as one program on ``n`` ranks.

    A context manager. ``patience``: seconds that a function may take on all ranks; half of it a collective on one.
    """

    def __init__(self, n: int, patience: float = 120.0) -> None:
        self.patience = patience
        self._folder = tempfile.TemporaryDirectory(prefix="flashmla-ranks-")
        store = str(Path(self._folder.name) / "store")
        spawn = torch.multiprocessing.get_context("spawn")
        pipes = [spawn.Pipe() for _ in range(n)]
        self.pipes = [ours for ours, _ in pipes]
        self.processes = [
            spawn.Process(target=_serve, args=(rank, n, store, theirs, patience / 2), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        # OpenMP reads it when it loads. With one thread each, ranks share the cores.
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"
        for process, (_, theirs) in zip(self.processes, pipes, strict=True):
            process.start()
            theirs.close()
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)

    def __enter__(self) -> LocalRanks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, function: Callable[..., Any], *args: Any, ranks: int | None = None) -> list[Any]:
        """What the function returns on each rank, or on the first ``ranks``; `RankError` with the trace of one's error.

        The generator of random numbers is seeded alike on all ranks before.
        """
        pipes = self.pipes[:ranks]
        for pipe in pipes:
            pipe.send((function, args))
        answers = [pipe.recv() if pipe.poll(self.patience) else (False, "no answer") for pipe in pipes]
        for rank, (done, value) in enumerate(answers):
            if not done:
                raise RankError(f"rank {rank}: {value}")
        return [value for _, value in answers]

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            process.kill()
        self._folder.cleanup()


def _serve(rank: int, n: int, store: str, pipe: Connection, patience: float) -> None:
    torch.set_num_threads(1)
    timeout = timedelta(seconds=patience)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=n, timeout=timeout)
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
