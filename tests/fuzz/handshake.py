"""One fuzzing input against the handshake: no exception, nothing but well-formed and bounded answers, nothing untold.

Covers `wire.nbd.Handshake` alone, fed as the node feeds it. The fuzzer around this is `target`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ramster.wire import nbd
from ramster.wire.nbd import Export, Handshake, Option, OptionReply, Refusal, Tls

EXPORTS: Final = (Export("swap", 3, 8 << 30, description="8GiB"), Export("old", 4, 4096, read_only=True))
BUSY: Final = Export("busy", 5, 4096)
# EXPORT_NAME answers once; the longest other answers repeat what is known of an export.
_REPLY_BYTES_MAX: Final = nbd.STRING_BYTES_MAX + 1024


class _Shelf:
    def exports(self) -> Iterable[Export]:
        return EXPORTS

    def find(self, name: str) -> Export | Refusal:
        unknown = Refusal(OptionReply.ERR_UNKNOWN, "there is no such export")
        return next((each for each in EXPORTS if each.name == name), unknown)

    def enter(self, name: str) -> Export | Refusal:
        return Refusal(OptionReply.ERR_SHUTDOWN, "busy") if name == BUSY.name else self.find(name)


def run(data: bytes) -> str:
    """Feed an input, whose first byte says how TLS is offered; what became of the connection."""
    if not data:
        return ""
    tls = list(Tls)[data[0] % 3]
    handshake = Handshake(_Shelf(), tls)
    encrypted = tls is not Tls.REQUIRED
    at = 1
    while len(data) - at >= handshake.wants:
        wanted = handshake.wants
        step = handshake.feed(data[at : at + wanted])
        at += wanted
        assert 1 <= handshake.wants <= nbd.OPTION_BYTES_MAX, handshake.wants
        assert len(step.reply) <= _REPLY_BYTES_MAX, len(step.reply)
        serves = isinstance(step.decision, nbd.Serve)
        option = int.from_bytes(data[at - wanted + 8 : at - wanted + 12])
        if not (serves and len(step.reply) in (10, 134)):  # the answer to EXPORT_NAME is no option's reply
            _check(step.reply, encrypted)
        if isinstance(step.decision, nbd.Serve):
            assert encrypted, option
            assert step.decision.export in EXPORTS
            assert step.decision.structured or step.decision.allocation_context is None
            return "serve"
        if isinstance(step.decision, nbd.End):
            return step.decision.kind
        if isinstance(step.decision, nbd.StartTls):
            assert tls is not Tls.OFF
            handshake.tls_started()
            encrypted = True
    return "waits"


def _check(reply: bytes, told: bool) -> None:
    replies = list(nbd.unpack_replies(reply))
    for option, kind, body in replies:
        assert kind in set(OptionReply), kind
        if not told:
            assert kind >= 1 << 31 or (kind == OptionReply.ACK and option in (Option.STARTTLS, Option.ABORT)), kind
        if kind >= 1 << 31:
            body.decode()
    assert all(kind != OptionReply.ACK and kind < 1 << 31 for _, kind, _ in replies[:-1])
