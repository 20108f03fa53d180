"""Every knob of the configuration, declared once: name, unit, default, range, help.

A field of these frozen dataclasses is a knob: its name is the TOML key plus the unit (`size_bytes` is `size`), its
metadata the `Knob`. The loader, docs/configuration.md and the tests read nothing else. Values are in base units:
bytes, milliseconds, pages; fractions have none.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, field, fields
from ipaddress import AddressValueError, IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, Final

from ramster.config.paths import DEFAULT_RUN_DIR_RULE, control_socket, default_run_dir
from ramster.config.units import format_bytes, format_ms, parse_bytes, parse_ms
from ramster.constants import (
    ARENA_BYTES_DEFAULT,
    ARENA_BYTES_MIN,
    MIB,
    NAME_PATTERN,
    NAME_RULE,
    NODE_NUMBER_MAX,
    PAGE_BYTES,
    POOL_PAGES_MAX,
    PORT_DEFAULT,
    SEGMENT_BYTES_DEFAULT,
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    SOCKET_PATH_BYTES_MAX,
)

_PORT_MAX: Final = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """An IP address and a TCP port; no names, because the page path never waits for a resolver."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def loopback(self) -> bool:
        """Whether this machine alone can reach it."""
        return ip_address(self.host).is_loopback


@dataclass(frozen=True, slots=True)
class Knob:
    """What is known of a knob besides its name, type and default."""

    help: str
    allowed: str
    suffix: str
    parse: Callable[[object], object]  # ValueError with what is allowed
    show: Callable[[Any], str]
    default_rule: str | None = None  # where the default is not a constant


def _declare(knob: Knob, default: object, factory: Callable[[], object] | None = None) -> Any:
    # Any: the field's own annotation gives its type, as with dataclasses.field.
    metadata = {"knob": knob}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def _ranged(
    parse: Callable[[object], Any], show: Callable[[Any], str], low: Any, high: Any, rule: str
) -> tuple[Callable[[object], object], str]:
    bounds = f"{show(low)} or more" if high is None else f"{show(low)} to {show(high)}"

    def check(value: object) -> object:
        number = parse(value)
        if number < low or (high is not None and number > high):
            raise ValueError(f"allowed is {bounds}")
        return number

    return check, f"{rule}: {bounds}" if rule else bounds


def _size(default: object, *, at_least: int = 0, at_most: int | None = None, rule: str = "", help: str) -> Any:
    parse, allowed = _ranged(parse_bytes, format_bytes, at_least, at_most, "size")
    return _declare(Knob(help, allowed, "_bytes", parse, format_bytes, rule or None), default)


def _time(default: int, *, at_least: int = 1, at_most: int, help: str) -> Any:
    parse, allowed = _ranged(parse_ms, format_ms, at_least, at_most, "time")
    return _declare(Knob(help, allowed, "_ms", parse, format_ms), default)


def _integer(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("allowed is an integer")


def _count(default: object, *, unit: str = "", at_least: int, at_most: int, help: str) -> Any:
    parse, allowed = _ranged(_integer, str, at_least, at_most, "integer")
    return _declare(Knob(help, allowed, f"_{unit}" if unit else "", parse, str), default)


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise ValueError("allowed is a fraction such as 0.5")


def _fraction(default: float, *, at_least: float, at_most: float, help: str) -> Any:
    parse, allowed = _ranged(_number, str, at_least, at_most, "fraction")
    return _declare(Knob(help, allowed, "", parse, str), default)


def _switch(default: bool, *, help: str) -> Any:
    def parse(value: object) -> bool:
        if isinstance(value, bool):
            return value
        raise ValueError("allowed are true and false")

    return _declare(Knob(help, "true or false", "", parse, lambda value: str(value).lower()), default)


def _choice(default: str, *others: str, help: str) -> Any:
    allowed = " or ".join(f'"{word}"' for word in (default, *others))

    def parse(value: object) -> str:
        if isinstance(value, str) and value in (default, *others):
            return value
        raise ValueError(f"allowed is {allowed}")

    return _declare(Knob(help, allowed, "", parse, lambda value: f'"{value}"'), default)


def _name(*, help: str) -> Any:
    def parse(value: object) -> str:
        if isinstance(value, str) and NAME_PATTERN.fullmatch(value):
            return value
        raise ValueError(f"allowed are {NAME_RULE}")

    return _declare(Knob(help, f"name: {NAME_RULE}", "", parse, str), MISSING)


def _names(*, at_most: int, help: str) -> Any:
    def parse(value: object) -> tuple[str, ...]:
        given = value if isinstance(value, list) else [value]
        if len(given) > at_most:
            raise ValueError(f"allowed are {at_most} names")
        for one in given:
            if not isinstance(one, str) or not NAME_PATTERN.fullmatch(one):
                raise ValueError(f"allowed are names, each {NAME_RULE}")
        return tuple(given)

    def show(names: tuple[str, ...]) -> str:
        return "[" + ", ".join(f'"{one}"' for one in names) + "]"

    return _declare(Knob(help, f"name: {NAME_RULE}; or a list of up to {at_most} of them", "", parse, show), ())


def _path(default: object = MISSING, *, factory: Callable[[], Path] | None = None, rule: str = "", help: str) -> Any:
    def parse(value: object) -> Path:
        if isinstance(value, str) and value and "\0" not in value:
            return Path(value)
        raise ValueError("allowed is a path")

    return _declare(Knob(help, "path", "", parse, str, rule or None), default, factory)


def parse_address(value: object, port_min: int = 1) -> Address:
    """An Address of "10.0.0.2:7777" or "[fd00::2]:7777"; ValueError says what is allowed."""
    rule = f'allowed is "IPv4:port" or "[IPv6]:port" with a port of {port_min} to {_PORT_MAX}'
    match = re.fullmatch(r"(?:\[([^]]+)\]|([^:\[\]]+)):([0-9]{1,5})", value) if isinstance(value, str) else None
    if match is None or not port_min <= int(match[3]) <= _PORT_MAX:
        raise ValueError(rule)
    try:
        host = str(IPv6Address(match[1])) if match[1] else str(IPv4Address(match[2]))
    except AddressValueError:
        raise ValueError(rule) from None
    return Address(host, int(match[3]))


def _address(default: object = MISSING, *, port_min: int, help: str) -> Any:
    allowed = f'"IPv4:port" or "[IPv6]:port", port {port_min} to {_PORT_MAX}'
    return _declare(Knob(help, allowed, "", lambda value: parse_address(value, port_min), lambda a: f'"{a}"'), default)


def _addresses(*, port_min: int, at_most: int, help: str) -> Any:
    each = f'"IPv4:port" or "[IPv6]:port", port {port_min} to {_PORT_MAX}'

    def parse(value: object) -> tuple[Address, ...]:
        given = value if isinstance(value, list) else [value]
        if len(given) > at_most:
            raise ValueError(f"allowed are {at_most} addresses")
        return tuple(parse_address(one, port_min) for one in given)

    def show(addresses: tuple[Address, ...]) -> str:
        return "[" + ", ".join(f'"{one}"' for one in addresses) + "]"

    return _declare(Knob(help, f"{each}; or a list of up to {at_most} of them", "", parse, show), ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """`[node]`: who this node is."""

    name: str = _name(help="Name of this node in its certificate, in peers' files and in messages.")
    number: int = _count(
        MISSING, at_least=0, at_most=NODE_NUMBER_MAX, help="Number of this node, unique in the cluster."
    )
    run_dir: Path = _path(
        factory=default_run_dir, rule=DEFAULT_RUN_DIR_RULE, help="Folder of the node's sockets; made when missing."
    )
    guard: str = _choice(
        "auto",
        "on",
        "off",
        help="What the node does so that a kernel can swap on it: its memory stays in RAM, its allocations start no "
        "I/O, the OOM killer spares it once it has an export, and the kernel's memory reserve is open to it while this "
        'machine swaps on one ("on": both from the start). See docs/guard.md.',
    )
    core_dumps: bool = _switch(
        False,
        help="Let a node that crashes leave a core file, and debuggers of its user attach: the file holds the keys of "
        "the node. Off: neither, but for root.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`[cluster]`: whom this node trusts; required as soon as it has peers or lends.

    `ramster cluster init` makes the files.
    """

    id: str = _name(help="Name of the cluster; a certificate of another one is refused.")
    ca: Path = _path(help="Certificate of the cluster's own authority.")
    cert: Path = _path(help="Certificate of this node.")
    key: Path = _path(help="Private key of this node; readable by its user alone.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """`[arena]`: the RAM that holds this node's compressed pages."""

    size_bytes: int = _size(
        ARENA_BYTES_DEFAULT, at_least=ARENA_BYTES_MIN, help="RAM taken at start and never exceeded."
    )
    segment_bytes: int = _size(
        SEGMENT_BYTES_DEFAULT,
        at_least=SEGMENT_BYTES_MIN,
        at_most=SEGMENT_BYTES_MAX,
        help="The unit that moves to a lender; a power of two.",
    )
    path: Path | None = _path(None, rule="none: anonymous memory", help="File to keep the arena in, on a tmpfs.")
    keep_ms: int = _time(
        0,
        at_least=0,
        at_most=7 * 86_400_000,
        help="How long the RAM of the arena stays taken and locked, by a small process of its own, after the node was "
        "killed, so that the next start need not find it again; 0 is not at all. A stop gives it back at once.",
    )
    lock: bool = _switch(True, help="Lock the arena in RAM where the limits allow it, so that it is never swapped.")
    full_wait_ms: int = _time(
        1000, at_least=0, at_most=60_000, help="How long a put waits for room before it is refused."
    )
    clean_low: float = _fraction(
        0.08, at_least=0.01, at_most=0.5, help="Free part of the arena below which the cleaner works."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lend:
    """`[lend]`: the RAM that this node gives to others."""

    size_bytes: int = _size(0, help="RAM granted to other nodes, taken at start; 0B lends nothing.")
    borrower_share: float = _fraction(
        1.0,
        at_least=0.0,
        at_most=1.0,
        help="Part of it that one borrower may fill, at least one segment, and of the number of segments that can be "
        "held. A single borrower may have all by default: RAM that idles helps nobody; set 1/n where n borrowers must "
        "not crowd each other out.",
    )
    foreign_grace_ms: int = _time(
        600_000, at_least=1000, at_most=7 * 86_400_000, help="How long pages of a node that is silent are kept."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Links:
    """`[links]`: connections to other nodes."""

    listen: Address = _address(
        Address("0.0.0.0", PORT_DEFAULT), port_min=0, help="Where other nodes connect; port 0 lets the kernel choose."
    )
    request_deadline_ms: int = _time(2000, at_least=10, at_most=60_000, help="How long one get waits for its reply.")
    give_up_ms: int = _time(
        5000, at_least=10, at_most=600_000, help="How long a page is tried for, reconnects included, before it is lost."
    )
    idle_timeout_ms: int = _time(
        5000, at_least=100, at_most=600_000, help="Silence after which a connection counts as dead."
    )
    keepalive_ms: int = _time(1000, at_least=10, at_most=60_000, help="Silence after which a probe is sent.")
    reconnect_min_ms: int = _time(100, at_least=10, at_most=60_000, help="First wait before connecting again.")
    reconnect_max_ms: int = _time(
        1000,
        at_least=10,
        at_most=600_000,
        help="Longest wait before connecting again; while pages are waited for, a tenth of give_up is.",
    )
    bulk_in_flight_segments: int = _count(
        8, unit="segments", at_least=1, at_most=64, help="Segments sent to a peer and not yet acknowledged."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Remotify:
    """`[remotify]`: when pages leave for other nodes."""

    enabled: bool = _switch(True, help="Whether pages leave at all.")
    high: float = _fraction(0.75, at_least=0.0, at_most=0.98, help="Fill of the arena above which segments leave.")
    low: float = _fraction(0.60, at_least=0.0, at_most=0.98, help="Fill of the arena at which they stop leaving.")
    cold_after_ms: int = _time(
        30_000,
        at_least=0,
        at_most=7 * 86_400_000,
        help="Age at which a segment leaves without pressure too, also one that is not full; 0 is never.",
    )
    compact_below: float = _fraction(
        0.5,
        at_least=0.0,
        at_most=0.95,
        help="Live part of what a lender holds of a segment below which it is told to drop the dead rest; 0 is never.",
    )
    recompress: str = _choice(
        "auto",
        "off",
        "always",
        help='Whether pages are compressed again, with zstd, before they leave: "auto" does so while segments '
        "wait for a link that takes less than 100 MB/s, and puts have room.",
    )
    tick_ms: int = _time(50, at_least=5, at_most=10_000, help="Pause between two decisions.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """`[spill]`: a file on a disk as the last tier, for pages that neither the arena nor a lender takes."""

    path: Path | None = _path(
        None,
        rule="none: no spill file",
        help="The file, made when missing and emptied at start; on a disk, not on a tmpfs.",
    )
    size_bytes: int = _size(0, help="Disk space reserved for it at start; required with path.")
    mirror: bool = _switch(
        False,
        help="Whether everything that goes to a lender is kept in the file too, so that losing a lender loses no page.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """`[region]`: arrays larger than their RAM."""

    resident_default_bytes: int = _size(
        64 * MIB, at_least=64 * PAGE_BYTES, help="Resident budget of a region that names none."
    )
    resident_max_bytes: int = _size(0, help="Resident budget of all regions together; 0B is unlimited.")
    fault_threads: int = _count(
        1,
        at_least=1,
        at_most=16,
        help="Threads that answer page faults, for each region and process that has it mapped.",
    )
    evictor_threads: int = _count(1, at_least=1, at_most=16, help="Threads per region that write pages out.")
    busy_poll_us: int = _count(
        0,
        unit="us",
        at_least=0,
        at_most=1000,
        help="Microseconds that a fault thread stays awake for the next fault while they come so fast; needs a core.",
    )
    full_wait_ms: int = _time(
        2000,
        at_least=0,
        at_most=60_000,
        help="How long an eviction is tried before the region reports that it is full.",
    )
    full_hold_ms: int = _time(
        600_000,
        at_least=1000,
        at_most=86_400_000,
        help='How long a write to a full region waits for room where the region was made with full="wait".',
    )
    node_wait_ms: int = _time(
        2000,
        at_least=0,
        at_most=600_000,
        help="How long an application waits for a node that is gone before pages are lost.",
    )
    poison: str = _choice(
        "auto", "guard", help='How a lost page is marked: "auto" takes UFFDIO_POISON where the kernel has it.'
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nbd:
    """`[nbd]`: the server of block devices. It always listens on nbd.sock in run_dir, which needs no knob."""

    listen: tuple[Address, ...] = _addresses(
        port_min=0,
        at_most=8,
        help="Where it listens on TCP as well, 10809 being the usual port; port 0 lets the kernel choose.",
    )
    tls: str = _choice(
        "auto",
        "require",
        help='Which TCP connections must turn to TLS, with a certificate of the cluster: "auto" all but those to a '
        'loopback address, "require" those too. With a [cluster], TLS is offered everywhere.',
    )
    tls_min: str = _choice(
        "1.3",
        "1.2",
        help='The oldest TLS that clients may use. "1.2", with ECDHE and AEAD suites alone, is for nbd-client up to '
        "3.24, which has nothing newer. Links between nodes always use 1.3.",
    )
    connections_max: int = _count(
        64, at_least=1, at_most=1024, help="Connections served at a time; each costs a thread and some buffers."
    )
    handshake_timeout_ms: int = _time(
        10_000, at_least=100, at_most=600_000, help="How long a client may take to choose an export."
    )
    requests_max: int = _count(
        512,
        at_least=16,
        at_most=4096,
        help="Requests of all connections that may wait for other nodes at a time; further ones wait unread.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """`[[exports]]`: a block device that is there from the start, empty; one table each, none is usual.

    `ramster export create` makes further ones while the node runs.
    """

    name: str = _name(help="Its name in URIs and in messages.")
    size_bytes: int = _size(
        MISSING,
        at_least=1,
        at_most=POOL_PAGES_MAX * PAGE_BYTES,
        help="How large it is; rounded up to whole pages of 4096 bytes. It takes RAM for what is written alone.",
    )
    max_size_bytes: int | None = _size(
        None,
        at_least=1,
        at_most=POOL_PAGES_MAX * PAGE_BYTES,
        rule="size",
        help="How large it may ever grow.",
    )
    read_only: bool = _switch(False, help="Whether clients may only read, until `ramster export set` changes it.")
    allow: tuple[str, ...] = _names(
        at_most=64,
        help="Names of the certificates that may use it over TCP, with TLS alone (`ramster cluster client`); none "
        "for everybody who may connect.",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """`[[peers]]`: another node; one table each, none for a node on its own."""

    name: str = _name(help="Its name, as in its certificate.")
    number: int = _count(MISSING, at_least=0, at_most=NODE_NUMBER_MAX, help="Its number.")
    address: Address = _address(port_min=1, help="Where it listens.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole configuration; what the file does not say has its default."""

    node: Node
    cluster: Cluster | None = None
    arena: Arena = field(default_factory=Arena)
    lend: Lend = field(default_factory=Lend)
    links: Links = field(default_factory=Links)
    remotify: Remotify = field(default_factory=Remotify)
    spill: Spill = field(default_factory=Spill)
    region: Region = field(default_factory=Region)
    nbd: Nbd = field(default_factory=Nbd)
    exports: tuple[Export, ...] = ()
    peers: tuple[Peer, ...] = ()


#: TOML table name -> its class, in the order of the documentation.
SECTIONS: Final[dict[str, type]] = {
    "node": Node,
    "cluster": Cluster,
    "arena": Arena,
    "lend": Lend,
    "links": Links,
    "remotify": Remotify,
    "spill": Spill,
    "region": Region,
    "nbd": Nbd,
    "exports": Export,
    "peers": Peer,
}

#: Those of them that are arrays of tables: each begins with [[name]].
ARRAYS: Final = frozenset({"exports", "peers"})


def knobs(section: type) -> Iterator[tuple[str, Field[Any], Knob]]:
    """(TOML key, field, knob) of each knob of one of SECTIONS."""
    for each in fields(section):
        knob: Knob = each.metadata["knob"]
        yield each.name.removesuffix(knob.suffix), each, knob


def default_text(each: Field[Any], knob: Knob) -> str | None:
    """The default as it would stand in the file, or the rule it follows; None for a required knob."""
    if knob.default_rule is not None:
        return knob.default_rule
    return None if each.default is MISSING else knob.show(each.default)


def conflicts(config: Config) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """What is allowed knob by knob but not together: (place in the file, what is wrong and what is allowed)."""
    arena, links = config.arena, config.links
    if arena.segment_bytes & (arena.segment_bytes - 1):
        yield ("arena", "segment"), "allowed is a power of two"
    elif arena.size_bytes % arena.segment_bytes:
        below = arena.size_bytes - arena.size_bytes % arena.segment_bytes
        yield ("arena", "size"), f"allowed are multiples of segment, such as {format_bytes(below)}"
    if arena.keep_ms and arena.path is not None:
        yield ("arena", "keep"), "allowed without path, a file in memory stays by itself"
    if config.lend.size_bytes % arena.segment_bytes:
        yield ("lend", "size"), f"allowed are multiples of arena.segment, {format_bytes(arena.segment_bytes)}"
    if links.request_deadline_ms > links.give_up_ms:
        yield ("links", "request_deadline"), f"allowed is give_up, {format_ms(links.give_up_ms)}, or less"
    if links.keepalive_ms >= links.idle_timeout_ms:
        yield ("links", "keepalive"), f"allowed is less than idle_timeout, {format_ms(links.idle_timeout_ms)}"
    if links.reconnect_min_ms > links.reconnect_max_ms:
        yield ("links", "reconnect_min"), f"allowed is reconnect_max, {format_ms(links.reconnect_max_ms)}, or less"
    if 2 * links.reconnect_max_ms > links.give_up_ms:
        # A fault that is over must not go on because of the pause that it caused.
        most = format_ms(links.give_up_ms // 2)
        yield ("links", "reconnect_max"), f"allowed is half of give_up, {most}, or less"
    if config.remotify.low > config.remotify.high:
        yield ("remotify", "low"), f"allowed is high, {config.remotify.high}, or less"
    spill = config.spill
    if spill.path is not None and spill.size_bytes < arena.segment_bytes + PAGE_BYTES:
        yield (
            ("spill", "size"),
            f"allowed are {format_bytes(arena.segment_bytes + PAGE_BYTES)} or more, one segment and a header",
        )
    if spill.path is None and (spill.size_bytes or spill.mirror):
        yield ("spill",), "needs a path: which file to use"
    limit = config.region.resident_max_bytes
    if limit and config.region.resident_default_bytes > limit:
        yield ("region", "resident_default"), f"allowed is resident_max, {format_bytes(limit)}, or less"
    if config.cluster is None and (config.peers or config.lend.size_bytes):
        why = "peers" if config.peers else "lend"
        yield (why,), "needs a [cluster] section with id, ca, cert and key (ramster cluster init makes them)"
    bare = [a for a in config.nbd.listen if config.nbd.tls == "require" or not a.loopback]
    if config.cluster is None and bare:
        wrong = f"{bare[0]} is served with TLS only, which needs a [cluster] section (ramster cluster init makes one); "
        yield ("nbd", "listen"), wrong + "without one allowed are loopback addresses, not with tls = require"
    taken: set[str] = set()
    for index, export in enumerate(config.exports):
        if export.name in taken:
            yield ("exports", index, "name"), "another export has this name too"
        taken.add(export.name)
        if export.allow and config.cluster is None:
            yield ("exports", index, "allow"), "allowed with a [cluster] section, whose certificates have these names"
        if export.max_size_bytes is not None and export.max_size_bytes < export.size_bytes:
            yield ("exports", index, "max_size"), f"allowed is size, {format_bytes(export.size_bytes)}, or more"
    names, numbers = {config.node.name: "this node"}, {config.node.number: "this node"}
    for index, peer in enumerate(config.peers):
        if peer.name in names:
            yield ("peers", index, "name"), f"{names[peer.name]} has this name too"
        if peer.number in numbers:
            yield ("peers", index, "number"), f"{numbers[peer.number]} has this number too"
        names.setdefault(peer.name, f"peer {peer.name}")
        numbers.setdefault(peer.number, f"peer {peer.name}")
    socket = str(control_socket(config.node.run_dir)).encode()
    if len(socket) > SOCKET_PATH_BYTES_MAX:
        room = SOCKET_PATH_BYTES_MAX - (len(socket) - len(str(config.node.run_dir).encode()))
        yield ("node", "run_dir"), f"allowed are {room} bytes or less, because a socket's path is limited"
