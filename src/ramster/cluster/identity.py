"""The cluster's own certificate authority: creates it, signs nodes, describes and checks certificates.

A folder holds one cluster: `ca.crt`, `ca.key`, and `NAME.crt`, `NAME.key` per node. A node needs `ca.crt` and its own
pair; `ca.key` stays where nodes are added. A certificate binds a node's name (CN) to a cluster id (O); nodes go by
these two alone. The SAN has the name again and the node's addresses, for clients that compare what they connect to.
Clients of block devices have certificates of their own, which make nobody a node, in the folder `clients/NAME`.
Does no networking; the TLS handshake itself belongs to the engine.
"""

import os
import re
import stat
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from ramster.constants import NAME_PATTERN, NAME_RULE
from ramster.errors import CertificateError, UsageError

CA_CERTIFICATE: Final = "ca.crt"
CA_KEY: Final = "ca.key"
# What libnbd and QEMU look for in a folder of certificates.
CLIENT_CA: Final = "ca-cert.pem"
CLIENT_CERTIFICATE: Final = "client-cert.pem"
CLIENT_KEY: Final = "client-key.pem"
_CLIENTS: Final = "clients"
_KEYS: Final = (".key", CLIENT_KEY)

_CA_VALID: Final = timedelta(days=10 * 365)
_NODE_VALID: Final = timedelta(days=2 * 365)
# A renewal that would gain less leaves the certificate as it is, so that it can be asked for again and again.
_RENEWAL_GAIN: Final = timedelta(days=30)
# Clocks of a lab's machines differ; a certificate made on a fast one works at once on the others.
_BACKDATE: Final = timedelta(hours=1)
# A certificate of ours has 1 KiB; whatever is much larger is not one.
_FILE_BYTES_MAX: Final = 1 << 16
# More would outgrow what a handshake carries well.
_HOSTS_MAX: Final = 64
_HOST_CHARACTERS_MAX: Final = 253
_LABEL: Final = "[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
# A last label of digits alone would be a mistyped address.
_HOST_PATTERN: Final = re.compile(rf"(?:{_LABEL}\.)*(?![0-9]+\Z){_LABEL}")


@dataclass(frozen=True, slots=True)
class Certificate:
    """What a certificate says, in the words of a cluster."""

    subject: str  # node name, or "<cluster> CA"
    cluster_id: str
    authority: bool
    hosts: tuple[str, ...]  # of the SAN: DNS names, a node's own first, then IP addresses
    not_before: datetime  # UTC
    not_after: datetime  # UTC
    serial: int
    fingerprint: str  # SHA-256 of the DER form, lower-case hex
    client: bool  # for a client alone: it makes nobody a node


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """What `[cluster]` of a node's configuration points to."""

    ca: Path
    cert: Path
    key: Path


def node_files(directory: str | Path, node: str) -> NodeFiles:
    """Where the files of `node` are, or would be, in a cluster's folder."""
    directory = Path(directory)
    return NodeFiles(directory / CA_CERTIFICATE, directory / f"{node}.crt", directory / f"{node}.key")


def client_files(directory: str | Path, client: str) -> NodeFiles:
    """Where the files of a client are, or would be, in a cluster's folder: a folder that can be handed out."""
    folder = Path(directory) / _CLIENTS / client
    return NodeFiles(folder / CLIENT_CA, folder / CLIENT_CERTIFICATE, folder / CLIENT_KEY)


def create_cluster(
    directory: str | Path,
    cluster_id: str,
    nodes: Sequence[str] = (),
    *,
    hosts: Mapping[str, Sequence[str]] | None = None,
    now: datetime | None = None,
) -> list[NodeFiles]:
    """Makes a certificate authority and one certificate per node; keys are readable by their owner alone.

    hosts: by node, IP addresses and DNS names where clients reach it. CertificateError when a name is not allowed or
    any of the files exists, UsageError when a host is neither; then nothing was written.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    _check_names([cluster_id], "cluster id")
    _check_nodes(nodes)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{cluster_id} CA"[:64], cluster_id)
    ca = (
        _builder(name, name, key.public_key(), key.public_key(), now, now + _CA_VALID)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=False), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = _authority_files(directory, ca, key)
    for node in nodes:
        names = _alternatives(node, (hosts or {}).get(node, ()), {*nodes} - {node})
        files |= _issue(directory, node, names, ca, key, now)
    _write_all(directory, files)
    return [node_files(directory, node) for node in nodes]


def add_node(directory: str | Path, node: str, *, now: datetime | None = None) -> NodeFiles:
    """Signs one more node with the authority in `directory`.

    CertificateError when the authority is missing, broken or expired, or the node has a file there; then nothing
    was written.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    _check_nodes([node])
    ca, key = _authority(directory, now)
    _write_all(directory, _issue(directory, node, _alternatives(node, (), set()), ca, key, now))
    return node_files(directory, node)


def add_client(directory: str | Path, client: str, *, now: datetime | None = None) -> NodeFiles:
    """Signs a certificate for a client of block devices. Other nodes take it for none of theirs.

    CertificateError when the authority is missing, broken or expired, a node has the name, or the client has a file
    there; then nothing was written.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    _check_names([client], "client name")
    ca, key = _authority(directory, now)
    if (taken := node_files(directory, client).cert).exists():
        raise CertificateError(f"{taken}: {client} is a node's name; give the client one of its own")
    files, own = client_files(directory, client), ec.generate_private_key(ec.SECP256R1())
    _write_all(
        files.ca.parent,
        {
            files.ca: _pem(ca),
            files.cert: _pem(_sign(client, None, own.public_key(), ca, key, now)),
            files.key: _pem(own),
        },
    )
    return files


def renew_node(
    directory: str | Path, node: str, hosts: Sequence[str] | None = None, *, now: datetime | None = None
) -> tuple[Certificate, Certificate]:
    """Signs a node's certificate anew, for the key that it has: what it said before, and what it says now.

    hosts: IP addresses and DNS names where clients reach the node, instead of those that it has; None keeps them. The
    file is replaced at once, and left as it is, with two equal answers, where nothing would be gained. Copies of the
    old certificate stay valid until their own end.

    UsageError when a host is neither or is another node's name. CertificateError when the authority is missing, broken
    or expired, or did not sign what the node has there. Nothing was written then.
    """
    directory, now = Path(directory), now or datetime.now(UTC)
    _check_nodes([node])
    ca, key = _authority(directory, now)
    path = node_files(directory, node).cert
    old = _load_certificate(path)
    before = _describe(path, old)
    _check_issued(path, old, directory / CA_CERTIFICATE, ca)
    if before.authority or before.subject != node:
        raise CertificateError(f"{path}: is for {before.subject}, not for node {node}")
    public = old.public_key()
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise CertificateError(f"{path}: is not for an elliptic-curve key")
    others = {each.stem for each in directory.glob("*.crt")} - {node, Path(CA_CERTIFICATE).stem}
    kept = [host for host in before.hosts if host != node]
    new = _sign(node, _alternatives(node, kept if hosts is None else hosts, others), public, ca, key, now)
    after = _describe(path, new)
    if set(after.hosts) == set(before.hosts) and after.not_after - before.not_after < _RENEWAL_GAIN:
        return before, before
    _replace(path, _pem(new))
    return before, after


def describe(certificate: str | Path) -> Certificate:
    """What the certificate in that PEM file says; CertificateError when it is none or not of a cluster."""
    return _describe(Path(certificate), _load_certificate(Path(certificate)))


def describe_der(certificate: bytes) -> Certificate:
    """What a certificate that a peer showed says; CertificateError when it is not of a cluster."""
    shown = Path("the peer's certificate")
    try:
        return _describe(shown, x509.load_der_x509_certificate(certificate))
    except CertificateError:
        raise
    except Exception as error:  # what a library thinks of an odd certificate has many names
        raise CertificateError(f"{shown}: cannot be read: {error}") from error


def objection(certificate: Certificate, cluster_id: str, *, to: Literal["node", "client"]) -> str | None:
    """Why a certificate that a handshake has proved is none for a node, or a client, of this cluster; None where it is.

    An authority may sign for several clusters, and every certificate of ours can open a connection.
    """
    if certificate.cluster_id != cluster_id:
        return f"its certificate is for cluster {certificate.cluster_id!r}, not for {cluster_id!r}"
    if certificate.authority:
        return "its certificate is the authority's own"
    if to == "node" and certificate.client:
        return f"its certificate is for the client {certificate.subject!r}: it reaches exports and makes nobody a node"
    return None


def verify(files: NodeFiles, cluster_id: str, node: str, *, now: datetime | None = None) -> Certificate:
    """Checks at start what a handshake would refuse later with less to say.

    The certificate is signed by the authority, in date, of this cluster and node, and the key is its own.
    CertificateError names the first file that is wrong, and why.
    """
    now = now or datetime.now(UTC)
    ca, cert = _load_certificate(files.ca), _load_certificate(files.cert)
    authority, described = _describe(files.ca, ca), _describe(files.cert, cert)
    if not authority.authority:
        raise CertificateError(f"{files.ca}: is a node's certificate, not an authority's")
    for path, each in ((files.ca, authority), (files.cert, described)):
        if each.cluster_id != cluster_id:
            raise CertificateError(f"{path}: belongs to cluster {each.cluster_id}, not to {cluster_id}")
    _check_issued(files.cert, cert, files.ca, ca)
    if described.authority or node != described.subject:
        raise CertificateError(f"{files.cert}: is for {described.subject}, not for node {node}")
    if described.client:
        raise CertificateError(f"{files.cert}: is for a client; a node's is made by `ramster cluster init`")
    _check_dates(files.ca, ca, now)
    _check_dates(files.cert, cert, now)
    if _load_key(files.key).public_key() != cert.public_key():
        raise CertificateError(f"{files.key}: is not the key of {files.cert}")
    return described


def _authority(directory: Path, now: datetime) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    ca, key = _load_certificate(directory / CA_CERTIFICATE), _load_key(directory / CA_KEY)
    if ca.public_key() != key.public_key():
        raise CertificateError(f"{directory / CA_KEY}: is not the key of {CA_CERTIFICATE}")
    _check_dates(directory / CA_CERTIFICATE, ca, now)
    return ca, key


def _check_issued(path: Path, certificate: x509.Certificate, ca_path: Path, ca: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise CertificateError(f"{path}: was not signed by the authority in {ca_path}") from error


def _check_names(names: Iterable[str], what: str) -> None:
    for name in names:
        if not NAME_PATTERN.fullmatch(name):
            raise CertificateError(f"{what} {name!r}: allowed are {NAME_RULE}")


def _check_nodes(nodes: Sequence[str]) -> None:
    _check_names(nodes, "node name")
    if len(set(nodes)) != len(nodes):
        raise CertificateError("a node name is given twice")
    if "ca" in nodes:
        raise CertificateError(f"node name 'ca': its files would be the authority's, {CA_CERTIFICATE} and {CA_KEY}")


def _alternatives(node: str, hosts: Sequence[str], others: set[str]) -> x509.SubjectAlternativeName:
    """The node's own name and each host once, names first."""
    names = dict.fromkeys([x509.DNSName(node), *(_host(node, host, others) for host in hosts)])
    if len(names) > _HOSTS_MAX:
        raise UsageError(f"{len(names)} names and addresses of node {node}; a certificate has at most {_HOSTS_MAX}")
    return x509.SubjectAlternativeName(sorted(names, key=lambda name: isinstance(name, x509.IPAddress)))


def _host(node: str, host: str, others: set[str]) -> x509.DNSName | x509.IPAddress:
    """UsageError where it cannot be a host of this node."""
    try:
        # What follows a % is this machine's name for an interface, which says nothing elsewhere.
        address = ip_address(host.partition("%")[0])
    except ValueError:
        name = host.lower()
        if len(name) > _HOST_CHARACTERS_MAX or not _HOST_PATTERN.fullmatch(name):
            raise UsageError(
                f"{host!r:.100} is no address: write an IPv4 or IPv6 address without brackets and port, "
                "or a host name of a-z, 0-9, - and dots"
            ) from None
        if name in others:
            raise UsageError(f"{name} is another node's name: clients would take node {node} for it") from None
        return x509.DNSName(name)
    if address.is_unspecified or address.is_multicast:
        raise UsageError(f"{host} is no machine's own address; give one where clients reach node {node}")
    return x509.IPAddress(address)


def _name(common: str, cluster_id: str) -> x509.Name:
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, cluster_id),
            x509.NameAttribute(NameOID.COMMON_NAME, common),
        ]
    )


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        key_cert_sign=not sign,
        crl_sign=not sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now: datetime,
    until: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _BACKDATE)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer), critical=False)
    )


def _issue(
    directory: Path,
    node: str,
    names: x509.SubjectAlternativeName,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> dict[Path, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    files = node_files(directory, node)
    return {files.cert: _pem(_sign(node, names, key.public_key(), ca, ca_key, now)), files.key: _pem(key)}


def _sign(
    name: str,
    names: x509.SubjectAlternativeName | None,
    public: ec.EllipticCurvePublicKey,
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    now: datetime,
) -> x509.Certificate:
    cluster_id = _describe(Path(CA_CERTIFICATE), ca).cluster_id
    # Never beyond the authority's own end: such a chain fails later, with an error that names neither.
    until = min(now + _NODE_VALID, ca.not_valid_after_utc)
    # Every node both connects and listens; a client has no names that it could be reached by.
    purposes: list[ObjectIdentifier] = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if names is not None:
        purposes.insert(0, ExtendedKeyUsageOID.SERVER_AUTH)
    builder = (
        _builder(_name(name, cluster_id), ca.subject, public, ca_key.public_key(), now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
    )
    if names is not None:
        builder = builder.add_extension(names, critical=False)
    return builder.sign(ca_key, hashes.SHA256())


def _authority_files(directory: Path, ca: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> dict[Path, bytes]:
    return {directory / CA_CERTIFICATE: _pem(ca), directory / CA_KEY: _pem(key)}


def _pem(item: x509.Certificate | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM)
    return item.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_all(directory: Path, files: dict[Path, bytes]) -> None:
    """All files or none; none is overwritten, also when another process makes them at the same time."""
    written: list[Path] = []
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, data in files.items():
            mode = 0o600 if path.name.endswith(_KEYS) else 0o644
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            written.append(path)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, FileExistsError):
            raise CertificateError(f"{error.filename}: exists and is not overwritten; choose another folder") from error
        raise CertificateError(f"{error.filename or directory}: {error.strerror}") from error


def _replace(path: Path, data: bytes) -> None:
    """The whole new file or the whole old one, whatever happens meanwhile."""
    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise CertificateError(f"{path}: cannot be replaced: {error.strerror}") from error


def _read(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if secret:
                _check_secret(path, os.fstat(file.fileno()))
            return file.read(_FILE_BYTES_MAX)
    except OSError as error:
        raise CertificateError(f"{path}: {error.strerror}") from error


def _check_secret(path: Path, status: os.stat_result) -> None:
    """Whoever can read a key is the node. A file of root's may be a group's to read: so services are given secrets."""
    allowed = stat.S_IRUSR | stat.S_IWUSR | (stat.S_IRGRP if status.st_uid == 0 else 0)
    if open_to := stat.S_IMODE(status.st_mode) & 0o077 & ~allowed:
        who = "every user of this machine" if open_to & 0o007 else "its group"
        raise CertificateError(
            f"{path}: has mode {stat.S_IMODE(status.st_mode):04o}, which lets {who} have this private key: "
            f"chmod 600 {path}"
        )


def _load_certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise CertificateError(f"{path}: is not a certificate in PEM form") from error


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(_read(path, secret=True), password=None)
    except (ValueError, TypeError) as error:
        raise CertificateError(f"{path}: is not an unencrypted private key in PEM form") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: is not an elliptic-curve key")
    return key


def _describe(path: Path, certificate: x509.Certificate) -> Certificate:
    def one(oid: ObjectIdentifier) -> str:
        found = certificate.subject.get_attributes_for_oid(oid)
        if len(found) != 1:
            raise CertificateError(f"{path}: is not a certificate of a RAMster cluster")
        return str(found[0].value)

    def extension(kind: type[x509.ExtensionType]) -> x509.ExtensionType | None:
        try:
            return certificate.extensions.get_extension_for_class(kind).value
        except (x509.ExtensionNotFound, ValueError):
            return None

    constraints, alternative = extension(x509.BasicConstraints), extension(x509.SubjectAlternativeName)
    purposes = extension(x509.ExtendedKeyUsage)
    return Certificate(
        subject=one(NameOID.COMMON_NAME),
        cluster_id=one(NameOID.ORGANIZATION_NAME),
        authority=isinstance(constraints, x509.BasicConstraints) and constraints.ca,
        hosts=(
            *alternative.get_values_for_type(x509.DNSName),
            *map(str, alternative.get_values_for_type(x509.IPAddress)),
        )
        if isinstance(alternative, x509.SubjectAlternativeName)
        else (),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        serial=certificate.serial_number,
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        client=isinstance(purposes, x509.ExtendedKeyUsage) and ExtendedKeyUsageOID.SERVER_AUTH not in purposes,
    )


def _check_dates(path: Path, certificate: x509.Certificate, now: datetime) -> None:
    if now < certificate.not_valid_before_utc:
        raise CertificateError(
            f"{path}: is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC; is the clock right?"
        )
    if now > certificate.not_valid_after_utc:
        raise CertificateError(f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC")
