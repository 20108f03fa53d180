"""The node's certificate and key as its handshakes use them, read again when the files are replaced.

A node that is swapped on cannot be restarted, and its certificate ends all the same: `ramster cluster renew`, a copy
over the old file, and the next connection is made with the new one. Connections keep what they began with.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Literal

from ramster.cluster import identity
from ramster.cluster.identity import NodeFiles
from ramster.engine.links import TlsContext
from ramster.errors import CertificateError

log = logging.getLogger(__name__)


class Credentials:
    """Of one node. Any thread may ask.

    CertificateError when what is there at first cannot be used. Later, a file that cannot be is named in the log, once,
    and what was there before stays in use.
    """

    def __init__(self, files: NodeFiles, cluster_id: str, node: str) -> None:
        self._files = files
        self._cluster_id = cluster_id
        self._node = node
        self._lock = threading.Lock()
        self._seen = self._look()
        self._hosts, self._context = self._load()

    def context(self) -> TlsContext:
        """For one more handshake."""
        with self._lock:
            self._refresh()
            return self._context

    def client(self, certificate: bytes) -> str:
        """The name that a certificate (DER) of a client or a node has proved. CertificateError where it is not of this
        cluster.
        """
        return self._named(certificate, "client")

    def node(self, certificate: bytes) -> str:
        """The name that a node's certificate (DER) has proved. CertificateError where it is none of this cluster."""
        return self._named(certificate, "node")

    def _named(self, certificate: bytes, to: Literal["node", "client"]) -> str:
        described = identity.describe_der(certificate)
        if (reason := identity.objection(described, self._cluster_id, to=to)) is not None:
            raise CertificateError(reason)
        return described.subject

    def hosts(self) -> tuple[str, ...]:
        """Names and addresses that the certificate is for, the node's own name first."""
        with self._lock:
            self._refresh()
            return self._hosts

    def _refresh(self) -> None:
        now = self._look()
        if now == self._seen:
            return
        self._seen = now  # also where it fails: the same files are not tried again
        try:
            self._hosts, self._context = self._load()
        except CertificateError as error:
            log.error("the certificate from before stays in use: %s", error)
        else:
            log.info("read %s again: it is for %s", self._files.cert, ", ".join(self._hosts))

    def _load(self) -> tuple[tuple[str, ...], TlsContext]:
        described = identity.verify(self._files, self._cluster_id, self._node)
        return described.hosts, TlsContext(str(self._files.ca), str(self._files.cert), str(self._files.key))

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        return tuple(_signature(path) for path in (self._files.ca, self._files.cert, self._files.key))


def _signature(path: Path) -> tuple[int, int, int] | None:
    """Another one when the file has been replaced or written to; None where it cannot be seen."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
