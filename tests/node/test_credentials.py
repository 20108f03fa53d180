"""A certificate that is replaced while its node runs."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ramster.cluster import identity
from ramster.errors import CertificateError
from ramster.node.credentials import Credentials


@pytest.fixture
def alpha(tmp_path: Path) -> identity.NodeFiles:
    return identity.create_cluster(tmp_path, "farm", ["alpha", "beta"])[0]


def test_nothing_is_read_twice_while_the_files_stay(alpha: identity.NodeFiles) -> None:
    credentials = Credentials(alpha, "farm", "alpha")
    assert credentials.context() is credentials.context()
    assert credentials.hosts() == ("alpha",)


def test_the_next_handshake_has_the_new_certificate(alpha: identity.NodeFiles) -> None:
    credentials = Credentials(alpha, "farm", "alpha")
    before = credentials.context()
    identity.renew_node(alpha.cert.parent, "alpha", ["192.0.2.1"])
    assert credentials.context() is not before
    assert credentials.hosts() == ("alpha", "192.0.2.1")


@pytest.mark.parametrize("wrong", ["beta's", "half of it", "none"])
def test_what_cannot_be_used_is_said_once_and_the_old_one_stays(
    wrong: str, alpha: identity.NodeFiles, caplog: pytest.LogCaptureFixture
) -> None:
    credentials = Credentials(alpha, "farm", "alpha")
    before, good = credentials.context(), alpha.cert.read_bytes()
    if wrong == "none":
        alpha.cert.unlink()
    else:
        alpha.cert.write_bytes(alpha.cert.with_name("beta.crt").read_bytes() if wrong == "beta's" else good[:300])
    for _ in range(3):
        assert credentials.context() is before
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert str(alpha.cert) in said
    alpha.cert.write_bytes(good)
    assert credentials.context() is not before


def test_at_first_it_must_be_usable(alpha: identity.NodeFiles) -> None:
    alpha.key.write_bytes(alpha.key.with_name("beta.key").read_bytes())
    with pytest.raises(CertificateError):
        Credentials(alpha, "farm", "alpha")
