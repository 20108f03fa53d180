"""The files of a static cluster: certificates, keys and a ready-to-run configuration per node, all in one directory."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from ramster.constants import NAME_PATTERN, NAME_RULE, NODE_NUMBER_MAX
from ramster.errors import UsageError

Value = str | int | bool
Sections = Mapping[str, Mapping[str, Value]]


@dataclass(frozen=True, slots=True)
class Place:
    """One node of a new cluster and where the others reach it."""

    name: str
    number: int
    host: str  # without brackets
    port: int

    @property
    def address(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_nodes(text: str) -> list[Place]:
    """Places from "name=host:port,name=[v6]:port"; numbers count from 1. UsageError names the part that is wrong."""
    places: list[Place] = []
    for part in text.split(","):
        name, equals, address = part.strip().partition("=")
        if not equals:
            raise UsageError(f"--nodes has {part.strip()!r}; write each node as name=address:port, separated by commas")
        if not NAME_PATTERN.fullmatch(name):
            raise UsageError(f"--nodes names a node {name!r}; a name is {NAME_RULE}")
        if any(place.name == name for place in places):
            raise UsageError(f"--nodes names {name!r} twice; each node needs its own name")
        host, port = _split(name, address)
        if any((place.host, place.port) == (host, port) for place in places):
            raise UsageError(f"--nodes gives {address!r} to two nodes; each needs its own address and port")
        places.append(Place(name, len(places) + 1, host, port))
    if len(places) > NODE_NUMBER_MAX:
        raise UsageError(f"--nodes lists {len(places)} nodes; a cluster has 1 to {NODE_NUMBER_MAX}")
    return places


def _split(name: str, address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    try:
        parsed = ip_address(host[1:-1] if bracketed else host)
        number = int(port)
    except ValueError:
        parsed, number = None, 0
    if parsed is None or not colon or bracketed != (parsed.version == 6) or not 1 <= number <= 65535:
        raise UsageError(
            f"--nodes gives {name} the address {address!r}; "
            "write an IPv4 address or [IPv6 address], a colon and a port of 1 to 65535"
        )
    return str(parsed), number


def create(
    directory: Path, cluster: str, places: Sequence[Place], *, extra: Mapping[str, Sections] | None = None
) -> list[Path]:
    """Makes the authority, certificates, keys and `NAME.toml` of each place; returns the paths of the latter.

    `extra` adds knobs by node name and section. Paths inside are relative to the file, so that it can be copied
    together with its certificates. Raises UsageError or CertificateError; nothing is ever overwritten.
    """
    from ramster.cluster import identity

    require_empty(directory)
    hosts = {place.name: [place.host] for place in places}
    files = identity.create_cluster(directory, cluster, list(hosts), hosts=hosts)
    written = []
    for place, pem in zip(places, files, strict=True):
        sections: dict[str, dict[str, Value]] = {
            "node": {"name": place.name, "number": place.number},
            "cluster": {"id": cluster, "ca": pem.ca.name, "cert": pem.cert.name, "key": pem.key.name},
            "links": {"listen": place.address},
        }
        if sum(other.host == place.host for other in places) > 1:
            # Nodes of one machine must not share the default directory of their sockets.
            sections["node"]["run_dir"] = place.name
        for section, values in (extra or {}).get(place.name, {}).items():
            sections.setdefault(section, {}).update(values)
        path = directory / f"{place.name}.toml"
        path.write_text(_config(sections, [peer for peer in places if peer is not place]))
        written.append(path)
    return written


def _config(sections: Sections, peers: Sequence[Place]) -> str:
    blocks = ["# One node of a RAMster cluster. `ramster config list` explains each knob."]
    blocks += [_block(f"[{name}]", values) for name, values in sections.items()]
    blocks += [
        _block("[[peers]]", {"name": peer.name, "number": peer.number, "address": peer.address}) for peer in peers
    ]
    return "\n\n".join(blocks) + "\n"


def _block(header: str, values: Mapping[str, Value]) -> str:
    # JSON's strings, integers and booleans are TOML's too.
    return "\n".join([header, *(f"{key} = {json.dumps(value)}" for key, value in values.items())])


def require_empty(directory: Path) -> None:
    """Raises UsageError unless `directory` is absent or an empty directory that this user may write to."""
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UsageError(
                f"{directory} exists and is not empty; give --directory a new directory, nothing was overwritten"
            )
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"cannot make {directory} ({error.strerror}); give a --directory that you may write to"
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise UsageError(f"{directory} is not writable; give a --directory that you may write to")
