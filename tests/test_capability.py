"""`explain` and the command line say what the process does."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashmla_ops import __main__ as command_line
from flashmla_ops import capability, cpu


def test_exactly_one_implementation_is_active_and_it_is_available() -> None:
    active = [choice for choice in capability.implementations() if choice.active]
    assert [choice.name for choice in active] == [cpu.STATE.active]
    assert active[0].available


@pytest.mark.skipif(not cpu.STATE.isas, reason="no C++ kernels")
def test_explain_follows_the_choice() -> None:
    assert f"-> {cpu.STATE.active} " in capability.explain()
    with cpu.using("generic"):
        assert "-> generic " in capability.explain()


@pytest.mark.parametrize("command", ["info", "explain"])
def test_the_command_line_names_the_active_implementation(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main([command]) == 0
    assert cpu.STATE.active in capsys.readouterr().out


def test_build_prints_the_library(capsys: pytest.CaptureFixture[str]) -> None:
    if cpu.STATE.binding != "stable ABI":
        pytest.skip("no library is cached")
    assert command_line.main(["build"]) == 0
    assert capsys.readouterr().out.startswith(cpu.STATE.path)


def test_a_build_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))
    assert command_line.main(["build"]) == 1
    assert "CXX=no-such-compiler names nothing that runs" in capsys.readouterr().err
    assert command_line.main(["info"]) == 0
    assert "compiler     none: CXX=no-such-compiler" in capsys.readouterr().out
