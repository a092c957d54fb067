"""Lines that a build writes to stderr while it runs."""

from __future__ import annotations

import sys
import time


def say(text: str, *, lasting: bool = False) -> None:
    """A line on stderr. On a terminal the next one takes its place; elsewhere only lasting ones are printed."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="\n" if lasting else "", file=sys.stderr, flush=True)
    elif lasting:
        print(text, file=sys.stderr, flush=True)


class Progress:
    """Counts how many of ``total`` steps are done, and says so with each.

    On a terminal there is one line, rewritten in place; elsewhere nothing, or with ``log`` a line a step.
    """

    def __init__(self, total: int, *, log: bool = False) -> None:
        self.total, self.log, self.done, self.started = total, log, 0, time.monotonic()

    def step(self, name: str, *, failed: int = 0) -> None:
        self.done += 1
        filled = 24 * self.done // max(1, self.total)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total}"
        failures = f", {failed} failed" if failed else ""
        lasting = self.log and (self.done == self.total or not sys.stderr.isatty())
        say(f"flashmla: {bar} {time.monotonic() - self.started:.0f} s{failures} {name}", lasting=lasting)
