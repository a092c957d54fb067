"""torch.export and AOTInductor: a package of generated kernels runs where this library does not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lowering
from lowering import Settings

STRANGER = """
import sys
import torch
assert "flashmla_ops" not in sys.modules and "lowering" not in sys.modules
package, data = sys.argv[1:]
run = torch._inductor.aoti_load_package(package)
for case in torch.load(data):
    out = run(*case["inputs"])
    torch.testing.assert_close(out, case["out"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(case["inputs"][2], case["cache"], rtol=1e-6, atol=1e-7)
    bad = [*case["inputs"]]
    bad[4] = torch.full_like(bad[4], 10**6)
    try:
        run(*bad)
    except RuntimeError as error:
        print("raised:", error)
assert not any(name.split(".")[0] in ("flashmla_ops", "lowering") for name in sys.modules)
print("ran")
"""


class Layer(torch.nn.Module):
    """Append a row, attend, gate."""

    def forward(self, q: Tensor, rows: Tensor, cache: Tensor, table: Tensor, slots: Tensor, lengths: Tensor) -> Tensor:
        torch.ops.flashmla.append_(cache, torch.tanh(rows).unsqueeze(1), slots)
        out, _ = torch.ops.flashmla.decode(q, cache, None, table, lengths, 32, causal=True)
        return out * torch.sigmoid(q[..., :32])


def case_of(b: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(b)
    q, rows = torch.randn(b, 1, 4, 40, generator=generator), torch.randn(b, 40, generator=generator)
    cache = torch.randn(2 * b, 8, 1, 40, generator=generator)
    table = torch.randperm(2 * b, generator=generator).view(b, 2).int()
    lengths = torch.arange(b, dtype=torch.int32) % 16 + 1
    at = (lengths - 1).long()
    slots = table.long().gather(1, (at // 8)[:, None])[:, 0] * 8 + at % 8
    return q, rows, cache, table, slots, lengths


def exported() -> torch.export.ExportedProgram:
    b, pages = torch.export.Dim("b", min=2, max=64), torch.export.Dim("pages", min=2, max=4096)
    by_batch = ({0: b}, {0: b}, {0: pages}, {0: b}, {0: b}, {0: b})
    return torch.export.export(Layer(), case_of(3), dynamic_shapes=by_batch)


def run_elsewhere(package: Path, data: Path) -> subprocess.CompletedProcess[str]:
    """In a folder and a process where nothing of ours is imported."""
    command = [sys.executable, "-c", STRANGER, str(package), str(data)]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True)


def save_cases(path: Path) -> None:
    cases = []
    for b in (3, 2, 7):
        inputs = case_of(b)
        expected = [x.clone() for x in inputs]
        out = Layer()(*expected)
        cases.append({"inputs": inputs, "out": out, "cache": expected[2]})
    torch.save(cases, path)


def test_a_package_of_generated_kernels_runs_without_the_library(tmp_path: Path) -> None:
    with lowering.active(Settings(decode="template")):
        package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "layer.pt2"))
    save_cases(tmp_path / "cases.pt")
    done = run_elsewhere(Path(package), tmp_path / "cases.pt")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ran"
    assert done.stdout.count("raised") == 3
    assert "slot_mapping" in done.stdout + done.stderr  # AOTInductor's runtime prints the reason and raises without it


@pytest.mark.slow
def test_a_package_that_calls_the_library_says_what_is_missing(tmp_path: Path) -> None:
    package = torch._inductor.aoti_compile_and_package(exported(), package_path=str(tmp_path / "layer.pt2"))
    save_cases(tmp_path / "cases.pt")
    done = run_elsewhere(Path(package), tmp_path / "cases.pt")
    assert done.returncode != 0
    assert "flashmla" in done.stderr.splitlines()[-1]
