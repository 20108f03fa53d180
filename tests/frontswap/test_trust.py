"""Nothing is given to a process of another user that made a node's socket before a node did."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ramster
from ramster.cli.control_client import ControlClient
from ramster.errors import PermissionMissing, UntrustedNode
from ramster.frontswap.trust import Folder, check, objection, require_own_folder
from ramster.node import holder

ME, EVE, SERVICE = 1000, 666, 990
OWN, ROOTS, EVES, RUN, TMP = (
    Folder(ME, 0o700),
    Folder(0, 0o755),
    Folder(EVE, 0o755),
    Folder(0, 0o755),
    Folder(0, 0o1777),
)


@pytest.mark.parametrize(
    ("own", "listener", "folder", "above", "says"),
    [
        (ME, ME, OWN, TMP, None),
        (ME, 0, ROOTS, RUN, None),
        (0, 0, ROOTS, RUN, None),
        (ME, SERVICE, Folder(SERVICE, 0o750), RUN, None),  # RuntimeDirectory= of a unit with User=
        (ME, SERVICE, ROOTS, RUN, None),
        (ME, EVE, EVES, TMP, "user 666"),
        (0, EVE, EVES, TMP, "user 666"),
        (ME, EVE, EVES, Folder(EVE, 0o755), "user 666"),
        (ME, ME, EVES, TMP, "belongs to user 666"),
        (ME, 0, EVES, TMP, "belongs to user 666"),
        (ME, ME, TMP, ROOTS, "may write to its folder"),
        (ME, ME, Folder(ME, 0o770), TMP, "may write to its folder"),
    ],
)
def test_who_is_trusted(own: int, listener: int, folder: Folder, above: Folder, says: str | None) -> None:
    found = objection(own, listener, folder, above)
    assert found is None if says is None else found is not None and says in found


def test_a_socket_of_ones_own_is_trusted_until_others_may_write_beside_it(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(path))
        listener.listen()
        client.connect(str(path))
        check(client, path)
        tmp_path.chmod(0o777)
        with pytest.raises(UntrustedNode, match="may write to its folder"):
            check(client, path)


def test_a_node_serves_in_a_folder_of_its_own_alone(tmp_path: Path) -> None:
    require_own_folder(tmp_path / "a" / "b")
    assert Folder.of(tmp_path / "a" / "b").mode == 0o700
    tmp_path.chmod(0o770)
    with pytest.raises(PermissionMissing, match="chmod go-w"):
        require_own_folder(tmp_path)
    with pytest.raises(PermissionMissing, match="set another run_dir"):
        require_own_folder(Path("/proc/nothing"))


LISTEN = """
import os, socket, sys
os.mkdir(sys.argv[1], 0o755)
sockets = []
for name, kind in (("region.sock", socket.SOCK_SEQPACKET), ("control.sock", socket.SOCK_STREAM),
                   ("arena.sock", socket.SOCK_SEQPACKET)):
    s = socket.socket(socket.AF_UNIX, kind)
    s.bind(os.path.join(sys.argv[1], name))
    os.chmod(os.path.join(sys.argv[1], name), 0o777)
    s.listen()
    sockets.append(s)
print("ready", flush=True)
sys.stdin.read()
for s in sockets:
    s.setblocking(False)
    try:
        print(s.accept()[0].recv(100))
    except OSError:
        print("nothing came")
"""


@pytest.fixture
def eve() -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Another user who was there first, and the folder that she made."""
    if os.geteuid() != 0:
        pytest.skip("needs root to be another user")
    with tempfile.TemporaryDirectory(dir="/tmp") as above:
        Path(above).chmod(0o1777)
        folder = Path(above) / "ramster"
        command = ["/usr/bin/env", "python3", "-I", "-c", LISTEN, str(folder)]
        with subprocess.Popen(
            command,
            user=EVE,
            group=EVE,
            extra_groups=[],
            cwd="/",
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            try:
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    pytest.skip("another user may not run Python here")
                yield folder, process
            finally:
                process.kill()


def test_nothing_is_sent_to_another_user_who_was_there_first(eve: tuple[Path, subprocess.Popen[str]]) -> None:
    folder, process = eve
    with pytest.raises(UntrustedNode, match=f"belongs to user|user {EVE} serves it"):
        ramster.connect(folder / "region.sock")
    with pytest.raises(UntrustedNode, match=f"{EVE}"):
        ControlClient(folder / "control.sock", strict=True).status()
    with pytest.raises((UntrustedNode, PermissionMissing), match=f"{EVE}"):
        holder.take(folder, 4 << 20, 64 << 10, False, 1000)
    with pytest.raises(UntrustedNode, match=f"{EVE}"):
        holder.end(folder)
    out, _ = process.communicate("", timeout=30)
    assert "take" not in out and "GET" not in out


def test_the_command_line_names_her(eve: tuple[Path, subprocess.Popen[str]]) -> None:
    words = ["swap", "on", "--size", "16MiB", "--socket", str(eve[0] / "control.sock")]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ramster.cli", *words], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 8 and f"user {EVE}" in done.stderr and "Traceback" not in done.stderr
