"""``python -m flashmla_ops.integrations.vllm``: a model over HTTP (OpenAI's) and over gRPC (vLLM's), by our operators.

vLLM has one of the two in a process, so that there are two servers, each with an engine of its own. Words that are not
ours go to both: ``--kv-cache-dtype fp8``, ``--max-model-len 4096``.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from flashmla_ops.integrations.vllm.checkpoint import TINY, untied

#: What vLLM needs on a machine of a few cores, unless the environment says otherwise. The cache is given in GiB.
SETTINGS = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
NAME = "tiny_mla_lm"
#: Seconds in which a server must answer.
PATIENCE = 300.0


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashmla_ops.integrations.vllm", description=__doc__)
    parser.add_argument("--model", help="a folder or a name on the hub; the trained tiny model without one")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="of HTTP; 0: no such server")
    parser.add_argument("--grpc-port", type=int, default=8001, help="of gRPC; 0: no such server")
    options, rest = parser.parse_known_args(words)
    if find_spec("vllm") is None:
        print("vLLM is not installed in this Python: make serve installs it, in a venv of its own", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            rest = ["--served-model-name", NAME, *rest]
        model = options.model or str(untied(TINY, Path(folder) / NAME))
        return _serve(model, options.host, options.port, options.grpc_port, rest)


def _serve(model: str, host: str, port: int, grpc_port: int, words: Sequence[str]) -> int:
    """Both servers until a signal comes, or one of them ends: 0, or 1 where one ended by itself."""
    command = [sys.executable, "-m", "flashmla_ops.integrations.vllm.server", model, "--host", host, *words]
    ports = {"HTTP": port, "gRPC": grpc_port}
    servers: dict[str, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        for name, at in ports.items():
            if at:
                more = ["--port", str(at), *(["--grpc"] if name == "gRPC" else [])]
                servers[name] = subprocess.Popen([*command, *more], env={**SETTINGS, **os.environ})
        for name, server in servers.items():
            if not _answers(server, host, ports[name]):
                return 1
            print(f"{name} is served at {host}:{ports[name]}", flush=True)
        while all(server.poll() is None for server in servers.values()):
            time.sleep(0.5)
        return 1
    except KeyboardInterrupt:
        return 0
    except TimeoutError as error:
        print(f"flashmla: {error}", file=sys.stderr)
        return 1
    finally:
        for server in servers.values():
            server.terminate()
        for server in servers.values():
            _end(server)


def _answers(server: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until somebody listens at the port; False where the server ends before. Raises TimeoutError."""
    until = time.monotonic() + PATIENCE
    while server.poll() is None:
        with suppress(OSError), socket.create_connection((host, port), timeout=1):
            return True
        if time.monotonic() > until:
            raise TimeoutError(f"no server at port {port} after {PATIENCE:.0f} seconds")
        time.sleep(0.2)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    try:
        server.wait(timeout=30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
