"""A server of vLLM in a process of its own, and what clients ask of it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from bench import vllm

JSON = {"Content-Type": "application/json"}
COMPLETIONS = "/v1/completions"
#: Seconds that an answer may take.
PATIENCE = 300


class Server:
    """HTTP at one port, and gRPC at another (0: none)."""

    def __init__(self, port: int, grpc_port: int = 0) -> None:
        self.port = port
        self.url, self.grpc = f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"

    def post(self, body: Mapping[str, Any] | bytes) -> tuple[int, Any]:
        """The status and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        try:
            request = urllib.request.Request(self.url + COMPLETIONS, data, JSON)
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def stream(self, body: Mapping[str, Any]) -> Iterator[Any]:
        """The pieces of an answer as they come. Raises OSError where there is none."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("POST", COMPLETIONS, json.dumps({**body, "stream": True}), JSON)
            answer = connection.getresponse()
            if answer.status != 200:
                raise OSError(f"status {answer.status}: {answer.read()[:300]!r}")
            for line in answer:
                if line.startswith(b"data: ") and b"[DONE]" not in line:
                    yield json.loads(line[6:])
        finally:
            connection.close()

    def client(self, body: Mapping[str, Any]) -> subprocess.Popen[bytes]:
        """A process that streams an answer, and prints its pieces."""
        request = f"u.Request({self.url + COMPLETIONS!r}, {json.dumps({**body, 'stream': True}).encode()!r}, {JSON})"
        read = f"import urllib.request as u\nfor line in u.urlopen({request}): print(line, flush=True)"
        return subprocess.Popen([sys.executable, "-c", read], stdout=subprocess.PIPE)

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=PATIENCE) as answer:
            text = answer.read().decode()
        found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        if found is None:
            raise LookupError(name)
        return float(found.group(1))

    def until(self, name: str, wanted: float, seconds: float = 30) -> float:
        """The metric when it is as wanted, or after these seconds."""
        end = time.monotonic() + seconds
        while (value := self.metric(name)) != wanted and time.monotonic() < end:
            time.sleep(0.1)
        return value


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@contextmanager
def served(words: Sequence[str], *, ours: bool = True, grpc: bool = False, threads: int = 1) -> Iterator[Server]:
    """``make serve`` with these words, on free ports; with vLLM's own attention where it is not to be ours.

    Raises RuntimeError where it does not come up.
    """
    port, grpc_port = free_ports(2)
    command = [str(vllm.python()), "-m", "flashmla_ops.integrations.vllm", "--port", str(port)]
    command += ["--grpc-port", str(grpc_port if grpc else 0), *words]
    environment = vllm.environment(threads, ours=ours)
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    last = f"{'gRPC' if grpc else 'HTTP'} is served"
    try:
        if not any(line.startswith(last) for line in process.stdout):
            raise RuntimeError(f"no server: {' '.join(command)}")
        # A server that writes a line for each request waits for ever where nobody reads them.
        threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
        yield Server(port, grpc_port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
