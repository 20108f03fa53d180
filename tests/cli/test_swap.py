"""`ramster swap` without a swap: what is refused and why, what each tool is told, what is read from the kernel."""

from __future__ import annotations

import copy
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ramster.cli import main
from ramster.constants import MIB
from ramster.errors import NodeUnreachable, Refused, ToolMissing, UsageError
from ramster.frontswap import cgroups, devices, swap, swap_records, swap_state

GOOD: dict[str, Any] = {
    "arena": {"locked": True, "segment_bytes": 256 << 10, "frames_free": 256},
    "peers": [],
    "remotify": {"enabled": True},
    "spill": None,
    "guard": {"locked_memory": {"state": "ok", "detail": "", "advice": ""}},
}
LENDER = {"name": "beta", "state": "up", "credit": 1024}
RAM = 8 << 30


def judged(size: int, *, accept_loss: bool = False, **changes: Any) -> swap.Verdict:
    return swap.judge({**copy.deepcopy(GOOD), **changes}, size, RAM, accept_loss=accept_loss)


def test_a_sound_node_is_swapped_on_without_a_word() -> None:
    assert judged(128 * MIB) == swap.Verdict((), ())


def test_an_arena_that_is_not_locked_is_refused_whatever_one_insists_on() -> None:
    arena = {**GOOD["arena"], "locked": False}
    (why,) = judged(MIB, accept_loss=True, arena=arena).refusals
    assert "not locked" in why and "lock = true" in why


def test_pages_on_a_lender_without_a_copy_are_refused_until_one_insists() -> None:
    (why,) = judged(MIB, peers=[LENDER]).refusals
    assert "beta" in why and "[spill]" in why and "--accept-loss" in why
    insisted = judged(MIB, peers=[LENDER], accept_loss=True)
    assert insisted.refusals == () and "beta" in insisted.warnings[0]


def test_a_mirror_on_disk_is_a_second_copy_and_a_plain_spill_file_is_none() -> None:
    spill = {"bytes_total": 0, "bytes_used": 0}
    assert judged(MIB, peers=[LENDER], spill={**spill, "mirror": True}).refusals == ()
    assert judged(MIB, peers=[LENDER], spill={**spill, "mirror": False}).refusals != ()


def test_a_node_that_sends_nothing_away_needs_no_second_copy() -> None:
    assert judged(MIB, peers=[LENDER], remotify={"enabled": False}).refusals == ()


def test_too_little_room_is_refused_with_the_arithmetic() -> None:
    (why,) = judged(129 * MIB).refusals
    assert "64 MiB free in the arena hold about 128 MiB" in why and "129 MiB are asked for" in why
    peers, spill = (
        [LENDER, {**LENDER, "state": "down"}],
        {"bytes_total": 96 * MIB, "bytes_used": 32 * MIB, "mirror": True},
    )
    assert judged(768 * MIB, peers=peers, spill=spill).refusals == ()
    (why,) = judged(769 * MIB, peers=peers, spill=spill).refusals
    assert "64 MiB free in the arena + 256 MiB granted by lenders (beta is down) + 64 MiB in the spill file" in why


@pytest.mark.parametrize(
    ("size", "state", "changes", "awaited"),
    [
        (640 * MIB, "connecting", {}, ()),  # there is room without it
        (641 * MIB, "connecting", {}, ("gamma",)),
        (641 * MIB, "down", {}, ()),  # it was there and went
        (641 * MIB, "connecting", {"arena": {**GOOD["arena"], "locked": False}}, ()),  # which no link mends
        (641 * MIB, "connecting", {"guard": {"locked_memory": {"state": "refused"}}}, ()),
        (641 * MIB, "connecting", {"accept_loss": False}, ()),
        (65 * RAM, "connecting", {}, ()),
    ],
)
def test_a_link_is_awaited_only_where_its_room_is_the_one_thing_missing(
    size: int, state: str, changes: dict[str, Any], awaited: tuple[str, ...]
) -> None:
    peers = [LENDER, {**LENDER, "name": "gamma", "state": state, "credit": 0}]
    assert judged(size, **{"accept_loss": True, "peers": peers, **changes}).awaited == awaited


def test_a_size_beyond_sense_is_refused() -> None:
    assert any("64 times" in why for why in judged(65 * RAM).refusals)


def test_every_reason_is_said_at_once() -> None:
    assert len(judged(65 * RAM, arena={}, peers=[LENDER]).refusals) == 4


@pytest.mark.parametrize("state", ["off", "refused", "unsupported"])
def test_a_node_that_is_not_locked_itself_is_refused_whatever_one_insists_on(state: str) -> None:
    guard = {"locked_memory": {"state": state, "detail": "8MiB may be locked", "advice": "LimitMEMLOCK=infinity"}}
    (why,) = judged(MIB, accept_loss=True, guard=guard).refusals
    assert "8MiB may be locked" in why and "LimitMEMLOCK=infinity" in why


def test_what_the_guard_was_refused_is_a_warning() -> None:
    guard = {"oom_score": {"state": "refused", "detail": "not -1000", "advice": "OOMScoreAdjust=-1000"}}
    assert judged(MIB, guard=guard).warnings == (
        "the node's guard: oom_score refused: not -1000; OOMScoreAdjust=-1000",
    )


def test_a_small_reserve_of_the_kernel_is_said_with_the_command_that_raises_it() -> None:
    (note,) = swap.reserve_notes(2508 << 10)
    assert "2508 KiB" in note and "sysctl vm.min_free_kbytes=8192" in note
    assert not list(swap.reserve_notes(8192 << 10))


def test_what_stands_in_front_of_it_is_said() -> None:
    rows = [devices.Swap("/dev/zram0", "partition", 1, 0, 100), devices.Swap("/dev/sda2", "partition", 1, 0, 50)]
    zswap, zram, disk = swap.other_swap_notes(rows, 50, True)
    assert "zswap" in zswap and "/dev/zram0 has the higher priority" in zram and "in turn" in disk


SWAPS = """Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/loop0                              partition\t409596\t\t1024\t\t50
/var/a\\040b\\040(deleted)                 file\t\t2048\t\t0\t\t-2
"""


def test_proc_swaps_is_read() -> None:
    assert devices.parse_swaps(SWAPS) == [
        devices.Swap("/dev/loop0", "partition", 409596 << 10, MIB, 50),
        devices.Swap("/var/a b (deleted)", "file", 2 * MIB, 0, -2),
    ]
    assert devices.parse_swaps("Filename Type Size Used Priority\n") == []


def test_meminfo_is_read() -> None:
    text = "MemTotal:       24684084 kB\nActive(anon):      100 kB\nHugePages_Total:       0\n"
    assert devices.parse_meminfo(text) == {"MemTotal": 24684084 << 10, "Active": 100 << 10}


def test_swapoff_is_refused_when_ram_has_no_room() -> None:
    row = devices.Swap("/dev/nbd0", "partition", 8 << 30, 600 * MIB, 50)
    disk = devices.Swap("/dev/sda2", "partition", 200 * MIB, 0, -2)
    memory = {"MemTotal": 1000 * MIB, "MemAvailable": 520 * MIB}
    swap.refuse_if_no_room(row, [row, disk], memory, [])
    with pytest.raises(Refused, match=r"600 MiB are on /dev/nbd0, and 500 MiB of RAM are free.*--force"):
        swap.refuse_if_no_room(row, [row], memory, [])


def test_swapoff_is_refused_when_a_group_has_no_room_within_its_limit() -> None:
    row = devices.Swap("/dev/nbd0", "partition", 8 << 30, 90 * MIB, 50)
    disk = devices.Swap("/dev/sda2", "partition", 200 * MIB, 0, -2)
    memory = {"MemTotal": 1000 * MIB, "MemAvailable": 520 * MIB}
    groups = [(Path("/sys/fs/cgroup/build"), 80 * MIB, 64 * MIB)]
    with pytest.raises(Refused, match=r"/sys/fs/cgroup/build have 80 MiB in swap.*limit of 64 MiB"):
        swap.refuse_if_no_room(row, [row], memory, groups)
    swap.refuse_if_no_room(row, [row, disk], memory, groups)


WHERE = swap.place(Path("/run/ramster"), "swap0", "0123456789abcdef")


def test_nbd_client_is_told_everything() -> None:
    words = devices.nbd_client(WHERE, "/dev/nbd3", 4)
    assert words[:4] == ["nbd-client", "-unix", "/run/ramster/nbd.sock", "/dev/nbd3"]
    options = " ".join(words[4:])
    assert options == f"-name swap0 -block-size 4096 -timeout {devices.TIMEOUT_S} -connections 4 -swap -persist"


def test_freed_slots_become_freed_pages() -> None:
    assert devices.swapon("/dev/nbd0", 50) == ["swapon", "--priority", "50", "--discard=pages", "/dev/nbd0"]


def test_a_label_fits_into_the_header() -> None:
    where = swap.place(Path("/run/ramster"), "a" * 63)
    assert devices.mkswap(where, "/dev/nbd0")[2] == "ramster-aaaaaaa"


def test_the_bridge_reads_nothing_to_write_a_page() -> None:
    words = devices.losetup(WHERE, direct=True)
    assert words[-1] == "/run/ramster/swap/swap0/swap-0123456789abcdef" and {"4096", "--direct-io=on"} <= set(words)


def test_a_path_with_odd_characters_is_one_parameter_of_the_uri(tmp_path: Path) -> None:
    where = swap.place(tmp_path / "a b&c=ü", "swap0", "1")
    uri = devices.nbdfuse(where, 4)[-1]
    assert uri.startswith("nbd+unix:///swap0?socket=/") and not set(uri) & set(" &ü")


def test_a_place_is_the_same_by_whatever_path_it_is_reached(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    straight = swap.place(tmp_path / "real", "swap0")
    assert swap.place(tmp_path / "link", "swap0") == straight
    assert swap.place(tmp_path / "link/../real/../link", "swap0") == straight


@pytest.mark.parametrize(
    ("text", "ours"),
    [
        ("/run/ramster/swap/swap0/swap-0123456789abcdef\n", True),
        ("/swap-0123456789abcdef (deleted)\n", True),  # its mount is gone, or in another namespace
        ("/run/ramster/swap/swap0/swap-fedcba9876543210\n", False),  # another container's node, at the same path
        ("/run/ramster/swap/swap0/swap\n", False),
    ],
)
def test_a_loop_device_is_ours_by_the_token_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, ours: bool
) -> None:
    monkeypatch.setattr(devices, "_BLOCK", tmp_path)
    (tmp_path / "loop7/loop").mkdir(parents=True)
    (tmp_path / "loop7/loop/backing_file").write_text(text)
    assert devices.loops(WHERE) == (["/dev/loop7"] if ours else [])


@pytest.mark.parametrize(
    ("noted", "now", "ours"),
    [("77", "77", True), ("77", None, True), ("77", "78", False), (None, "78", False), (None, None, False)],
)
def test_an_nbd_device_is_ours_while_it_is_attached_as_we_left_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, noted: str | None, now: str | None, ours: bool
) -> None:
    monkeypatch.setattr(devices, "_BLOCK", tmp_path)
    (tmp_path / "nbd3").mkdir()
    if now is not None:
        (tmp_path / "nbd3/pid").write_text(f"{now}\n")
    record = swap.Record("swap0", MIB, 50, "nbd", "/dev/nbd3", made=True, attached=bool(noted), attachment=noted)
    assert swap_records.own_devices(WHERE, record) == (["/dev/nbd3"] if ours else [])


@pytest.mark.parametrize("connections", [0, 1])
def test_a_device_that_was_chosen_and_not_attached_stays_another_programs_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connections: int
) -> None:
    """A crash between the note of the device and its attaching, and another program that took it since.

    connections: of somebody else to the export that was left.
    """
    run_dir = tmp_path / "run"
    where = swap.place(run_dir, "swap0")
    where.directory.mkdir(parents=True)
    swap.write(where, swap.Record("swap0", MIB, 50, "nbd", "/dev/nbd3", made=True))
    (tmp_path / "nbd3").mkdir()
    (tmp_path / "nbd3/pid").write_text("78\n")
    theirs = devices.Swap("/dev/nbd3", "partition", MIB, 0, 10)
    used: list[list[str]] = []
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(devices, "_BLOCK", tmp_path)
    monkeypatch.setattr(devices, "swaps", lambda: [theirs])
    monkeypatch.setattr(swap, "swaps", lambda: [theirs])
    monkeypatch.setattr(swap_state, "swaps", lambda: [theirs])
    monkeypatch.setattr(devices, "step", lambda words, *rest: used.append(list(words)))
    monkeypatch.setattr(swap, "_swap_off", lambda where, row, say: used.append([row.device]))

    class Node(Silent):
        has = True

        def change_export(self, name: str, *, swap: bool) -> dict[str, Any]:
            used.append([f"swap {swap}"])
            return {}

        def exports(self) -> list[dict[str, Any]]:
            return [{"name": "swap0", "connections": connections}] if self.has else []

        def remove_export(self, name: str, *, force: bool = False) -> None:
            self.has = False

    found = swap.status(Node(), run_dir)
    assert found["swaps"][0]["state"] == "half-done"
    assert [row["device"] for row in found["others"]] == ["/dev/nbd3"]
    ended = swap.off(Node(), run_dir, "swap0", force=False, say=lambda line: None)
    assert used == [["swap False"]] and ended.done == ("removed the export swap0",)
    assert "/dev/nbd3 is attached to something else by now, which stays" in ended.notes
    assert swap.names(run_dir) == []


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "300"]) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_number_that_went_to_another_process_is_not_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    """As if the one that had it ended between the look that found it and the signal."""
    sent: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr(signal, "pidfd_send_signal", lambda descriptor, number: sent.append(number))
        devices._kill(sleeper.pid, WHERE)
        (tmp_path / "cgroup.procs").write_text("1\n")
        cgroups._kill(sleeper.pid, tmp_path)
    assert sent == []
    (tmp_path / "cgroup.procs").write_text(f"{sleeper.pid}\n")
    cgroups._kill(sleeper.pid, tmp_path)
    assert sleeper.wait(30) == -signal.SIGKILL


def test_an_nbdfuse_is_ours_by_the_token_in_its_command_line() -> None:
    """One of another node, with a swap of the same name at the same path, differs in nothing else."""
    theirs = swap.place(Path("/run/ramster"), "swap0", "fedcba9876543210")
    script = "import signal; print('ready', flush=True); signal.pause()"
    words = ["nbdfuse", "-c", script, *devices.nbdfuse(WHERE, 4)[1:]]
    with subprocess.Popen(words, executable=sys.executable, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            assert devices.daemons(WHERE) == [process.pid] and devices.daemons(theirs) == []
            devices._kill(process.pid, theirs)
            assert process.poll() is None
            devices._kill(process.pid, WHERE)
            assert process.wait(30) == -signal.SIGKILL
            assert devices.daemons(WHERE) == []
        finally:
            process.kill()


STATES: list[tuple[dict[str, Any], str, str]] = [
    ({"swapping": False, "connections": None, "attached": False}, "half-done", "swap off swap0"),
    ({"node": False, "connections": None}, "cut off", "the node that it is on does not answer"),
    ({"connections": None}, "cut off", "no export swap0"),
    ({"attached": False, "connections": 0}, "broken", "nbdfuse"),
    ({"way": "nbd", "attached": False}, "broken", "device is not connected"),
    ({"connections": 0}, "broken", "started anew"),
    ({}, "on", ""),
]


@pytest.mark.parametrize(("seen", "state", "says"), STATES)
def test_a_state_is_what_stands_behind_the_swap(seen: dict[str, Any], state: str, says: str) -> None:
    facts: dict[str, Any] = {"way": "bridge", "swapping": True, "node": True, "connections": 4, "attached": True}
    found, why = swap.judge_state("swap0", **{**facts, **seen})
    assert found == state and says in why
    assert (why == "") == (state == "on")


class Silent:
    """A node that is gone."""

    def status(self) -> dict[str, Any]:
        raise NodeUnreachable("gone")

    def exports(self) -> list[dict[str, Any]]:
        raise NodeUnreachable("gone")

    def create_export(self, name: str, size_bytes: int, *, swap: bool = False) -> dict[str, Any]:
        raise NodeUnreachable("gone")

    def change_export(self, name: str, *, swap: bool) -> dict[str, Any]:
        raise NodeUnreachable("gone")

    def remove_export(self, name: str, *, force: bool = False) -> None:
        raise NodeUnreachable("gone")


class Linking(Silent):
    """A node whose lender's link comes up after a few looks; has: the names of its exports."""

    def __init__(self, *has: str) -> None:
        self.looks = 0
        self.has = has

    def status(self) -> dict[str, Any]:
        self.looks += 1
        up = self.looks > 4
        state, credit = ("up", 1024) if up else ("connecting", 0)
        return {**GOOD, "peers": [{"name": "beta", "state": state, "credit": credit}]}

    def exports(self) -> list[dict[str, Any]]:
        return [{"name": name} for name in self.has]

    def create_export(self, name: str, size_bytes: int, *, swap: bool = False) -> dict[str, Any]:
        raise Refused("asked for")


@pytest.mark.parametrize(
    ("patience", "says"), [(99, "asked for"), (1, r"0 MiB granted by lenders \(beta is connecting\)")]
)
def test_lenders_that_are_still_connecting_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patience: int, says: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(swap, "need", lambda *tools: None)
    left = iter([True] * patience + [False])
    waited: list[str] = []

    def wait(what: str) -> bool:
        waited.append(what)
        return next(left)

    plan = swap.Plan("swap0", 256 * MIB, accept_loss=True, way="bridge")
    with pytest.raises(Refused, match=says):
        swap.on(Linking(), tmp_path, plan, lambda line: None, wait)
    assert waited and "beta" in waited[0]
    assert swap.names(tmp_path) == []


@pytest.mark.parametrize("taken", ["by a swap", "by an export"])
def test_nothing_is_waited_for_where_the_name_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(swap, "need", lambda *tools: None)
    where = swap.place(tmp_path, "swap0")
    where.directory.mkdir()
    if taken == "by a swap":
        swap.write(where, swap.Record("swap0", MIB, 50, "bridge"))
    node = Linking(*(["swap0"] if taken == "by an export" else []))

    def never(what: str) -> bool:
        raise AssertionError(f"it waits: {what}")

    plan = swap.Plan("swap0", 256 * MIB, accept_loss=True, way="bridge")
    with pytest.raises(Refused, match=r"already|not enough room"):
        swap.on(node, tmp_path, plan, lambda line: None, never)


def test_others_have_the_lock_while_a_link_is_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(swap, "need", lambda *tools: None)
    monkeypatch.setattr(swap_records, "LOCK_S", 0.0)
    where = swap.place(tmp_path, "other")
    where.directory.mkdir()
    swap.write(where, swap.Record("other", MIB, 50, "bridge"))
    ended: list[swap.Ended] = []

    def meanwhile(what: str) -> bool:
        ended.append(swap.off(Linking(), tmp_path, "other", force=False, say=lambda line: None))
        return False

    plan = swap.Plan("swap0", 256 * MIB, accept_loss=True, way="bridge")
    with pytest.raises(Refused, match="not enough room"):
        swap.on(Linking(), tmp_path, plan, lambda line: None, meanwhile)
    assert len(ended) == 1 and swap.names(tmp_path) == []


@pytest.mark.parametrize("name", ["", "-a", "A", "a/b", "..", "a" * 64])
def test_a_name_is_never_a_path(name: str) -> None:
    with pytest.raises(UsageError, match="name is"):
        swap.place(Path("/run/ramster"), name)


def test_a_missing_tool_is_named_with_its_package() -> None:
    with pytest.raises(ToolMissing, match="no-such-tool") as caught:
        devices.TOOLS["no-such-tool"] = "some-package"
        try:
            devices.need("no-such-tool")
        finally:
            del devices.TOOLS["no-such-tool"]
    assert "apt-get install some-package" in str(caught.value) and caught.value.exit_code == 14


def test_a_record_is_written_whole_and_read_back(tmp_path: Path) -> None:
    where = swap.place(tmp_path, "swap0")
    where.directory.mkdir()
    assert swap.read(where) is None
    record = swap.Record("swap0", MIB, 50, "nbd", "/dev/nbd0", made=True)
    swap.write(where, record)
    assert swap.read(where) == record and swap.names(tmp_path) == ["swap0"]
    for text in ("{", "[]", '{"version": 1}'):
        where.record.write_text(text)
        with pytest.raises(Refused, match="/proc/swaps"):
            swap.read(where)


def test_without_a_node_nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(swap, "need", lambda *tools: None)
    for run_dir in (tmp_path, tmp_path / "none"):
        with pytest.raises(NodeUnreachable):
            swap.on(Silent(), run_dir, swap.Plan("swap0", MIB), lambda line: None)
        assert swap.off(Silent(), run_dir, "swap0", force=False, say=lambda line: None).done == ()
    assert not list(tmp_path.iterdir())


def test_status_works_without_a_node(tmp_path: Path) -> None:
    where = swap.place(tmp_path, "swap0")
    where.directory.mkdir()
    swap.write(where, swap.Record("swap0", MIB, 50, "bridge"))
    found = swap.status(Silent(), tmp_path)
    assert not found["node"]
    (row,) = found["swaps"]
    assert row["state"] == "half-done" and row["device"] is None and row["export"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ("swap on", 2, "--size"),
        ("swap on --size 12XB", 2, "--size is '12XB'"),
        ("swap on --size 4KiB", 2, "--size is 4KiB"),
        ("swap on --size 1GiB --priority -5", 2, "--priority"),
        ("swap on --size 1GiB --priority 40000", 2, "--priority is 40000"),
        ("swap on --size 1GiB --connections 0", 2, "--connections is 0"),
        ("swap on --size 1GiB --way ublk", 2, "--way is 'ublk'"),
        ("swap on --size 1GiB --name ../x", 2, "name is"),
        ("swap on --size 1GiB --socket a --config b", 2, "--socket and --config"),
        ("swap off a --all", 2, "--all"),
    ],
)
def test_mistakes_get_one_message(arguments: str, code: int, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == code
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("ramster: ") and says in printed.err
    assert printed.err.count("\n") == 1


def test_another_user_is_told_to_become_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    for words in (["on", "--size", "1GiB"], ["off"]):
        assert main(["swap", *words, "--socket", str(tmp_path / "control.sock")]) == 8
        assert "sudo" in capsys.readouterr().err


def test_status_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["swap", "status", "--json", "--socket", str(tmp_path / "control.sock")]) == 0
    assert json.loads(capsys.readouterr().out)["swaps"] == []


@pytest.mark.parametrize(
    ("given", "kept", "free", "stored", "warns"),
    [
        (100, 50, 10, 0, False),  # 2:1, as planned
        (100, 95, 10, 0, True),
        (100, 95, 400, 0, False),  # there is room for all of it
        (100, 95, 10, 100, False),  # it is full already
        (0, 0, 10, 0, False),
    ],
)
def test_a_swap_that_noise_would_fill_is_warned_about(
    given: int, kept: int, free: int, stored: int, warns: bool
) -> None:
    mib = 1 << 20
    export = {"swap": True, "size_bytes": 100 * mib, "pages_stored": stored * mib // 4096}
    arena = {"bytes_in": given * mib, "bytes_compressed": kept * mib, "segment_bytes": mib, "frames_free": free}
    said = swap.overcommitted({"arena": arena, "exports": [export]})
    assert bool(said) == warns and ("Add a lender" in said) == warns
    assert swap.overcommitted({"arena": arena, "exports": [{**export, "swap": False}]}) == ""


@pytest.mark.parametrize("late", ["the node's last words", "shielded", "describe", "tell"])
def test_an_interrupt_after_the_last_step_undoes_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    """The kernel swaps already; whoever is told "interrupted" alone must not find it on."""
    made: list[swap.Record] = []
    undone: list[swap.Record] = []

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    def make(node: Any, where: devices.Place, plan: swap.Plan, way: devices.Way, record: swap.Record) -> swap.Record:
        made.append(record)
        swap.write(where, record)
        return record

    class Node:
        def status(self) -> dict[str, Any]:
            return interrupted() if made and late == "the node's last words" else copy.deepcopy(GOOD)

        def exports(self) -> list[dict[str, Any]]:
            return []

    steps: dict[str, Any] = {
        "_make": make,
        "_take_down": lambda node, where, record: undone.append(record),
        "need": lambda *tools: None,
        "meminfo": lambda: {"MemTotal": RAM},
        "daemons": lambda where: [1],
        "shielded": lambda pid: (),
        "describe": lambda where, record, node: {},
    }
    for name, step in steps.items():
        monkeypatch.setattr(swap, name, interrupted if name == late else step)
    tell = interrupted if late == "tell" else lambda made: None
    monkeypatch.setattr("os.geteuid", lambda: 0)
    plan = swap.Plan("swap0", MIB, way="bridge")
    with pytest.raises(KeyboardInterrupt):
        swap.on(cast(swap.Node, Node()), tmp_path, plan, say=lambda line: None, tell=tell)
    assert len(made) == 1 and undone == made
