"""The run directory: one path for it however it is named, and none that others could have made."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ramster.config import load, paths
from ramster.constants import SOCKET_PATH_BYTES_MAX
from ramster.errors import ConfigError, UsageError


def test_links_and_dots_are_resolved_when_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for number, run_dir in enumerate(("link/run", "link/../real/run", f"{tmp_path}/real/./run")):
        file = tmp_path / f"{number}.toml"
        file.write_text(f'[node]\nname = "alpha"\nnumber = 1\nrun_dir = "{run_dir}"\n')
        assert load(file).node.run_dir == tmp_path / "real" / "run"


def test_a_link_to_the_socket_itself_leads_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "short.sock").symlink_to("run/control.sock")
    assert paths.canonical_socket(tmp_path / "short.sock") == tmp_path / "run" / "control.sock"


def test_a_short_link_to_a_path_too_long_for_a_socket_stays(tmp_path: Path) -> None:
    long = tmp_path / ("x" * SOCKET_PATH_BYTES_MAX)
    long.mkdir()
    (tmp_path / "s").symlink_to(long)
    assert paths.canonical_run_dir(tmp_path / "s") == tmp_path / "s"
    assert paths.canonical_socket(tmp_path / "s" / "region.sock") == tmp_path / "s" / "region.sock"
    assert paths.canonical(tmp_path / "s") == long


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> int:
    """An ordinary user without a runtime directory."""
    uid = 54321
    monkeypatch.setattr(os, "geteuid", lambda: uid)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return uid


def test_root_needs_nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert paths.default_run_dir() == Path("/run/ramster")


def test_the_users_own_runtime_directory_is_taken(user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid or user)
    monkeypatch.setattr(paths, "_is_ours", lambda folder, uid: folder == tmp_path)
    assert paths.default_run_dir() == tmp_path / "ramster"


@pytest.mark.parametrize("mode", [0o700, 0o777])
def test_nothing_that_another_user_could_have_made_is_a_default(
    user: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """It belongs to whoever runs this test, and not to that user, as after `su`."""
    tmp_path.chmod(mode)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UsageError) as caught:
        paths.default_run_dir()
    assert str(tmp_path) in str(caught.value) and "RAMSTER_SOCKET" in str(caught.value)


def test_without_a_runtime_directory_nothing_below_tmp_is_taken(user: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"XDG_RUNTIME_DIR is not set.*no /run/user/{user}.*run_dir in"):
        paths.default_run_dir()
    file = tmp_path / "a.toml"
    file.write_text('[node]\nname = "alpha"\nnumber = 1\n')
    with pytest.raises(ConfigError, match=rf"{file}:1: node.run_dir: missing.*RAMSTER_SOCKET"):
        load(file)
    file.write_text(f'[node]\nname = "alpha"\nnumber = 1\nrun_dir = "{tmp_path}/run"\n')
    assert load(file).node.run_dir == tmp_path / "run"
