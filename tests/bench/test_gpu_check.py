"""The check of CUDA kernels, as far as it goes without a device: its report, its calls, what it packs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.gpu_check import __main__, attention, caches, gemms, limits, operators, pack, steps, timing
from bench.gpu_check.report import Report, file_name, table
from cutlass_kernels.build import libraries
from cutlass_kernels.gemm.catalogue import kernels
from cutlass_kernels.gemm.config import GemmConfig
from flashmla_ops.cuda.catalogue import DEVICES, shipped
from tests.cuda.interpreter import Interpreter

CALLS = {call.name: call for call in operators.calls("cpu")}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return Report(tmp_path / "report.json", time.monotonic() + 3600, {"device": "none"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_so_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("no device")
    assert not list(tmp_path.iterdir())


def test_the_file_is_whole_after_every_row(report: Report) -> None:
    for number in range(3):
        report.add("gemm", {"name": f"kernel {number}", "state": "passed"})
        assert report.path is not None
        found = json.loads(report.path.read_text())
        assert found["device"] == "none"
        assert len(found["sections"]["gemm"]) == number + 1
    assert table(report).split() == ["gemm", "3", "passed"]
    assert not report.failures


def test_what_there_was_no_time_for_is_a_row(report: Report) -> None:
    seen = []
    for item in report.until_late("gemm", range(5), reserve=10):
        seen.append(item)
        report.deadline = time.monotonic() + (100 if item < 1 else 5)
    assert seen == [0, 1]
    assert report.sections["gemm"] == [{"name": "3 more", "state": "left out", "why": "the time was up"}]


def broken_step(report: Report, last: int) -> None:
    """Passes, ends its process, hangs, passes."""
    for item in report.until_late("kernels", range(last), reserve=0):
        if item == 1:
            os._exit(3)
        if item == 2:
            time.sleep(600)
        report.add("kernels", {"name": str(item), "state": "passed"})


def test_a_kernel_that_ends_its_process_or_hangs_is_a_row(report: Report) -> None:
    steps.run(report, 0.5, broken_step, 4)
    assert [(row["name"], row["state"]) for row in report.sections["kernels"]] == [
        ("0", "passed"),
        ("1", "failed"),
        ("2", "failed"),
        ("3", "passed"),
    ]
    assert [row["why"] for row in report.failures] == ["its process ended: 3", "no answer for 0 s"]


def step_that_never_starts(report: Report) -> None:
    raise RuntimeError("no such library")


def test_a_step_that_does_not_start_is_tried_once(report: Report) -> None:
    steps.run(report, 0.5, step_that_never_starts)
    assert [row["why"] for row in report.failures] == ["its process ended: 1"]


@pytest.mark.parametrize("name", [name for name in CALLS if "bfloat16" in name])
def test_operators_pass_where_they_are_right(name: str) -> None:
    row = operators.check_operator(CALLS[name])
    assert row["state"] == "passed", row["why"]


def test_a_wrong_operator_fails() -> None:
    call = CALLS["bmm float32"]
    wrong = operators.Call("bmm", call.op, call.args, definition=lambda a, w: 1.001 * (a @ w))
    row = operators.check_operator(wrong)
    assert row["state"] == "failed"
    assert "above" in row["why"]


def test_an_error_is_a_row_and_no_end() -> None:
    def broken() -> dict[str, object]:
        raise RuntimeError("no such kernel\nat line 3")

    assert operators.attempt(broken) == {"state": "failed", "why": "RuntimeError: no such kernel at line 3"}


def test_compiled_calls_are_compared() -> None:
    assert operators.check_compiled(CALLS["bmm float32"], "aot_eager")["state"] == "passed"


def families() -> list[GemmConfig]:
    """A kernel of every family, combination of types and epilogue; interpreters know no e4m3 and no scale of rows."""
    known = [c for c in kernels() if "e4m3" not in (c.a, c.weight) and not c.epilogue.row_scale and c.d in gemms.TYPES]
    return list({(c.family, c.a, c.weight, c.d, c.epilogue): c for c in known}.values())


@pytest.mark.parametrize("config", families(), ids=lambda config: config.name)
def test_launches_compute_what_torch_computes(config: GemmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    size = gemms.Size(config, 5, 32, 64, 3 if config.family == "batched" else 1)
    made: list[torch.Tensor] = []
    operands = size.operands
    monkeypatch.setattr(gemms.Size, "operands", lambda self, device: made.extend(operands(device)) or tuple(made))
    out = gemms.launch(Interpreter(config), size, "cpu", lambda: 7)()
    assert out.shape == (*made[0].shape[:-1], size.n)
    assert torch.isfinite(out.float()).all()
    if config.epilogue.plain and config.family != "grouped":
        right = made[1] if config.family == "batched" else made[1].mT
        torch.testing.assert_close(out.double(), made[0].double() @ right.double(), atol=0.2, rtol=1e-2)


def test_bounds_are_the_slower_of_memory_and_products() -> None:
    measured = {"memory": 2e12, "bf16": 8e14}
    assert limits.bound(8e14, 1e12, "bf16", measured) == (1.0, "tensor cores")
    assert limits.bound(8e14, 4e12, "bf16", measured) == (2.0, "memory")
    assert limits.bound(8e14, 4e12, "s8", measured) == (2.0, "memory")
    assert gemms.Size(kernels()[0], 4096, 4096, 7168).flops == 2.0 * 4096 * 4096 * 7168


def test_the_limit_of_memory_is_its_fastest_use(report: Report) -> None:
    for name, value in (("read", 3.0), ("copy", 2.5), ("bf16", 700.0)):
        report.add("limits", {"name": name, "value": value})
    assert limits.measured(report) == {"memory": 3e12, "bf16": 7e14}


def test_the_median_and_its_spread() -> None:
    assert timing.summary([1.0]) == timing.Timed(1.0, 0.0)
    assert timing.summary([1.0, 2.0, 3.0, 4.0, 100.0]).seconds == 3.0
    assert file_name("NVIDIA H100 80GB HBM3") == "gpu-check-nvidia-h100-80gb-hbm3.json"


def test_what_is_packed_runs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is all that a machine needs beside torch: nothing is imported from elsewhere, nothing is fetched."""
    pytest.importorskip("cutlass_library", reason="nvidia-cutlass is not installed")
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pack, "kernels", lambda: kernels()[:2])
    monkeypatch.setattr(pack, "attention", lambda arch: shipped(arch)[:1])
    folder = tmp_path / "folder"
    assert pack.pack(folder, None) == 0
    sources = libraries.Sources.carried(folder / "sources")
    assert kernels()[0].name in sources.text(kernels()[0])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHON": sys.executable,
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
        "FLASHMLA_CPU": "reference",
    }
    done = subprocess.run([folder / "run", tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stdout.startswith("no device")
    where = "import bench, flashmla_ops, cutlass_kernels; print(bench.__file__, flashmla_ops.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count(str(folder)) == 2


@pytest.mark.parametrize("arch", DEVICES)
def test_attention_cases_cover_what_is_shipped(arch: str) -> None:
    """In one of their types at least; blocks of 32 rows have the code of those of 64."""
    checked = (*attention.checked(arch), *caches.checked())
    needed = {config.name.replace("fp16", "bf16") for config in checked}
    wanted = {config.name.replace("fp16", "bf16") for config in shipped(arch) if "_m32_" not in config.name}
    assert needed >= wanted, wanted - needed


def test_attention_cases_are_right_by_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the check builds is what the operators take, and their own results pass it."""
    monkeypatch.setattr(attention, "DEVICE", "cpu")
    for case in (*attention.cases(), attention.Case((64,), row_format="fp8_v32", topk=3, extra="fp8_v32")):
        if max(case.lengths) * case.h_q < 5000:
            out, _ = case.op(**attention.arguments(case))
            assert out.shape == (len(case.lengths), case.s_q, case.h_q, case.d_v)
            assert not out.isnan().any(), case.name
