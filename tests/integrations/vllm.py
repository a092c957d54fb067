"""vLLM, which has a venv of its own: where it is, how its processes are run, and a server with its clients."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: The Python of `make vllm`, or another that the environment names.
PYTHON = Path(os.environ.get("FLASHMLA_VLLM_PYTHON", ROOT / ".venv-vllm/bin/python"))
MISSING = "vLLM is not installed: make vllm" if not PYTHON.exists() else ""
#: Seconds that an engine or a server may take.
PATIENCE = 300


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(script: str, job: dict[str, Any]) -> Any:
    """What a script of tests/support says about a job."""
    command = [PYTHON, ROOT / "tests/support" / script]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": PATIENCE}
    done = subprocess.run(command, input=json.dumps(job), env=environment(), **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def free_ports(n: int) -> list[int]:
    sockets = [socket.socket() for _ in range(n)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Server:
    """HTTP and gRPC on the tiny model."""

    def __init__(self, port: int, grpc_port: int) -> None:
        self.url, self.grpc = f"http://127.0.0.1:{port}", f"127.0.0.1:{grpc_port}"

    def post(self, body: dict[str, Any] | bytes, path: str = "/v1/completions") -> tuple[int, Any]:
        """The status and the answer."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        found = re.search(rf"^vllm:{name}{{[^}}]*}} (\S+)$", text, re.MULTILINE)
        assert found, name
        return float(found.group(1))

    def until(self, name: str, wanted: float, seconds: float = 30) -> float:
        """The metric when it is as wanted, or after these seconds."""
        end = time.monotonic() + seconds
        while (value := self.metric(name)) != wanted and time.monotonic() < end:
            time.sleep(0.1)
        return value


@contextmanager
def served(*words: str) -> Iterator[Server]:
    """``make serve`` with these words, on free ports."""
    port, grpc_port = free_ports(2)
    command = [PYTHON, "-m", "flashmla_ops.integrations.vllm", "--port", str(port), "--grpc-port", str(grpc_port)]
    process = subprocess.Popen([*command, *words], env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("gRPC is served"):
                break
        assert process.poll() is None
        yield Server(port, grpc_port)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
