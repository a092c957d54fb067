"""Checks programs in processes of their own, so that one that dies or hangs is a failure that was found."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection
from queue import Queue
from typing import Any
from unittest.mock import patch

from tests.lowering.fuzz.check import Outcome
from tests.lowering.fuzz.generate import generate
from tests.lowering.fuzz.program import Program

#: Seconds that one program may take before it counts as hanging.
LIMITS = {"passes": 120.0, "whole": 400.0}
STARTING = 900.0
#: Programs after which a process is replaced: compilers keep memory.
LIFETIME = 300

Job = tuple[Program | int, str]


def _serve(connection: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with open(os.devnull, "w") as nowhere:  # compilers print warnings, and what died says so in its exit code
        os.dup2(nowhere.fileno(), 2)
    import torch

    import flashmla_ops  # noqa: F401 (defines torch.ops.flashmla)
    from tests.lowering.fuzz.check import check

    torch.set_num_threads(1)
    connection.send(None)
    while (job := connection.recv()) is not None:
        program, mode = job
        try:
            made = generate(program, mode) if isinstance(program, int) else program
            outcome = check(made, mode)
        except Exception as error:  # a fault of the fuzzer
            outcome = Outcome("died", f"the fuzzer: {type(error).__name__}", str(error)[:300])
        connection.send(outcome)


class Worker:
    """One process, started again when it died, hung or is old."""

    def __init__(self) -> None:
        self._process: Any = None
        self._connection: Any = None
        self._served = 0

    def __call__(self, program: Program | int, mode: str) -> Outcome:
        if self._process is None or self._served >= LIFETIME:
            self._start()
        self._served += 1
        try:
            self._connection.send((program, mode))
            if not self._connection.poll(LIMITS[mode]):
                self.stop()
                return Outcome("hang", f"more than {LIMITS[mode]:.0f} s")
            outcome: Outcome = self._connection.recv()
            return outcome
        except (EOFError, ConnectionError):
            self._process.join(10)
            code = self._process.exitcode
            self.stop()
            return Outcome("died", f"exit code {code}")

    def _start(self) -> None:
        self.stop()
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._served = 0
        if self._connection.poll(STARTING):  # the first import compiles kernels
            self._connection.recv()

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process = None


def check_all(jobs: Iterable[Job], n_workers: int) -> Iterator[tuple[Job, Outcome]]:
    """The outcomes of programs, or of seeds, as they come; a job is a program or a seed, and its mode."""
    waiting: Iterator[Job] = iter(jobs)
    lock = threading.Lock()
    done: Queue[tuple[Job, Outcome] | None] = Queue()
    stopped = threading.Event()

    def work() -> None:
        worker = Worker()
        try:
            while not stopped.is_set():
                with lock:
                    job = next(waiting, None)
                if job is None:
                    break
                done.put((job, worker(*job)))
        finally:
            worker.stop()
            done.put(None)

    with own_cache():
        threads = [threading.Thread(target=work, daemon=True) for _ in range(n_workers)]
        for thread in threads:
            thread.start()
        running = n_workers
        try:
            while running:
                if (each := done.get()) is None:
                    running -= 1
                else:
                    yield each
        finally:
            stopped.set()


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """Put generated code into a folder that is removed: thousands of programs are of no use later."""
    with (
        tempfile.TemporaryDirectory(prefix="flashmla_fuzz_", ignore_cleanup_errors=True) as folder,
        patch.dict(os.environ, TORCHINDUCTOR_CACHE_DIR=folder),
    ):
        yield
