"""Nothing is allocated in steady state but the outputs: every allocation of a process is counted, in all threads."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flashmla_ops import cpu

SOURCE = Path(__file__).parent.parent / "support" / "allocations.c"
#: Outputs here are larger, and what a call needs for its bookkeeping (shapes, lists of tensors) is smaller.
SMALLEST, CALLS = 2048, 10


def calls(dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], int]]:
    """Calls by name, and how many outputs each allocates."""
    ops = torch.ops.flashmla
    table, lengths = torch.arange(32, dtype=torch.int32).view(2, 16), torch.tensor([1000, 700], dtype=torch.int32)
    bounds = torch.tensor([0, 300], dtype=torch.int32)
    q, rows = torch.randn(2, 4, 128, 576).to(dtype), torch.randn(32, 64, 1, 576).to(dtype)
    v_k = torch.randn(32, 8, 64, 256).to(dtype).transpose(1, 2)
    prompt = [torch.randn(300, 16, d).to(dtype) for d in (192, 192, 128)]
    weight, heads = torch.randn(4096, 512).to(dtype), torch.randn(16, 128, 512).to(dtype)
    outs, lses = [torch.randn(4, 128, 512).to(dtype) for _ in range(3)], [torch.randn(128, 4) for _ in range(3)]
    new, slots = torch.randn(3, 1, 576).to(dtype), torch.tensor([5, 9, 70])
    return {
        f"decode {dtype}": (lambda: ops.decode(q, rows, None, table, lengths, 512), 2),
        f"causal decode {dtype}": (lambda: ops.decode(q, rows, None, table, lengths, 512, 0, None, True), 2),
        f"GQA decode {dtype}": (lambda: ops.decode(q[..., :128], v_k, None, table, lengths, 128, 128), 2),
        f"prefill {dtype}": (lambda: ops.prefill(*prompt, bounds, bounds, True), 2),
        f"gemm {dtype}": (lambda: ops.gemm(q[0, 0, :4, :512], weight), 1),
        f"bmm {dtype}": (lambda: ops.bmm(prompt[2][:4].transpose(0, 1), heads), 1),
        f"merge_states {dtype}": (lambda: ops.merge_states(outs, lses), 2),
        f"append_ {dtype}": (lambda: ops.append_(rows, new, slots), 0),
    }


def count_all() -> dict[str, tuple[int, int]]:
    """Allocations of `CALLS` calls by name, and what the outputs alone would be."""
    counter = ctypes.CDLL(None)  # the library that was loaded first is part of the process
    counter.allocations_start.argtypes = [ctypes.c_size_t]
    counter.allocations_stop.restype = ctypes.c_long
    found = {}
    for name, (call, outputs) in (calls(torch.bfloat16) | calls(torch.float32)).items():
        for _ in range(3):
            call()
        counter.allocations_start(SMALLEST)
        for _ in range(CALLS):
            call()
        found[name] = (counter.allocations_stop(), CALLS * outputs)
    return found


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or shutil.which("gcc") is None, reason="needs glibc and gcc")
@pytest.mark.skipif(not cpu.STATE.path, reason="no C++ kernels run here")
def test_nothing_but_outputs(tmp_path: Path) -> None:
    library = tmp_path / "allocations.so"
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-fno-builtin", SOURCE, "-o", library], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.test_allocations"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(done.stdout)
    assert {name: counted for name, (counted, _) in counts.items()} == {name: due for name, (_, due) in counts.items()}


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    print(json.dumps(count_all()))
