"""What strangers and peers do on the port: whoever is honest gets in, whoever is not costs nobody but itself."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import select
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest

from ramster.cluster import identity
from ramster.config.knobs import Address, Peer
from ramster.config.knobs import Links as LinkSettings
from ramster.engine.links import BULK, GET, Connection, Links, TlsContext
from ramster.engine.store import Store
from ramster.errors import RamsterError
from ramster.node.credentials import Credentials
from ramster.node.peering import Peering
from ramster.node.redial import Redial
from ramster.testing.cluster import free_ports
from ramster.testing.proxy import wait_until
from ramster.wire import frames, hello
from ramster.wire.frames import FrameType

SEGMENT = 65536
TIMEOUT_S = 20.0
KINDS = {"get": GET, "bulk": BULK}


def hello_of(name: str, number: int, generation: int, kind: str) -> hello.Hello:
    return hello.Hello(
        cluster="lab",
        name=name,
        number=number,
        generation=generation,
        kind="get" if kind == "get" else "bulk",
        segment_bytes=SEGMENT,
        lend_segments=4,
    )


class Cluster:
    """Certificates of a cluster `lab`, and of another one with names and authority of its own."""

    def __init__(self, directory: Path) -> None:
        self.names = ["alpha", "beta", "gamma"]
        self.files = dict(zip(self.names, identity.create_cluster(directory / "lab", "lab", self.names), strict=True))
        (self.stranger,) = identity.create_cluster(directory / "other", "lab", ["beta"])

    def context(self, name: str) -> TlsContext:
        files = self.stranger if name == "stranger" else self.files[name]
        return TlsContext(str(files.ca), str(files.cert), str(files.key))


class Running:
    """A node's links and peering on an event loop of their own."""

    def __init__(
        self,
        cluster: Cluster,
        name: str,
        addresses: dict[str, tuple[str, int]],
        generation: int = 1000,
        idle_timeout_ms: int = 5000,
        port: int = 0,
        **links: int,
    ) -> None:
        self.name, self.number = name, cluster.names.index(name) + 1
        self.generation = generation
        self.store = Store(8 * SEGMENT, segment_bytes=SEGMENT, lock=False, cleaner=False)
        times = {"idle_ms": 60_000, "keepalive_ms": 20_000} | links
        self.links = Links(self.store, self.number, lend_bytes=8 * SEGMENT, lock=False, **times)  # type: ignore[arg-type]
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.peering = Peering(
            self.links,
            Credentials(cluster.files[name], "lab", name),
            lambda kind, _peer: hello_of(name, self.number, self.generation, kind),
            tuple(
                Peer(name=peer, number=cluster.names.index(peer) + 1, address=Address(*address))
                for peer, address in addresses.items()
            ),
            LinkSettings(
                listen=Address("127.0.0.1", port),
                reconnect_min_ms=10,
                reconnect_max_ms=50,
                idle_timeout_ms=idle_timeout_ms,
            ),
            self.number,
            60_000,
        )
        self.run(self.peering.start())
        assert self.peering.address is not None
        self.address = self.peering.address

    def run(self, coroutine: object) -> object:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(TIMEOUT_S)  # type: ignore[arg-type]

    def up(self, number: int) -> bool:
        return self.links.up(number, GET) and self.links.up(number, BULK)

    def close(self) -> None:
        self.run(self.peering.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
        self.links.stop()
        self.store.verify()
        self.store.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    return Cluster(tmp_path_factory.mktemp("peering"))


@pytest.fixture
def running(cluster: Cluster) -> Iterator[Callable[..., Running]]:
    made: list[Running] = []

    def make(name: str, addresses: dict[str, tuple[str, int]], **options: int) -> Running:
        made.append(Running(cluster, name, addresses, **options))
        return made[-1]

    yield make
    for each in made:
        if not each.loop.is_closed():
            each.close()


def greet(cluster: Cluster, address: tuple[str, int], name: str, kind: str, generation: int) -> Connection:
    """Connect as a node does; ProtocolError with the reason where it is refused."""
    sock = socket.create_connection(address, TIMEOUT_S)
    connection = Connection(cluster.context(name), sock.detach(), False)
    try:
        connection.handshake(TIMEOUT_S)
        mine = hello_of(name, cluster.names.index(name) + 1, generation, kind)
        connection.send(frames.pack(FrameType.HELLO, hello.encode(mine)), TIMEOUT_S)
        answer, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
        body = connection.receive(length, TIMEOUT_S)
        if answer == FrameType.REFUSE:
            raise RamsterError(hello.decode_refusal(body))
        assert answer == FrameType.HELLO
    except BaseException:
        connection.close()
        raise
    return connection


# --- what a peer says -------------------------------------------------------------------------------------------------


def oddities(name: str, number: int) -> list[bytes]:
    """What a peer with a good certificate may say instead of an honest HELLO."""
    honest = msgspec.json.decode(hello.encode(hello_of(name, number, 7, "get")))

    def changed(**change: object) -> bytes:
        return frames.pack(FrameType.HELLO, msgspec.json.encode(honest | change))

    deep = hello.encode(hello_of(name, number, 7, "get"))[:-1] + b',"zone":' + b"[" * 16000
    return [
        changed(lend_segments=-1),
        changed(lend_segments=1 << 32),
        changed(lend_segments=1 << 80),
        changed(generation=-1),
        changed(generation=1 << 64),
        changed(number=1 << 40),
        changed(name="\u00e4\n" * 100),
        changed(features=["x" * 100] * 100),
        frames.pack(FrameType.HELLO, deep),
        frames.pack(FrameType.HELLO, b"\xff\xfe"),
        frames.pack(FrameType.HELLO, b""),
        frames.pack(FrameType.REFUSE, b'{"reason": "\x1b[2J' + b"x" * 9000 + b'"}'),
        frames.pack(FrameType.REFUSE, b"[" * 16000),
        frames.pack(FrameType.GOODBYE, b""),
        bytes(48),
        b"",
    ]


def test_the_connecting_task_survives_whatever_a_peer_answers(
    cluster: Cluster, running: Callable[..., Running], caplog: pytest.LogCaptureFixture
) -> None:
    """Afterwards an honest peer at the same address is connected to, on both connections."""
    answers = oddities("alpha", 1)
    context = cluster.context("alpha")
    done = threading.Event()
    ends: list[Connection] = []

    def serve(listener: socket.socket) -> None:
        turn = 0
        while not done.is_set():
            try:
                sock, _ = listener.accept()
            except TimeoutError:
                continue
            connection = Connection(context, sock.detach(), True)
            try:
                connection.handshake(TIMEOUT_S)
                _, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
                theirs = hello.decode_hello(connection.receive(length, TIMEOUT_S))
                # Each kind of connection is told all of it.
                if turn < 2 * len(answers):
                    if answers[turn // 2]:
                        connection.send(answers[turn // 2], TIMEOUT_S)
                        connection.receive(1, TIMEOUT_S)  # until it is told off, or closed
                else:
                    own = hello_of("alpha", 1, 7, theirs.kind)
                    connection.send(frames.pack(FrameType.HELLO, hello.encode(own)), TIMEOUT_S)
                    ends.append(connection)
                    continue
            except RamsterError:
                pass
            finally:
                turn += 1
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            beta = running("beta", {"alpha": listener.getsockname()[:2]})
            wait_until(lambda: beta.up(1), "the honest answer is taken")
        finally:
            done.set()
            thread.join()
            for end in ends:
                end.close()
    said = [record.getMessage() for record in caplog.records if "cannot connect" in record.getMessage()]
    assert any("lend_segments" in line for line in said) and any("nested too deeply" in line for line in said)
    assert max(map(len, said)) < 700 and not any(record.exc_info for record in caplog.records)


def test_the_accepting_side_survives_whatever_a_peer_says(cluster: Cluster, running: Callable[..., Running]) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    before = alpha.peering.counters.refused_connections
    odd = [each for each in oddities("beta", 2) if each]
    for answer in odd:
        sock = socket.create_connection(alpha.address, TIMEOUT_S)
        connection = Connection(cluster.context("beta"), sock.detach(), False)
        connection.handshake(TIMEOUT_S)
        connection.send(answer, TIMEOUT_S)
        kind, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
        assert kind == FrameType.REFUSE and connection.receive(length, TIMEOUT_S)
        connection.close()
    wait_until(lambda: alpha.peering.counters.refused_connections == before + len(odd), "each of them is counted")
    greet(cluster, alpha.address, "beta", "get", 5).close()


# --- whose certificate it is ------------------------------------------------------------------------------------------


def refusal(context: TlsContext, address: tuple[str, int], **said: object) -> str:
    """The reason that somebody with this certificate is told, who says to be beta, except for what is `said`."""
    connection = Connection(context, socket.create_connection(address, TIMEOUT_S).detach(), False)
    try:
        connection.handshake(TIMEOUT_S)
        mine = msgspec.structs.replace(hello_of("beta", 2, 5, "get"), **said)
        connection.send(frames.pack(FrameType.HELLO, hello.encode(mine)), TIMEOUT_S)
        kind, length = frames.unpack(connection.receive(frames.HEADER_BYTES, TIMEOUT_S))
        assert kind == FrameType.REFUSE
        return hello.decode_refusal(connection.receive(length, TIMEOUT_S))
    finally:
        connection.close()


def test_a_clients_certificate_makes_nobody_a_node(
    cluster: Cluster, running: Callable[..., Running], tmp_path: Path
) -> None:
    """Not even one with the name of a peer, as whoever has the authority's key elsewhere could make it."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    for path in (cluster.files["alpha"].ca, cluster.files["alpha"].ca.with_name(identity.CA_KEY)):
        shutil.copy(path, tmp_path)
    client = identity.add_client(tmp_path, "beta")
    context = TlsContext(str(client.ca), str(client.cert), str(client.key))
    assert "it reaches exports and makes nobody a node" in refusal(context, alpha.address)
    wait_until(lambda: alpha.peering.counters.refused_connections == 1, "counted")
    assert not alpha.links.up(2, GET)


def test_the_certificates_cluster_is_compared(
    cluster: Cluster, running: Callable[..., Running], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One authority, two clusters."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    for path in (cluster.files["alpha"].ca, cluster.files["alpha"].ca.with_name(identity.CA_KEY)):
        shutil.copy(path, tmp_path)
    made = identity._name
    monkeypatch.setattr(identity, "_name", lambda common, _: made(common, "farm"))
    beta = identity.add_node(tmp_path, "beta")
    context = TlsContext(str(beta.ca), str(beta.cert), str(beta.key))
    assert refusal(context, alpha.address) == "its certificate is for cluster 'farm', not for 'lab'"
    assert not alpha.links.up(2, GET)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"segment_bytes": 131072}, "its segments have 131072 bytes"),
        ({"cluster": "elsewhere"}, "it belongs to cluster 'elsewhere'"),
        ({"number": 3}, "it calls itself 'beta', number 3"),
    ],
    ids=["segment", "cluster", "number"],
)
def test_why_a_peer_is_refused_stands_in_the_row_of_its_certificate(
    cluster: Cluster, running: Callable[..., Running], said: dict[str, object], words: str
) -> None:
    """Whatever number and name are said; until it is let in."""
    gamma = running("gamma", {})
    # Somebody answers there, and is not the one: attempts of alpha to be called change nothing.
    alpha = running("alpha", {"beta": gamma.address, "gamma": gamma.address})
    lie = refusal(cluster.context("gamma"), alpha.address)
    assert "its certificate is for 'gamma'" in lie
    assert alpha.peering.refusals() == {3: f"refused: {lie}"}
    reason = refusal(cluster.context("beta"), alpha.address, **said)
    assert words in reason
    assert alpha.peering.refusals() == {2: f"refused: {reason}", 3: f"refused: {lie}"}
    end = greet(cluster, alpha.address, "beta", "get", 5)
    wait_until(lambda: alpha.links.up(2, GET), "let in")
    assert alpha.peering.refusals() == {3: f"refused: {lie}"}
    end.close()


# --- another process of a peer ----------------------------------------------------------------------------------------


def generation_of(node: Running, peer: int) -> int | None:
    life = node.links.probe(peer, False)
    return None if life is None else life[0]


@pytest.mark.parametrize("kind", ["get", "bulk"])
def test_a_copied_key_displaces_no_link_that_answers(
    cluster: Cluster, running: Callable[..., Running], kind: str
) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    beta = running("beta", {"alpha": alpha.address})
    wait_until(lambda: alpha.up(2) and beta.up(1), "up")
    for generation in range(2000, 2005):
        with pytest.raises(RamsterError, match="another process with the certificate of beta is connected"):
            greet(cluster, alpha.address, "beta", kind, generation)
    assert alpha.up(2) and beta.up(1) and generation_of(alpha, 2) == 1000
    assert beta.peering.counters.connected == 2, "nothing had to be connected again"


def test_the_connecting_side_believes_no_other_process_either(
    cluster: Cluster, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the peer's key and its address: one of two links is cut and comes back as somebody else's."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    beta = running("beta", {"alpha": alpha.address})
    wait_until(lambda: alpha.up(2) and beta.up(1), "up")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            sock, _ = listener.accept()
            end = Connection(cluster.context("alpha"), sock.detach(), True)
            end.handshake(TIMEOUT_S)
            _, length = frames.unpack(end.receive(frames.HEADER_BYTES, TIMEOUT_S))
            end.receive(length, TIMEOUT_S)
            end.send(frames.pack(FrameType.HELLO, hello.encode(hello_of("alpha", 1, 7, "get"))), TIMEOUT_S)
            kind, length = frames.unpack(end.receive(frames.HEADER_BYTES, TIMEOUT_S))
            said.append(hello.decode_refusal(end.receive(length, TIMEOUT_S)) if kind == FrameType.REFUSE else str(kind))
            end.close()

        said: list[str] = []
        thread = threading.Thread(target=pretend)
        thread.start()
        ours = Connection(
            cluster.context("beta"), socket.create_connection(listener.getsockname(), TIMEOUT_S).detach(), False
        )
        stands, here = beta.peering._stands, threading.current_thread()
        # As if this one had been cut: only for whoever dials here.
        monkeypatch.setattr(
            beta.peering,
            "_stands",
            lambda state, kind: threading.current_thread() is not here and stands(state, kind),
        )
        with pytest.raises(RamsterError, match="another process"):
            beta.peering._greet(ours, beta.peering._peers[1], "get", TIMEOUT_S)
        thread.join()
    assert "another process with the certificate of alpha" in said[0]
    assert beta.up(1) and generation_of(beta, 1) == 1000


def test_a_peer_that_was_restarted_is_back(cluster: Cluster, running: Callable[..., Running]) -> None:
    """Its old connections end with its process."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    for generation in range(1000, 1004):
        beta = running("beta", {"alpha": alpha.address}, generation=generation)
        wait_until(lambda beta=beta: alpha.up(2) and beta.up(1), "up")  # type: ignore[misc]
        assert generation_of(alpha, 2) == generation
        beta.close()


def test_a_link_that_does_not_answer_makes_room(cluster: Cluster, running: Callable[..., Running]) -> None:
    """As if the peer's machine had vanished: nothing is closed, and nobody answers."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)}, idle_timeout_ms=300)
    silent = [greet(cluster, alpha.address, "beta", kind, 1000) for kind in KINDS]
    wait_until(lambda: alpha.up(2), "up")
    ends = [greet(cluster, alpha.address, "beta", kind, 2000) for kind in KINDS]
    wait_until(lambda: alpha.up(2) and generation_of(alpha, 2) == 2000, "the new one is believed")
    for end in (*silent, *ends):
        end.close()


def test_nobody_looks_again_and_again_whether_a_link_answers(
    cluster: Cluster, running: Callable[..., Running], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer that waits is woken by what happens."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)}, idle_timeout_ms=1000)
    silent = greet(cluster, alpha.address, "beta", "get", 1000)
    wait_until(lambda: alpha.links.up(2, GET), "up")
    looks: list[int] = []
    probe = alpha.links.probe

    def counting(number: int, ask: bool) -> tuple[int, int] | None:
        looks.append(number)
        return probe(number, ask)

    monkeypatch.setattr(alpha.links, "probe", counting)
    end = greet(cluster, alpha.address, "beta", "get", 2000)
    wait_until(lambda: alpha.links.up(2, GET) and probe(2, False) is not None and generation_of(alpha, 2) == 2000, "in")
    assert 4 <= len(looks) < 20, "it waited for a second"
    for each in (silent, end):
        each.close()


def test_a_node_that_closes_lets_nobody_wait_for_a_sign_of_life(
    cluster: Cluster, running: Callable[..., Running]
) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)}, idle_timeout_ms=60_000)
    silent = greet(cluster, alpha.address, "beta", "get", 1000)
    wait_until(lambda: alpha.links.up(2, GET), "up")
    with ThreadPoolExecutor(1) as pool:
        newcomer = pool.submit(greet, cluster, alpha.address, "beta", "get", 2000)
        # The one that waits has been told of: a PING has come.
        assert frames.unpack(silent.receive(frames.HEADER_BYTES, TIMEOUT_S))[0] == FrameType.PING
        alpha.close()
        with pytest.raises(RamsterError, match="this node stops"):
            newcomer.result(TIMEOUT_S)
    silent.close()


def frames_of(end: Connection) -> list[int]:
    """The types of all frames that come, until it is closed."""
    found: list[int] = []
    with contextlib.suppress(RamsterError):
        while True:
            kind, length = frames.unpack(end.receive(frames.HEADER_BYTES, TIMEOUT_S))
            found.append(kind)
            if length:
                end.receive(length, TIMEOUT_S)
    return found


@pytest.mark.parametrize(("generation", "pings"), [(1000, 0), (2000, 1)], ids=["its own process", "another one"])
def test_only_a_link_of_another_process_is_asked_for_a_sign_of_life(
    cluster: Cluster, running: Callable[..., Running], generation: int, pings: int
) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)}, idle_timeout_ms=300)
    first = greet(cluster, alpha.address, "beta", "get", 1000)
    wait_until(lambda: alpha.links.up(2, GET), "up")
    with ThreadPoolExecutor(1) as pool:
        came = pool.submit(frames_of, first)
        second = greet(cluster, alpha.address, "beta", "bulk", generation)
        wait_until(lambda: alpha.links.up(2, BULK), "let in")
        alpha.links.detach(2)
        assert came.result(TIMEOUT_S).count(FrameType.PING) == pings
    for end in (first, second):
        end.close()


def test_a_goodbye_is_an_end(cluster: Cluster, running: Callable[..., Running]) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    old = greet(cluster, alpha.address, "beta", "bulk", 1000)
    wait_until(lambda: alpha.links.up(2, BULK), "up")
    old.send(frames.pack(FrameType.GOODBYE, b""), TIMEOUT_S)
    wait_until(lambda: alpha.links.probe(2, False) is None, "said")
    greet(cluster, alpha.address, "beta", "bulk", 2000).close()
    old.close()


# --- what is said of it ----------------------------------------------------------------------------------------------


def test_why_there_is_no_link_is_said_once(
    cluster: Cluster,
    running: Callable[..., Running],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For both connections together, however often they are tried; and again when a link that was there is lost."""
    tries = [0]
    pause = Redial.pause

    def counting(self: Redial, number: int, urgent: bool) -> tuple[float, float]:
        tries[0] += 1
        return pause(self, number, urgent)

    monkeypatch.setattr(Redial, "pause", counting)
    (port,) = free_ports(1)
    beta = running("beta", {"alpha": ("127.0.0.1", port)})

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if "cannot connect" in record.getMessage()]

    wait_until(lambda: tries[0] > 20, "tried")
    assert len(said()) == 1 and "connection refused" in said()[0]
    alpha = running("alpha", {}, port=port)
    alpha.close()
    alpha = running("alpha", {"beta": beta.address}, port=port)
    wait_until(lambda: alpha.up(2) and beta.up(1), "up")
    before, tries[0] = len(said()), 0
    alpha.close()
    wait_until(lambda: tries[0] > 20 and "connection refused" in said()[-1], "tried again")
    again = said()[before:]
    assert len(again) == len(set(again)) <= 3, again


# --- strangers --------------------------------------------------------------------------------------------------------


def threads_of(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


def is_closed(sock: socket.socket) -> bool:
    """Without waiting."""
    try:
        return sock.recv(1, socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


CLIENT_HELLO = b"\x16\x03\x01\x01\x00\x01" + bytes(255)


@pytest.mark.parametrize(
    ("count", "says"),
    [(64, b""), (300, b""), (300, CLIENT_HELLO[:40]), (128, CLIENT_HELLO[:6] + bytes(255))],
    ids=["64 idle", "300 idle", "300 with half a ClientHello", "128 that stop after it"],
)
def test_idle_strangers_keep_nobody_out(
    cluster: Cluster, running: Callable[..., Running], count: int, says: bytes
) -> None:
    """All from the peers' own address, the worst place; they are there before, and stay."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1), "gamma": ("127.0.0.1", 1)})
    strangers: list[socket.socket] = []
    try:
        for _ in range(count):
            strangers.append(socket.create_connection(alpha.address, TIMEOUT_S))
            if says:
                strangers[-1].sendall(says)

        def one(number: int) -> str:
            name, kind = ("beta", "gamma")[number % 2], ("get", "bulk")[number // 2 % 2]
            try:
                greet(cluster, alpha.address, name, kind, 5).close()
            except RamsterError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(4) as pool:
            failed = [reason for reason in pool.map(one, range(24)) if reason]
        assert not failed
        if len(says) < 100:
            assert threads_of("ramster-greet") <= 24, "the idle ones have taken none"
    finally:
        for sock in strangers:
            sock.close()


class Flood:
    """Strangers who say `says`, and come back at once when they are closed: as fast as this machine can."""

    def __init__(self, address: tuple[str, int], count: int, says: bytes) -> None:
        self.address, self.says = address, says
        self.came = 0
        self._over = threading.Event()
        self._poll = select.epoll()
        self._socks: dict[int, socket.socket] = {}
        for _ in range(count):
            self._come()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _come(self) -> None:
        sock = socket.socket()
        try:
            sock.connect(self.address)
            sock.sendall(self.says)
        except ConnectionError:
            pass  # closed already, which the poll says too
        self._socks[sock.fileno()] = sock
        self._poll.register(sock, select.EPOLLIN | select.EPOLLRDHUP)
        self.came += 1

    def _run(self) -> None:
        while not self._over.is_set():
            for fd, _ in self._poll.poll(0.05):
                self._socks.pop(fd).close()
                self._come()

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self._poll.close()
        for sock in self._socks.values():
            sock.close()


@pytest.mark.parametrize(
    ("count", "says"), [(65, b""), (200, CLIENT_HELLO[:40])], ids=["65 idle", "200 with half a ClientHello"]
)
def test_a_flood_that_comes_back_at_once_keeps_nobody_out(
    cluster: Cluster, running: Callable[..., Running], caplog: pytest.LogCaptureFixture, count: int, says: bytes
) -> None:
    """They are more than one address may have, so one of them is always on its way back. Every honest caller gets in,
    who as a node does comes again where it was in the way.
    """
    alpha = running("alpha", {"beta": ("127.0.0.1", 1), "gamma": ("127.0.0.1", 1)})
    deadline = time.monotonic() + TIMEOUT_S
    flood = Flood(alpha.address, count, says)

    def one(number: int) -> str:
        name, kind = ("beta", "gamma")[number % 2], ("get", "bulk")[number // 2 % 2]
        why = "no time"
        while time.monotonic() < deadline:
            try:
                greet(cluster, alpha.address, name, kind, 5).close()
            except (RamsterError, OSError) as error:
                why = str(error)
            else:
                return ""
        return why

    try:
        with ThreadPoolExecutor(4) as pool:
            failed = [reason for reason in pool.map(one, range(24)) if reason]
        assert not failed, flood.came
        assert flood.came > count, "they did come back"
        alpha.run(asyncio.sleep(0))  # the loop is there for others, too
    finally:
        flood.close()
    said = {record.levelname for record in caplog.records if "it had to make room" in record.getMessage()}
    assert said == {"WARNING"}


def client_hello(context: TlsContext) -> bytes:
    """A whole one, as a peer would send it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        near = socket.create_connection(listener.getsockname(), TIMEOUT_S)
        far, _ = listener.accept()
        connection = Connection(context, near.detach(), False)
        handshake = pool.submit(connection.handshake, TIMEOUT_S)
        record = far.recv(5, socket.MSG_WAITALL)
        record += far.recv(int.from_bytes(record[3:5], "big"), socket.MSG_WAITALL)
        far.close()
        assert handshake.exception(TIMEOUT_S) is not None
        connection.close()
    return record


def test_a_flood_of_handshakes_from_a_peers_own_address_leaves_the_other_way(
    cluster: Cluster, running: Callable[..., Running]
) -> None:
    """Another user of its machine, say. Each of them is worth a thread until it is displaced, as nothing tells it from
    the peer; the node that is flooded gets through to the peer all the same.
    """
    (port,) = free_ports(1)
    alpha = running("alpha", {"beta": ("127.0.0.1", port)})
    flood = Flood(alpha.address, 200, client_hello(cluster.context("beta")))
    try:
        wait_until(lambda: flood.came > 400, "it is under way")
        beta = running("beta", {"alpha": alpha.address}, port=port)
        wait_until(lambda: alpha.up(2) and beta.up(1), "linked", TIMEOUT_S)
        assert alpha.peering.reasons() == {2: ""} and beta.peering.reasons() == {1: ""}
    finally:
        flood.close()
    assert alpha.peering.counters.connected > 0, "the node with the lower number did it"


def test_a_node_that_gets_through_is_connected_to_by_nobody(cluster: Cluster, running: Callable[..., Running]) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    beta = running("beta", {"alpha": alpha.address})
    wait_until(lambda: alpha.up(2) and beta.up(1), "up")
    for kind in KINDS:
        with pytest.raises(RamsterError, match=hello.WRONG_WAY):
            greet(cluster, beta.address, "alpha", kind, 1000)
    wait_until(lambda: alpha.up(2) and beta.up(1), "up")


def test_a_queue_of_callers_holds_up_nobody_else_in_the_loop(cluster: Cluster, running: Callable[..., Running]) -> None:
    """Those who came while the loop was busy, and found a place in the kernel's queue: a few at a time."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    count, gate = 200, threading.Event()
    silent = alpha.peering._door.silent
    turns = [0]

    def look() -> None:
        turns.append(len(silent) + silent.displaced)
        if turns[-1] < count:
            alpha.loop.call_soon(look)

    alpha.loop.call_soon_threadsafe(gate.wait, TIMEOUT_S)
    strangers: list[socket.socket] = []
    try:
        strangers.extend(socket.create_connection(alpha.address, TIMEOUT_S) for _ in range(count))
        alpha.loop.call_soon_threadsafe(look)
        gate.set()
        wait_until(lambda: turns[-1] == count, "all were accepted")
        assert max(after - before for before, after in itertools.pairwise(turns)) <= 16
    finally:
        gate.set()
        for sock in strangers:
            sock.close()


def test_a_stranger_who_says_anything_else_is_shown_out_without_a_thread(
    cluster: Cluster, running: Callable[..., Running]
) -> None:
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    for count, data in enumerate((b"GET / HTTP/1.1\r\n\r\n", bytes(4096), b"\x16\x03\x01\xff\xff\x01" + bytes(9)), 1):
        with socket.create_connection(alpha.address, TIMEOUT_S) as sock:
            sock.sendall(data)
            wait_until(lambda sock=sock: is_closed(sock), "closed")  # type: ignore[misc]
            wait_until(lambda count=count: alpha.peering.counters.garbage_connections == count, "counted")  # type: ignore[misc]
    assert threads_of("ramster-greet") == 0


def test_a_client_hello_that_comes_byte_by_byte_wakes_nobody_before_it_is_whole(
    cluster: Cluster, running: Callable[..., Running]
) -> None:
    """And is answered then as any other: nothing of it was taken away."""
    alpha = running("alpha", {"beta": ("127.0.0.1", 1)})
    with socket.create_server(("127.0.0.1", 0)) as between:
        near = socket.create_connection(between.getsockname(), TIMEOUT_S)
        far, _ = between.accept()
    connection = Connection(cluster.context("beta"), near.detach(), False)
    with ThreadPoolExecutor(1) as pool, socket.create_connection(alpha.address, TIMEOUT_S) as sock, far:
        handshake = pool.submit(connection.handshake, TIMEOUT_S)
        record = far.recv(5, socket.MSG_WAITALL)
        record += far.recv(int.from_bytes(record[3:5], "big"), socket.MSG_WAITALL)
        for each in record[:-1]:
            sock.sendall(bytes([each]))
        assert threads_of("ramster-greet") == 0
        sock.sendall(record[-1:])
        far.sendall(sock.recv(65536))
        while not handshake.done():
            for source, target in ((sock, far), (far, sock)):
                source.settimeout(0.05)
                with contextlib.suppress(TimeoutError):
                    target.sendall(source.recv(65536))
        assert handshake.result()
        connection.close()
