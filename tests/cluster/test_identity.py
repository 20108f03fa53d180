"""A cluster's certificates: what they say, that OpenSSL accepts them, and every refusal."""

import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from ramster.cluster.identity import CA_KEY, NodeFiles, add_node, create_cluster, describe, node_files, verify
from ramster.errors import CertificateError


def handshake(client_files: NodeFiles, server_files: NodeFiles, name: str) -> None:
    """A TLS 1.3 handshake in memory with certificates on both sides."""

    def context(protocol: int, files: NodeFiles) -> ssl.SSLContext:
        made = ssl.SSLContext(protocol)
        made.minimum_version = ssl.TLSVersion.TLSv1_3
        made.verify_mode = ssl.CERT_REQUIRED
        made.load_verify_locations(files.ca)
        made.load_cert_chain(files.cert, files.key)
        return made

    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context(ssl.PROTOCOL_TLS_CLIENT, client_files).wrap_bio(to_client, to_server, server_hostname=name)
    server = context(ssl.PROTOCOL_TLS_SERVER, server_files).wrap_bio(to_server, to_client, server_side=True)
    unfinished: list[Callable[[], None]] = [client.do_handshake, server.do_handshake]
    for _ in range(8):
        for step in list(unfinished):
            try:
                step()
                unfinished.remove(step)
            except ssl.SSLWantReadError:
                continue
    assert not unfinished


def test_a_node_certificate_binds_name_and_cluster(tmp_path: Path) -> None:
    (files,) = create_cluster(tmp_path, "lab", ["alpha"])
    said = describe(files.cert)
    assert (said.subject, said.names, said.cluster_id, said.authority) == ("alpha", ("alpha",), "lab", False)
    assert timedelta(days=729) < said.not_after - datetime.now(UTC) <= timedelta(days=730)
    authority = describe(files.ca)
    assert (authority.subject, authority.cluster_id, authority.authority) == ("lab CA", "lab", True)


def test_keys_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    create_cluster(tmp_path, "lab", ["alpha"])
    assert {path.name for path in tmp_path.glob("*.key")} == {"ca.key", "alpha.key"}
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in tmp_path.glob("*.key"))


def test_two_nodes_of_a_cluster_shake_hands_in_both_roles(tmp_path: Path) -> None:
    alpha, beta = create_cluster(tmp_path, "lab", ["alpha", "beta"])
    handshake(alpha, beta, "beta")
    handshake(beta, alpha, "alpha")


def test_a_node_of_another_cluster_of_the_same_name_is_refused_by_openssl(tmp_path: Path) -> None:
    (alpha,) = create_cluster(tmp_path / "one", "lab", ["alpha"])
    (beta,) = create_cluster(tmp_path / "two", "lab", ["beta"])
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(alpha, beta, "beta")


def test_a_node_added_later_is_trusted_by_the_first(tmp_path: Path) -> None:
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"])
    handshake(add_node(tmp_path, "beta"), alpha, "alpha")


def test_nothing_is_overwritten_and_a_refusal_leaves_nothing(tmp_path: Path) -> None:
    create_cluster(tmp_path, "lab", ["alpha"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for again in (lambda: create_cluster(tmp_path, "lab", ["beta"]), lambda: add_node(tmp_path, "alpha")):
        with pytest.raises(CertificateError, match="exists and is not overwritten"):
            again()
    (tmp_path / "gamma.key").write_text("mine")
    with pytest.raises(CertificateError, match=r"gamma\.key: exists"):
        add_node(tmp_path, "gamma")
    assert not (tmp_path / "gamma.crt").exists()
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("name", ["", "Alpha", "a b", "-a", "../a", "x" * 64, "ca", "a\n"])
def test_a_name_that_is_no_label_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CertificateError, match="node name"):
        create_cluster(tmp_path, "lab", [name])
    assert not list(tmp_path.iterdir())


def test_the_longest_names_are_accepted(tmp_path: Path) -> None:
    (files,) = create_cluster(tmp_path, "c" * 63, ["n" * 63])
    assert verify(files, "c" * 63, "n" * 63).subject == "n" * 63


def test_a_certificate_never_outlives_its_authority(tmp_path: Path) -> None:
    start = datetime.now(UTC) - timedelta(days=9 * 365)
    create_cluster(tmp_path, "lab", now=start)
    assert describe(add_node(tmp_path, "late").cert).not_after == describe(tmp_path / "ca.crt").not_after


def test_an_expired_authority_signs_nothing(tmp_path: Path) -> None:
    create_cluster(tmp_path, "lab", now=datetime.now(UTC) - timedelta(days=11 * 365))
    with pytest.raises(CertificateError, match=r"ca\.crt: expired on"):
        add_node(tmp_path, "late")


def test_verify_accepts_a_nodes_own_files(tmp_path: Path) -> None:
    (files,) = create_cluster(tmp_path, "lab", ["alpha"])
    assert verify(files, "lab", "alpha") == describe(files.cert)


def test_verify_says_which_file_is_wrong_and_why(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    alpha, beta = create_cluster(tmp_path / "lab", "lab", ["alpha", "beta"])
    (twin,) = create_cluster(tmp_path / "twin", "lab", ["alpha"])
    (tmp_path / "junk").write_bytes(b"\0junk")
    cases: list[tuple[NodeFiles, str, str, datetime, str]] = [
        (alpha, "farm", "alpha", now, r"ca\.crt: belongs to cluster lab, not to farm"),
        (alpha, "lab", "beta", now, r"alpha\.crt: is for alpha, not for node beta"),
        (NodeFiles(twin.ca, alpha.cert, alpha.key), "lab", "alpha", now, r"alpha\.crt: was not signed by"),
        (NodeFiles(alpha.ca, alpha.cert, beta.key), "lab", "alpha", now, r"beta\.key: is not the key of"),
        (NodeFiles(alpha.cert, alpha.cert, alpha.key), "lab", "alpha", now, "not an authority's"),
        (NodeFiles(alpha.ca, alpha.ca, tmp_path / "lab" / CA_KEY), "lab", "alpha", now, "is for lab CA"),
        (alpha, "lab", "alpha", now + timedelta(days=800), r"alpha\.crt: expired on"),
        (alpha, "lab", "alpha", now - timedelta(days=2), "is the clock right"),
        (NodeFiles(alpha.ca, tmp_path / "junk", alpha.key), "lab", "alpha", now, "junk: is not a certificate"),
        (NodeFiles(alpha.ca, alpha.cert, tmp_path / "junk"), "lab", "alpha", now, "junk: is not an unencrypted"),
        (node_files(tmp_path / "lab", "gamma"), "lab", "gamma", now, r"gamma\.crt: No such file"),
    ]
    for files, cluster_id, node, when, wrong in cases:
        with pytest.raises(CertificateError, match=wrong):
            verify(files, cluster_id, node, now=when)
