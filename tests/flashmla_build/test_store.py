"""Things are made once, whoever asks, appear whole, and a failure leaves nothing behind."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cutlass_kernels.build.store import STORE as KERNELS
from cutlass_kernels.emulator.runtime.build import STORE as RUNTIME
from flashmla_build import Progress, Store
from flashmla_ops.cpu.build import STORE as CPU

THINGS = Store("things", "things", ValueError)
WAIT = """
import sys
from pathlib import Path
from flashmla_build import Store
with Store("things", "things", ValueError).locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
    Path(f"{sys.argv[1]}.done").touch()
"""


@pytest.fixture(autouse=True)
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path))


@pytest.mark.parametrize(("store", "place"), [(CPU, ""), (KERNELS, "cutlass"), (RUNTIME, "emulator")])
def test_each_has_a_folder_in_one_cache_and_errors_of_its_own(
    store: Store, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store.root() == tmp_path / place == next(store.roots())
    (tmp_path / "file").touch()
    monkeypatch.setenv("FLASHMLA_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(store.error, match=r"no cache folder can be written, .*; set FLASHMLA_CACHE"):
        store.root()


def test_threads_at_once_make_it_once() -> None:
    target, made = THINGS.root() / "thing", []

    def make(scratch: Path) -> Path:
        made.append(scratch)
        (scratch / "new").write_text("whole")
        time.sleep(0.05)
        assert not target.exists()
        return scratch / "new"

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: THINGS.once(target, make), range(4))) == {target}
    assert len(made) == 1
    assert target.read_text() == "whole"
    assert not made[0].exists()


def test_a_folder_appears_as_one() -> None:
    def make(scratch: Path) -> Path:
        (scratch / "any").mkdir()
        (scratch / "any" / "part").touch()
        return scratch / "any"

    assert (THINGS.once(THINGS.root() / "folder", make) / "part").is_file()


def test_a_failure_leaves_nothing() -> None:
    def fail(scratch: Path) -> Path:
        (scratch / "half").touch()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        THINGS.once(THINGS.root() / "thing", fail)
    assert [path.name for path in THINGS.root().iterdir()] == ["thing.lock"]
    assert THINGS.once(THINGS.root() / "thing", lambda scratch: _file(scratch / "x")).is_file()


def _file(path: Path) -> Path:
    path.touch()
    return path


def test_another_process_is_waited_for_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = THINGS.root() / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", WAIT, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with ThreadPoolExecutor(1) as pool:

            def acquire() -> bool:
                with THINGS.locked(lock):
                    return lock.with_name("lock.done").exists()

            waiting = pool.submit(acquire)
            while "waiting for a process that is making things" not in capsys.readouterr().err:
                assert not waiting.done()
            other.communicate("")
            assert waiting.result()


@pytest.mark.parametrize(("log", "lines"), [(False, 0), (True, 3)])
def test_progress_where_there_is_no_terminal(log: bool, lines: int, capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(3, log=log)
    for name in "abc":
        progress.step(name, failed=1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines
    assert all(f"{i}/3" in line and "1 failed" in line for i, line in enumerate(said, 1))
