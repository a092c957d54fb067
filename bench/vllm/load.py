"""A server under load: many clients at once, requests of mixed lengths, clients that die, wrong requests."""

from __future__ import annotations

import queue
import random
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.vllm.server import Server

#: Tokens of a sequence.
MAX_LENGTH = 2048
#: Half of the prompts begin with one of so many, of so many tokens.
SYSTEM_PROMPTS, SYSTEM_TOKENS = 8, 128
VOCABULARY = range(3, 2048)
MODEL = "model"
#: Wrong in one way each, and the status that vLLM answers with. ``bytes``: no JSON.
WRONG: dict[str, tuple[dict[str, Any] | bytes, int]] = {
    "longer than the model takes": ({"prompt": [3] * (MAX_LENGTH + 1)}, 400),
    "more tokens than the model takes": ({"prompt": [3], "max_tokens": 10**6}, 400),
    "no such token": ({"prompt": [10**7]}, 400),
    "more answers than there may be": ({"prompt": [3], "n": 10**6}, 400),
    "no such model": ({"prompt": [3], "model": "other"}, 404),
    "cut JSON": (b'{"model": "model", "prompt": ', 400),
    "no text": (b"\xff\xfe", 400),
}


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    tokens: int

    def body(self) -> dict[str, Any]:
        usage = {"stream_options": {"include_usage": True}}
        return {"model": MODEL, "prompt": self.prompt, "max_tokens": self.tokens, "ignore_eos": True, **usage}


def trace(requests: int, seed: int = 0) -> list[Request]:
    """Log-normal lengths, as in the traces that servers publish, but shorter."""
    draw = random.Random(seed)
    systems = [draw.choices(VOCABULARY, k=SYSTEM_TOKENS) for _ in range(SYSTEM_PROMPTS)]
    made = []
    for _ in range(requests):
        own = min(1024, max(1, int(draw.lognormvariate(4.8, 0.9))))
        system = draw.choice(systems) if draw.random() < 0.5 else []
        made.append(
            Request(system + draw.choices(VOCABULARY, k=own), min(256, max(1, int(draw.lognormvariate(3.4, 0.8)))))
        )
    return made


@dataclass(frozen=True)
class Answer:
    """Seconds from the request to its first token, and to its last; ``tokens`` that came, or why none did."""

    first: float
    last: float
    tokens: int
    error: str = ""


def ask(server: Server, request: Request) -> Answer:
    start = time.perf_counter()
    first, tokens = 0.0, 0
    try:
        for piece in server.stream(request.body()):
            if piece["choices"] and not first:
                first = time.perf_counter() - start
            if piece.get("usage"):
                tokens = piece["usage"]["completion_tokens"]
    except (OSError, ValueError) as error:
        return Answer(first, time.perf_counter() - start, tokens, f"{type(error).__name__}: {error}")
    return Answer(first, time.perf_counter() - start, tokens)


def run(server: Server, requests: Sequence[Request], clients: int) -> tuple[list[Answer], float]:
    """The answers, in the order of the requests, of so many clients at once, and the seconds that all of it took."""
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for at in range(len(requests)):
        todo.put(at)
    answers: dict[int, Answer] = {}

    def client() -> None:
        while True:
            try:
                at = todo.get_nowait()
            except queue.Empty:
                return
            answers[at] = ask(server, requests[at])

    threads = [threading.Thread(target=client) for _ in range(clients)]
    start = time.perf_counter()
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    return [answers[at] for at in range(len(requests))], time.perf_counter() - start


def kill_clients(server: Server, n: int) -> None:
    """Clients with long answers, each killed after its first token."""
    body = Request([3, 4, 5], MAX_LENGTH - 8).body()
    started: list[subprocess.Popen[bytes]] = [server.client(body) for _ in range(n)]
    for client in started:
        with client:
            assert client.stdout is not None
            client.stdout.readline()
            client.send_signal(signal.SIGKILL)


def wrong_requests(server: Server) -> list[str]:
    """The names of wrong requests that did not get a typed error with the status that they should."""
    failed = []
    for name, (body, status) in WRONG.items():
        full = body if isinstance(body, bytes) else {"model": MODEL, "max_tokens": 4, **body}
        code, answer = server.post(full)
        if code != status or not answer["error"]["type"] or not answer["error"]["message"]:
            failed.append(name)
    return failed


@dataclass(frozen=True)
class Summary:
    """Of all requests to a server. Times are seconds."""

    requests: int
    lost: int  # without as many tokens as they asked for
    tokens_per_second: float
    first_p50: float
    first_p99: float
    last_p50: float
    last_p99: float

    def as_dict(self) -> Mapping[str, Any]:
        return asdict(self)


def summarize(requests: Sequence[Request], answers: Sequence[Answer], seconds: float) -> Summary:
    lost = sum(bool(a.error) or a.tokens != r.tokens for r, a in zip(requests, answers, strict=True))

    def percentiles(values: list[float]) -> tuple[float, float]:
        cuts = statistics.quantiles(values, n=100, method="inclusive")
        return cuts[49], cuts[98]

    first, last = percentiles([a.first for a in answers]), percentiles([a.last for a in answers])
    return Summary(len(requests), lost, sum(a.tokens for a in answers) / seconds, *first, *last)
