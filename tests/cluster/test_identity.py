"""A cluster's certificates: what they say, that OpenSSL accepts them, and every refusal."""

import os
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import pytest

from ramster.cluster.identity import (
    CA_KEY,
    NodeFiles,
    add_client,
    add_node,
    client_files,
    create_cluster,
    describe,
    node_files,
    objection,
    renew_node,
    verify,
)
from ramster.errors import CertificateError, UsageError


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
    assert (said.subject, said.hosts, said.cluster_id, said.authority) == ("alpha", ("alpha",), "lab", False)
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
    (tmp_path / "junk").chmod(0o600)
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


# --- hosts, renewal -----------------------------------------------------------------------------------------------


def test_a_client_may_go_by_each_of_a_nodes_hosts_and_by_no_other(tmp_path: Path) -> None:
    hosts = {"alpha": ["192.0.2.1", "Storage.Example.org", "2001:db8:0::1", "192.0.2.1", "fe80::1%eth0"]}
    alpha, beta = create_cluster(tmp_path, "lab", ["alpha", "beta"], hosts=hosts)
    assert describe(alpha.cert).hosts == ("alpha", "storage.example.org", "192.0.2.1", "2001:db8::1", "fe80::1")
    assert describe(beta.cert).hosts == ("beta",)
    for host in ("alpha", "storage.example.org", "192.0.2.1", "2001:db8::1"):
        handshake(beta, alpha, host)
    for host in ("192.0.2.2", "2001:db8::2", "example.org", "beta"):
        with pytest.raises(ssl.SSLCertVerificationError):
            handshake(beta, alpha, host)


def test_a_host_does_not_make_a_node_another_one(tmp_path: Path) -> None:
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"], hosts={"alpha": ["gamma"]})
    assert verify(alpha, "lab", "alpha").subject == "alpha"
    with pytest.raises(CertificateError, match=r"alpha\.crt: is for alpha, not for node gamma"):
        verify(alpha, "lab", "gamma")


@pytest.mark.parametrize(
    ("host", "says"),
    [
        *((host, "is no address") for host in ("", "a b", "a_b", "*.example.org", "a..b", "-a", "x" * 64, "a.b.")),
        *((host, "is no address") for host in ("[::1]", "192.0.2.1:7777", "300.0.0.1", "10.0.0.0/8", "a." * 127 + "a")),
        *((host, "no machine's own") for host in ("0.0.0.0", "::", "224.0.0.1")),
        *((host, "another node's name") for host in ("beta", "BETA")),
    ],
)
def test_what_is_no_host_of_the_node_is_refused(tmp_path: Path, host: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        create_cluster(tmp_path / "new", "lab", ["alpha", "beta"], hosts={"alpha": [host]})
    assert not (tmp_path / "new").exists()
    create_cluster(tmp_path, "lab", ["alpha", "beta"])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match=says):
        renew_node(tmp_path, "alpha", [host])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_hosts_are_limited_in_number(tmp_path: Path) -> None:
    hosts = [f"192.0.2.{n}" for n in range(64)]
    with pytest.raises(UsageError, match="65 names and addresses of node alpha; a certificate has at most 64"):
        create_cluster(tmp_path, "lab", ["alpha"], hosts={"alpha": hosts})
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"], hosts={"alpha": hosts[1:]})
    handshake(alpha, alpha, "192.0.2.63")


def test_a_certificate_is_renewed_for_the_same_key_and_other_hosts(tmp_path: Path) -> None:
    alpha, beta = create_cluster(tmp_path, "lab", ["alpha", "beta"], hosts={"alpha": ["192.0.2.1"]})
    key = alpha.key.read_bytes()
    copy = NodeFiles(alpha.ca, tmp_path / "old.pem", alpha.key)
    copy.cert.write_bytes(alpha.cert.read_bytes())
    before, after = renew_node(tmp_path, "alpha", ["192.0.2.2", "storage"])
    assert (before.hosts, after.hosts) == (("alpha", "192.0.2.1"), ("alpha", "storage", "192.0.2.2"))
    assert (before, after) == (describe(copy.cert), describe(alpha.cert)) and before.serial != after.serial
    assert alpha.key.read_bytes() == key and stat.S_IMODE(alpha.cert.stat().st_mode) == 0o644
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    handshake(beta, alpha, "192.0.2.2")
    handshake(alpha, beta, "beta")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(beta, alpha, "192.0.2.1")
    # What was made before stays good for what it was.
    assert verify(copy, "lab", "alpha") == before
    handshake(beta, copy, "192.0.2.1")


def test_a_renewal_that_would_gain_nothing_changes_nothing(tmp_path: Path) -> None:
    made = datetime.now(UTC)
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"], hosts={"alpha": ["192.0.2.1", "192.0.2.2"]}, now=made)
    data = alpha.cert.read_bytes()
    for hosts in (None, ["192.0.2.2", "192.0.2.1"]):
        before, after = renew_node(tmp_path, "alpha", hosts, now=made + timedelta(days=29))
        assert before == after and alpha.cert.read_bytes() == data
    before, after = renew_node(tmp_path, "alpha", now=made + timedelta(days=31))
    assert after.hosts == before.hosts and after.not_after - before.not_after == timedelta(days=31)


def test_an_expired_certificate_is_renewed_and_an_authoritys_end_is_the_end(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    create_cluster(tmp_path, "lab", ["alpha"], now=now - timedelta(days=9 * 365))
    _, after = renew_node(tmp_path, "alpha")
    assert after.not_before < now and after.not_after == describe(tmp_path / "ca.crt").not_after
    assert renew_node(tmp_path, "alpha") == (after, after)
    with pytest.raises(CertificateError, match=r"ca\.crt: expired on"):
        renew_node(tmp_path, "alpha", now=now + timedelta(days=366))


def test_what_the_authority_did_not_sign_for_the_node_is_not_renewed(tmp_path: Path) -> None:
    alpha, beta = create_cluster(tmp_path / "lab", "lab", ["alpha", "beta"])
    (twin,) = create_cluster(tmp_path / "twin", "lab", ["alpha"])
    with pytest.raises(CertificateError, match=r"gamma\.crt: No such file"):
        renew_node(tmp_path / "lab", "gamma")
    with pytest.raises(CertificateError, match="node name"):
        renew_node(tmp_path / "lab", "ca")
    data = alpha.cert.read_bytes()
    alpha.cert.write_bytes(twin.cert.read_bytes())
    with pytest.raises(CertificateError, match=r"alpha\.crt: was not signed by"):
        renew_node(tmp_path / "lab", "alpha", ["192.0.2.1"])
    alpha.cert.write_bytes(beta.cert.read_bytes())
    with pytest.raises(CertificateError, match=r"alpha\.crt: is for beta, not for node alpha"):
        renew_node(tmp_path / "lab", "alpha", ["192.0.2.1"])
    alpha.cert.write_bytes(data)
    (tmp_path / "lab" / CA_KEY).unlink()
    with pytest.raises(CertificateError, match=r"ca\.key: No such file"):
        renew_node(tmp_path / "lab", "alpha", ["192.0.2.1"])
    assert alpha.cert.read_bytes() == data


# --- clients, secrets -------------------------------------------------------------------------------------------------


def test_a_client_opens_connections_and_is_no_server(tmp_path: Path) -> None:
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"])
    web = add_client(tmp_path, "web")
    assert web == client_files(tmp_path, "web") and web.cert.parent == tmp_path / "clients" / "web"
    assert sorted(path.name for path in web.cert.parent.iterdir()) == [
        "ca-cert.pem",
        "client-cert.pem",
        "client-key.pem",
    ]
    assert stat.S_IMODE(web.key.stat().st_mode) == 0o600
    said = describe(web.cert)
    assert (said.subject, said.cluster_id, said.client, said.hosts) == ("web", "lab", True, ())
    assert not describe(alpha.cert).client and not describe(alpha.ca).client
    handshake(web, alpha, "alpha")
    with pytest.raises(ssl.SSLError):
        handshake(alpha, web, "web")


def test_a_clients_certificate_starts_no_node(tmp_path: Path) -> None:
    create_cluster(tmp_path, "lab", ["alpha"])
    with pytest.raises(CertificateError, match="is for a client"):
        verify(add_client(tmp_path, "web"), "lab", "web")


@pytest.mark.parametrize(
    ("who", "cluster_id", "to", "says"),
    [
        ("alpha", "lab", "node", None),
        ("alpha", "lab", "client", None),
        ("web", "lab", "client", None),
        ("web", "lab", "node", "for the client 'web'"),
        ("alpha", "farm", "node", "for cluster 'lab', not for 'farm'"),
        ("web", "farm", "client", "for cluster 'lab', not for 'farm'"),
        ("ca", "lab", "node", "the authority's own"),
        ("ca", "lab", "client", "the authority's own"),
    ],
)
def test_what_a_proved_certificate_is_good_for(
    tmp_path: Path, who: str, cluster_id: str, to: Literal["node", "client"], says: str | None
) -> None:
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"])
    path = {"alpha": alpha.cert, "web": add_client(tmp_path, "web").cert, "ca": alpha.ca}[who]
    found = objection(describe(path), cluster_id, to=to)
    assert found is None if says is None else found is not None and says in found


def test_a_clients_name_is_its_own(tmp_path: Path) -> None:
    create_cluster(tmp_path, "lab", ["alpha"])
    for name, says in (("alpha", "is a node's name"), ("We b", "client name"), ("../x", "client name")):
        with pytest.raises(CertificateError, match=says):
            add_client(tmp_path, name)
    assert not (tmp_path / "clients").exists()
    made = add_client(tmp_path, "web")
    data = made.key.read_bytes()
    with pytest.raises(CertificateError, match="exists and is not overwritten"):
        add_client(tmp_path, "web")
    assert made.key.read_bytes() == data


@pytest.mark.parametrize(("mode", "who"), [(0o644, "every user"), (0o604, "every user"), (0o660, "its group")])
def test_a_key_that_others_may_have_is_refused(tmp_path: Path, mode: int, who: str) -> None:
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"])
    alpha.key.chmod(mode)
    with pytest.raises(CertificateError, match=rf"mode {mode:04o}, which lets {who} .*: chmod 600 {alpha.key}$"):
        verify(alpha, "lab", "alpha")
    alpha.key.chmod(0o600)
    verify(alpha, "lab", "alpha")
    (tmp_path / CA_KEY).chmod(mode)
    with pytest.raises(CertificateError, match=f"chmod 600 {tmp_path / CA_KEY}"):
        add_client(tmp_path, "web")


@pytest.mark.parametrize("owner", [0, 1000])
def test_a_key_of_roots_may_be_a_groups_to_read(tmp_path: Path, owner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a service is given its secrets."""
    (alpha,) = create_cluster(tmp_path, "lab", ["alpha"])
    alpha.key.chmod(0o440)
    real = os.fstat

    def owned(descriptor: int) -> os.stat_result:
        values = list(real(descriptor))
        values[stat.ST_UID] = owner
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", owned)
    if owner == 0:
        assert verify(alpha, "lab", "alpha").subject == "alpha"
    else:
        with pytest.raises(CertificateError, match="lets its group have"):
            verify(alpha, "lab", "alpha")
