"""Torch's compilation caches with our lowerings: found again by the next process, never found by other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import flashmla_ops
from torch._dynamo.utils import counters

def step(cache, rows, slots):
    torch.ops.flashmla.append_(cache, rows * 2, slots)

cache = torch.zeros(2, 4, 1, 8)
torch.compile(step, backend=sys.argv[2], fullgraph=True)(cache, torch.ones(2, 1, 8), torch.tensor([3, -1]))
assert cache.sum() == 16, cache
hits = counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"]
print("hit" if hits else "miss")
"""


def run(tree: Path, cache: Path, backend: str = "flashmla", script: str = SCRIPT, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, str(tree), backend],
        env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(cache)} | environment,
        cwd=cache,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.slow
def test_a_second_process_hits_and_another_source_misses(tmp_path: Path) -> None:
    tree, cache = tmp_path / "tree", tmp_path / "cache"
    cache.mkdir()
    for name in ("flashmla_build", "flashmla_ops", "lowering"):
        shutil.copytree(ROOT / name, tree / name)
    assert run(tree, cache) == "miss"
    assert run(tree, cache) == "hit"
    assert run(tree, cache, backend="inductor") == "miss"
    assert run(tree, cache, TORCH_COMPILE_CACHE_KEY_TAG="theirs") == "miss"
    for changed in ("lowering/ops/append.py", "lowering/templates/append.h", "lowering/record.py"):
        with (tree / changed).open("a") as source:
            source.write("# changed\n" if changed.endswith(".py") else "// changed\n")
        assert run(tree, cache) == "miss", changed
        assert run(tree, cache) == "hit", changed
