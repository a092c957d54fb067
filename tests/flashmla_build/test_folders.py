"""Where compiled libraries are kept: for users without a home, without a passwd entry, beside users who mean ill."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flashmla_build import folders
from flashmla_ops import cpu

NAME = "things"


@pytest.fixture(autouse=True)
def no_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLASHMLA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))


def temporary(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"flashmla-{os.getuid()}"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's uid is like this: without an entry in passwd."""

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "home/.cache/flashmla"),
        ({"XDG_CACHE_HOME": "{}/xdg"}, "xdg/flashmla"),
        ({"XDG_CACHE_HOME": "relative"}, "home/.cache/flashmla"),
        ({"XDG_CACHE_HOME": "{}/xdg", "FLASHMLA_CACHE": "{}/mine"}, "mine"),
    ],
)
def test_the_users_own_folder(
    variables: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    assert folders.writable(NAME) == tmp_path / expected / NAME
    assert next(folders.readable(NAME)) == tmp_path / expected / NAME


@pytest.mark.usefixtures("no_home")
def test_without_a_home_a_private_temporary_folder(tmp_path: Path) -> None:
    root = folders.writable(NAME)
    assert root == temporary(tmp_path) / NAME
    assert stat.S_IMODE(root.parent.stat().st_mode) == 0o700
    assert folders.writable(NAME) == root
    assert list(folders.readable(NAME)) == [root]


@pytest.mark.parametrize("name", ["FLASHMLA_CACHE", "HOME", "XDG_CACHE_HOME"])
def test_a_folder_that_cannot_be_written_is_passed_over(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("not a folder")
    monkeypatch.setenv(name, str(occupied / "below"))
    assert folders.writable(NAME) == temporary(tmp_path) / NAME


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_folder_of_ours_that_cannot_be_written_is_passed_over(tmp_path: Path) -> None:
    """Root may have made it in a cache of this user's."""
    (tmp_path / "home" / ".cache" / "flashmla" / NAME).mkdir(parents=True, mode=0o500)
    assert folders.writable(NAME) == temporary(tmp_path) / NAME


def open_to_all(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def link(folder: Path) -> None:
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    folder.symlink_to(elsewhere)


def of_another_user(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, 54321, 54321)


PLANTED = [
    open_to_all,
    link,
    pytest.param(of_another_user, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")),
]


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("plant", PLANTED)
def test_a_temporary_folder_that_others_may_have_filled_is_refused(
    plant: Callable[[Path], None], tmp_path: Path
) -> None:
    plant(temporary(tmp_path))
    with pytest.raises(folders.NoFolder, match="not a private folder of this user's; set FLASHMLA_CACHE"):
        folders.writable(NAME)
    assert list(folders.readable(NAME)) == []


@pytest.mark.parametrize("plant", [PLANTED[0], PLANTED[2]])
def test_nor_is_a_home_that_is_shared(plant: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "home" / ".cache").mkdir()
    plant(tmp_path / "home" / ".cache" / "flashmla")
    assert folders.writable(NAME) == temporary(tmp_path) / NAME
    assert list(folders.readable(NAME)) == [temporary(tmp_path) / NAME]


@pytest.mark.usefixtures("no_home")
def test_no_folder_at_all_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("tempfile.gettempdir", none)
    with pytest.raises(
        folders.NoFolder, match="nor a temporary one: No usable temporary directory found; set FLASHMLA_CACHE"
    ):
        folders.writable(NAME)
    assert list(folders.readable(NAME)) == []


AS_CONTAINER_USER = ["unshare", "--user", "--map-user=54321"]
IMPORT = """
from flashmla_ops import capability
from flashmla_ops.cpu import STATE, build
print(STATE.active, build.STORE.root())
capability.explain()
"""


def has_user_namespaces() -> bool:
    try:
        return subprocess.run([*AS_CONTAINER_USER, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not has_user_namespaces(), reason="no user namespaces here")
def test_an_import_as_a_container_user(tmp_path: Path) -> None:
    """A uid without an entry in passwd, and no $HOME."""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    environment |= {"TMPDIR": str(tmp_path), "CXX": "no-such-compiler"}
    command = [*AS_CONTAINER_USER, sys.executable, "-c", IMPORT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [cpu.REFERENCE, str(tmp_path / "flashmla-54321")]
    assert done.stderr.count("the float64 reference runs instead of C++ kernels") == 1
