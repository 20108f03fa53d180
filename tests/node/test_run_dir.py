"""Where a node's sockets are, nobody else may write."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from ramster.errors import PermissionMissing, UsageError
from ramster.node import run_dir


def test_one_that_is_made_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "run"
    for _ in range(2):
        run_dir.prepare(path)
        assert stat.S_IMODE(path.stat().st_mode) & 0o027 == 0


def test_one_behind_a_link_will_do(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o755)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    run_dir.prepare(tmp_path / "link" / "run")
    assert (tmp_path / "real" / "run").is_dir()


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_one_that_everybody_may_write_to_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "run"
    path.mkdir()
    path.chmod(mode)
    with pytest.raises(UsageError, match="everybody could replace sockets"):
        run_dir.prepare(path)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    for path in (tmp_path / "run", tmp_path / "run" / "deeper"):
        with pytest.raises(UsageError, match="directory"):
            run_dir.prepare(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make a folder of another user")
def test_one_of_another_user_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    os.chown(path, 12345, 12345)
    with pytest.raises(UsageError, match="belongs to user 12345"):
        run_dir.prepare(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may make a folder anywhere")
def test_where_this_user_may_not_write_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionMissing, match="run_dir"):
        run_dir.prepare(tmp_path / "run")
