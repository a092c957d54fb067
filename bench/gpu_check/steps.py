"""A step of the check in a process of its own.

A kernel that reads where it may not ends CUDA's context for good, and one that waits for what never comes ends nothing
at all. So a step runs elsewhere and tells its rows; where it ends early or is silent for too long, what it was at is a
row that failed, and a new process goes on behind it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.gpu_check.report import Report, Row

#: A step: `gemms.check`, say. It writes to a report, and takes its items from `Report.until_late`.
Step = Callable[..., object]
#: Seconds that a process may take to import everything.
START = 120.0


class Told(Report):
    """The report in a step's process: rows go to the process that started it. ``begun``: items to pass over."""

    def __init__(self, connection: Connection, deadline: float, begun: Mapping[str, int]) -> None:
        super().__init__(None, deadline)
        self.connection, self.begun = connection, begun

    def add(self, section: str, row: Row) -> None:
        self.connection.send((section, row))

    def until_late(self, section: str, items: Iterable[Any], reserve: float) -> Iterator[Any]:
        start = self.begun.get(section, 0)
        left = list(items)[start:]
        for number, item in enumerate(super().until_late(section, left, reserve), start + 1):
            self.connection.send((section, number, str(getattr(item, "name", item))))
            yield item
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises for good once a kernel has failed: the process has to end


def run(report: Report, patience: float, step: Step, *arguments: object) -> None:
    """Run a step, and add its rows to the report. ``patience``: seconds that an item may take."""
    begun: dict[str, int] = {}
    while not _run_once(report, patience, begun, step, arguments):
        pass


def _run_once(
    report: Report, patience: float, begun: dict[str, int], step: Step, arguments: tuple[object, ...]
) -> bool:
    """One process; whether the step is done."""
    context = multiprocessing.get_context("spawn")  # a fork has no use of CUDA
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(sender, report.deadline, begun, step, arguments))
    process.start()
    sender.close()
    section, name, answered = step.__module__.rsplit(".", 1)[-1], "start", False
    at_item, why = False, ""
    while True:
        wait = min(patience if at_item else START, max(1.0, report.deadline - time.monotonic()))
        if not receiver.poll(wait):
            why = f"no answer for {wait:.0f} s"
            break
        try:
            message = receiver.recv()
        except (EOFError, OSError):
            break
        if message is None:
            process.join()
            return True
        if len(message) == 2:
            answered = True
            report.add(*message)
        else:
            section, begun[message[0]], name = message
            answered, at_item = False, True
    if why:
        process.kill()
    process.join()
    if not answered:
        report.add(section, {"name": name, "state": "failed", "why": why or f"its process ended: {process.exitcode}"})
    return not at_item or report.late()


def _serve(
    connection: Connection, deadline: float, begun: dict[str, int], step: Step, arguments: tuple[object, ...]
) -> None:
    step(Told(connection, deadline, begun), *arguments)
    connection.send(None)
