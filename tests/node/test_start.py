"""Bad input at the start of a node, and strangers at its port: a clear refusal on both sides, and nothing else."""

from __future__ import annotations

import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from ramster.testing.cluster import Cluster, Node
from ramster.testing.proxy import wait_until

LENDER = {"lend": {"size": "8MiB"}}


@pytest.fixture
def make() -> Iterator[Callable[..., Cluster]]:
    made: list[Cluster] = []

    def make(*arguments: object, **options: object) -> Cluster:
        made.append(Cluster(*arguments, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for cluster in made:
        cluster.close()


def start(node: Node) -> subprocess.CompletedProcess[str]:
    """Run a node that is expected to refuse."""
    command = [sys.executable, "-P", "-m", "ramster.cli", "node", "--config", str(node.config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("module", ["ramster.cli.app", "ramster.config.load", "ramster.node.main", "ramster.node.node"])
def test_an_interrupt_while_it_still_imports_ends_it_without_a_word(make: Callable[..., Cluster], module: str) -> None:
    """It was a traceback, or, where the interpreter was in a callback of its own, lost: the node went on."""
    script = """if True:
        import os, signal, sys
        from ramster.cli import main
        signal.signal(signal.SIGINT, signal.default_int_handler)
        class Interrupt:
            def find_spec(self, name, path, target=None):
                if name == sys.argv[1]:
                    try: os.kill(os.getpid(), signal.SIGINT); os.getpid()
                    except KeyboardInterrupt: print("as an exception", file=sys.stderr)
        sys.meta_path.insert(0, Interrupt())
        sys.exit(main(["node", "--config", sys.argv[2]]))
    """
    command = [sys.executable, "-P", "-c", script, module, str(make(["alpha"])["alpha"].config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        _, said = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, said) == (-signal.SIGINT, "")


def change(node: Node, old: str, new: str) -> int:
    """Replace one line of its configuration; the line's number."""
    lines = node.config.read_text().splitlines()
    (where,) = (i for i, line in enumerate(lines) if line.startswith(old))
    lines[where] = new
    node.config.write_text("\n".join(lines) + "\n")
    return where + 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("size = ", 'size = "1MiB"', "allowed is 4MiB or more"),
        ("tick = ", "tick = 0", "allowed is 5ms to 10s"),
        ("tick = ", 'tick = "10 parsecs"', "10 parsecs"),
        ("tick = ", 'tik = "10ms"', "did you mean"),
        ("number = ", "number = 255", "254"),
        ("listen = ", 'listen = "nowhere"', "nowhere"),
    ],
)
def test_a_wrong_configuration(make: Callable[..., Cluster], old: str, new: str, words: str) -> None:
    node = make(["alpha"])["alpha"]
    line = change(node, old, new)
    refused = start(node)
    assert refused.returncode == 3, refused.stderr
    assert f"{node.config}:{line}" in refused.stderr, refused.stderr
    assert words in refused.stderr
    assert "Traceback" not in refused.stderr


def test_a_key_that_others_may_read(make: Callable[..., Cluster]) -> None:
    node = make(["alpha"])["alpha"]
    key = node.config.with_name("alpha.key")
    key.chmod(0o644)
    refused = start(node)
    assert refused.returncode == 11 and "Traceback" not in refused.stderr
    assert refused.stderr.rstrip().endswith(f"chmod 600 {key}"), refused.stderr


def test_a_port_that_is_taken(make: Callable[..., Cluster]) -> None:
    node = make(["alpha"])["alpha"]
    with socket.create_server(("127.0.0.1", node.place.port)):
        refused = start(node)
    assert refused.returncode == 13
    assert f"port {node.place.port} on 127.0.0.1 is taken by another program" in refused.stderr
    assert "[links] listen" in refused.stderr
    node.start()
    node.wait(lambda status: status["state"] == "running", "it starts once the port is free")


def test_a_directory_that_is_in_use(make: Callable[..., Cluster]) -> None:
    node = make(["alpha"])["alpha"]
    node.start()
    node.wait(lambda status: status["state"] == "running", "runs")
    refused = start(node)
    assert refused.returncode == 13 and "run_dir" in refused.stderr
    assert node.running()


def test_a_node_that_was_killed_starts_again_in_its_directory(make: Callable[..., Cluster]) -> None:
    node = make(["alpha"])["alpha"]
    for _ in range(2):
        node.start()
        node.wait(lambda status: status["state"] == "running", "runs")
        node.kill()


def test_own_certificate_of_another_cluster(make: Callable[..., Cluster]) -> None:
    ours, theirs = make(["alpha"]), make(["alpha"], identity="other")
    for name in ("alpha.crt", "alpha.key"):
        shutil.copy(theirs["alpha"].config.parent / name, ours["alpha"].config.parent / name)
    refused = start(ours["alpha"])
    assert refused.returncode == 11
    assert "alpha.crt: belongs to cluster other, not to test" in refused.stderr


def test_more_memory_than_there_is(make: Callable[..., Cluster]) -> None:
    node = make({"alpha": {"arena": {"size": "4096GiB"}}})["alpha"]
    refused = start(node)
    assert refused.returncode == 9
    assert "cannot reserve an arena" in refused.stderr and "Traceback" not in refused.stderr


def reasons(one: Node, other: Node) -> tuple[str, str]:
    """What each says about the other, once both say something."""

    def both() -> bool:
        # The dialling side may have tried before the other one listened.
        reason = other.peer(one.name)["reason"]
        return bool(one.status()["counters"]["refused_connections"]) and not reason.startswith("connect")

    one.wait(lambda status: status["state"] == "running", "runs")
    other.wait(lambda status: status["peers"][0]["reason"], "the dialling side says why")
    wait_until(both, "the accepting side counts or says it")
    assert one.peer(other.name)["state"] != "up" and other.peer(one.name)["state"] != "up"
    return one.log, other.peer(one.name)["reason"]


def test_a_peer_with_the_certificate_of_another_cluster(make: Callable[..., Cluster]) -> None:
    """Same names and numbers, another authority: refused on both sides, and both say certificate."""
    ours, theirs = make(["alpha", "beta"]), make(["alpha", "beta"], identity="other")
    alpha, beta = ours["alpha"], theirs["beta"]
    text = beta.config.read_text()
    beta.config.write_text(text.replace(f":{theirs['alpha'].place.port}", f":{alpha.place.port}"))
    for node in (alpha, beta):
        node.start()
    log, reason = reasons(alpha, beta)
    assert "the other side's certificate is not of this cluster" in reason
    assert re.search(r"refused 127\.0\.0\.1: .*the other side does not accept this node's certificate", log), log
    assert alpha.status()["counters"]["refused_connections"] > 0


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"arena": {"segment": "128KiB"}}, "its segments have 65536 bytes, ours 131072"),
        ({"cluster": {"id": "elsewhere"}}, ""),
    ],
    ids=["segment", "cluster"],
)
def test_a_peer_that_does_not_fit(make: Callable[..., Cluster], changed: dict[str, dict[str, str]], words: str) -> None:
    if "cluster" in changed:
        # The right certificates, and a node that says another cluster's name: it finds out by itself.
        node = make({"alpha": changed})["alpha"]
        refused = start(node)
        assert refused.returncode == 11 and "belongs to cluster test, not to elsewhere" in refused.stderr
        return
    cluster = make({"alpha": changed, "beta": {}})
    for name in ("alpha", "beta"):
        cluster[name].start()
    log, reason = reasons(cluster["alpha"], cluster["beta"])
    assert f"it refused: {words}" in reason and "[arena] segment" in reason
    assert f"refused 127.0.0.1: {words}" in log
    alpha = cluster["alpha"]
    alpha.wait(lambda status: status["peers"][0]["reason"].startswith(f"refused: {words}"), "its row says it, too")


def test_a_stranger_whom_the_configuration_does_not_name(make: Callable[..., Cluster]) -> None:
    """A good certificate is not enough."""
    cluster = make(["alpha", "beta"])
    alpha, beta = cluster["alpha"], cluster["beta"]
    text = alpha.config.read_text()
    alpha.config.write_text(text.replace('name = "beta"', 'name = "gamma"'))
    alpha.start()
    beta.start()
    log, reason = reasons_of_dialler(alpha, beta)
    assert "it refused: it calls itself 'beta', number 2, but node 2 is 'gamma' here" in reason
    assert "refused 127.0.0.1" in log


def reasons_of_dialler(alpha: Node, beta: Node) -> tuple[str, str]:
    beta.wait(lambda status: status["peers"][0]["reason"].startswith("it refused"), "the reason arrives")
    return alpha.log, beta.peer("alpha")["reason"]


def test_a_peer_of_another_version(make: Callable[..., Cluster]) -> None:
    """A node of the future, as far as its hello goes."""
    cluster = make(["alpha", "beta"])
    alpha, beta = cluster["alpha"], cluster["beta"]
    alpha.start()
    alpha.wait(lambda status: status["state"] == "running", "runs")
    from ramster.cluster import identity
    from ramster.engine.links import Connection, TlsContext
    from ramster.wire import frames, hello

    files = identity.node_files(beta.config.parent, "beta")
    sock = socket.create_connection(("127.0.0.1", alpha.place.port), 10)
    connection = Connection(TlsContext(str(files.ca), str(files.cert), str(files.key)), sock.detach(), False)
    connection.handshake(10)
    mine = hello.Hello(
        cluster="test", name="beta", number=2, generation=1, kind="get", versions=(7, 9), segment_bytes=65536
    )
    connection.send(frames.pack(frames.FrameType.HELLO, hello.encode(mine)), 10)
    kind, length = frames.unpack(connection.receive(frames.HEADER_BYTES, 10))
    assert kind == frames.FrameType.REFUSE
    reason = hello.decode_refusal(connection.receive(length, 10))
    connection.close()
    assert reason == "it speaks versions 7 to 9, this node 2 to 2"
    wait_until(lambda: reason in alpha.log, "the other side says it too")
    assert alpha.status()["counters"]["refused_connections"] == 1


def test_garbage_on_the_port(make: Callable[..., Cluster]) -> None:
    cluster = make({"alpha": {}, "beta": LENDER}).start()
    alpha = cluster["alpha"]
    alpha.wait(lambda status: status["peers"][0]["state"] == "up", "linked")
    # On a busy machine a peer gives up its first attempt before it is through.
    before = alpha.status()["counters"]["garbage_connections"]
    garbage = (b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\x16\x03\x01\x02\x00" + bytes(512))
    for n, data in enumerate(garbage, before + 1):
        with socket.create_connection(("127.0.0.1", alpha.place.port), 10) as sock:
            sock.settimeout(10)
            try:
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
            except OSError:
                pass  # it may have been closed before all of that was said
        alpha.wait(lambda status, n=n: status["counters"]["garbage_connections"] == n, "counted")  # type: ignore[misc]
    assert alpha.peer("beta")["state"] == "up"
    assert alpha.status()["counters"]["protocol_errors"] == 0


def test_nodes_start_in_any_order_and_come_and_go(make: Callable[..., Cluster]) -> None:
    cluster = make(["alpha", "beta", "gamma"])
    for name in ("gamma", "alpha", "beta"):
        cluster[name].start()
    cluster.wait_up()
    cluster["beta"].kill()
    cluster["alpha"].wait(lambda status: status["peers"][0]["state"] == "down", "the death is seen")
    cluster["beta"].start()
    cluster.wait_up()


def test_a_node_that_does_not_close_ends_all_the_same() -> None:
    code = "import threading\nfrom ramster.node.main import end_within\nend_within(0.1)\nthreading.Event().wait()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert "the node does not close within 0.1 s" in ended.stderr and "Thread 0x" in ended.stderr
