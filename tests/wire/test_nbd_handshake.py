"""The NBD handshake, as the protocol has it: options, answers, errors, limits, and what ends a connection."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.wire import nbd
from ramster.wire.nbd import Export, Handshake, Info, Option, OptionReply, Refusal, Tls, TransmissionFlag

FIXED = struct.pack(">I", nbd.ClientFlag.FIXED_NEWSTYLE | nbd.ClientFlag.NO_ZEROES)
SECRET = Export("secret", 7, 0x5EC0DE000, description="of somebody else")
EXPORTS = (Export("swap", 3, 8 << 30, description="8GiB"), Export("old", 4, 4096, read_only=True))


class Shelf:
    """A catalogue of plain data; `entered` lists who was let in."""

    def __init__(self, exports: tuple[Export, ...] = EXPORTS) -> None:
        self.all = exports
        self.entered: list[str] = []
        self.refusal: Refusal | None = None

    def exports(self) -> Iterable[Export]:
        return self.all

    def find(self, name: str) -> Export | Refusal:
        unknown = Refusal(OptionReply.ERR_UNKNOWN, "there is no such export")
        return next((each for each in self.all if each.name == name), unknown)

    def enter(self, name: str) -> Export | Refusal:
        self.entered.append(name)
        return self.refusal or self.find(name)


class Client:
    """Feeds a handshake exactly what it wants, as the shell does."""

    def __init__(self, tls: Tls = Tls.OFF, flags: bytes = FIXED, shelf: Shelf | None = None) -> None:
        self.shelf = shelf or Shelf()
        self.handshake = Handshake(self.shelf, tls)
        self.decision: nbd.Decision | None = None
        self.out = b""
        self.send(flags)

    def send(self, data: bytes) -> bytes:
        """What is answered to these bytes; what comes after a decision is left unread."""
        out = b""
        while data and self.decision is None and len(data) >= self.handshake.wants:
            size = self.handshake.wants
            step = self.handshake.feed(data[:size])
            data = data[size:]
            out += step.reply
            self.decision = step.decision
        self.out += out
        return out

    def ask(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """(type, data) of each reply to an option."""
        replies = list(nbd.unpack_replies(self.send(nbd.pack_option(option, data))))
        assert all(answered == option for answered, _, _ in replies)
        return [(kind, body) for _, kind, body in replies]

    def types(self, option: int, data: bytes = b"") -> list[int]:
        return [kind for kind, _ in self.ask(option, data)]

    def start_tls(self) -> None:
        assert self.types(Option.STARTTLS) == [OptionReply.ACK] and self.decision == nbd.StartTls()
        self.handshake.tls_started()
        self.decision = None

    def pending(self) -> bool:
        return self.decision is None

    def ended(self, kind: str) -> bool:
        return isinstance(self.decision, nbd.End) and self.decision.kind == kind


def information(replies: list[tuple[int, bytes]]) -> dict[int, bytes]:
    """By kind, of the replies to INFO or GO; the last reply must be ACK."""
    assert replies[-1] == (OptionReply.ACK, b"")
    assert all(kind == OptionReply.INFO for kind, _ in replies[:-1])
    return {int.from_bytes(body[:2], "big"): body[2:] for _, body in replies[:-1]}


# --- greeting and flags -------------------------------------------------------------------------------------------


def test_the_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    assert Handshake(Shelf(), Tls.OFF).greeting == b"NBDMAGICIHAVEOPT\0\3"


def test_flags_that_were_not_offered_end_the_connection() -> None:
    for bit in range(2, 32):
        client = Client(flags=struct.pack(">I", 1 | 1 << bit))
        assert client.ended("broken") and client.out == b""


def test_a_client_without_fixed_newstyle_may_name_an_export_and_nothing_else() -> None:
    client = Client(flags=bytes(4))
    client.send(nbd.pack_option(Option.EXPORT_NAME, b"swap"))
    assert isinstance(client.decision, nbd.Serve)
    for option in (Option.LIST, Option.GO, Option.STARTTLS, 99):
        client = Client(Tls.OFFERED, flags=bytes(4))
        assert client.send(nbd.pack_option(option)) == b"" and client.ended("broken")


def test_an_option_must_begin_with_its_magic() -> None:
    client = Client()
    assert client.send(b"NBDMAGIC" + bytes(8)) == b"" and client.ended("broken")


# --- EXPORT_NAME --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "padding"), [(FIXED, 0), (struct.pack(">I", 1), 124), (bytes(4), 124)])
def test_export_name_answers_size_flags_and_zeroes_unless_they_are_not_wanted(flags: bytes, padding: int) -> None:
    client = Client(flags=flags)
    answer = client.send(nbd.pack_option(Option.EXPORT_NAME, b"swap"))
    size, bits = struct.unpack_from(">QH", answer)
    assert (size, bits) == (8 << 30, nbd.transmission_flags(read_only=False, structured=False))
    assert answer[10:] == bytes(padding)
    assert client.decision == nbd.Serve(EXPORTS[0], False, None) and client.shelf.entered == ["swap"]


@pytest.mark.parametrize("name", [b"none", b"", b"\xff", b"swap\0", b"x" * 4097])
def test_export_name_of_nothing_ends_the_connection_without_a_word(name: bytes) -> None:
    client = Client()
    assert client.send(nbd.pack_option(Option.EXPORT_NAME, name)) == b""
    assert isinstance(client.decision, nbd.End)


def test_export_name_keeps_what_was_negotiated() -> None:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, nbd.pack_queries("swap", "base:allocation"))
    client.send(nbd.pack_option(Option.EXPORT_NAME, b"swap"))
    assert isinstance(client.decision, nbd.Serve)
    assert client.decision.structured and client.decision.allocation_context is not None


# --- ABORT, LIST, unknown -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"thanks"])
def test_abort_is_acknowledged_whatever_comes_with_it(data: bytes) -> None:
    client = Client(Tls.REQUIRED)
    assert client.types(Option.ABORT, data) == [OptionReply.ACK] and client.ended("abort")


def test_list_names_each_export_with_its_description() -> None:
    *servers, last = Client().ask(Option.LIST)
    assert last == (OptionReply.ACK, b"")
    assert servers == [
        (OptionReply.SERVER, b"\0\0\0\4swap8GiB"),
        (OptionReply.SERVER, b"\0\0\0\3old"),
    ]


def test_list_of_nothing_is_an_ack() -> None:
    assert Client(shelf=Shelf(())).types(Option.LIST) == [OptionReply.ACK]


@pytest.mark.parametrize("option", [0, Option.PEEK_EXPORT, Option.EXTENDED_HEADERS, 12, 0x7FFFFFFF, 0xFFFFFFFF])
def test_unknown_options_are_unsupported_and_the_next_one_is_answered(option: int) -> None:
    client = Client()
    assert client.types(option, b"data") == [OptionReply.ERR_UNSUP]
    assert client.types(Option.LIST)[-1] == OptionReply.ACK


@pytest.mark.parametrize("option", [Option.LIST, Option.STARTTLS, Option.STRUCTURED_REPLY])
def test_options_without_data_refuse_data(option: Option) -> None:
    client = Client(Tls.OFFERED)
    assert client.types(option, b"x") == [OptionReply.ERR_INVALID]
    assert client.pending()


# --- INFO and GO --------------------------------------------------------------------------------------------------


def test_info_tells_about_an_export_and_go_begins_to_use_it() -> None:
    client = Client()
    told = information(client.ask(Option.INFO, nbd.pack_info("swap")))
    flags = nbd.transmission_flags(read_only=False, structured=False)
    assert told == {Info.EXPORT: struct.pack(">QH", 8 << 30, flags)}
    assert client.pending() and client.shelf.entered == []
    assert information(client.ask(Option.GO, nbd.pack_info("swap"))) == told
    assert client.decision == nbd.Serve(EXPORTS[0], False, None) and client.shelf.entered == ["swap"]


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_what_is_asked_for_is_told_once_and_unknown_kinds_are_ignored(option: Option) -> None:
    asked = [Info.NAME, Info.DESCRIPTION, Info.BLOCK_SIZE, Info.BLOCK_SIZE, Info.EXPORT, 4, 65535]
    replies = Client().ask(option, nbd.pack_info("swap", *asked))
    assert len(replies) == 5
    told = information(replies)
    assert told[Info.NAME] == b"swap" and told[Info.DESCRIPTION] == b"8GiB"
    assert struct.unpack(">III", told[Info.BLOCK_SIZE]) == (1, 4096, 32 << 20)


@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
@pytest.mark.parametrize("name", ["none", "", "SWAP", "swap "])
def test_an_unknown_export_is_unknown_and_the_client_may_try_another(option: Option, name: str) -> None:
    client = Client()
    assert client.types(option, nbd.pack_info(name, Info.NAME)) == [OptionReply.ERR_UNKNOWN]
    assert client.types(Option.GO, nbd.pack_info("swap"))[-1] == OptionReply.ACK


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\0\0\0\4swap",  # no number of requests
        b"\0\0\0\4swap\0\1",  # one request, but it is missing
        b"\0\0\0\4swap\0\0\0",  # one byte too many
        b"\0\0\0\5swap\0\0",  # the name reaches into the number
        b"\xff\xff\xff\xffswap\0\0",
        b"\0\0\0\2\xff\xff\0\0",  # not UTF-8
        b"\0\0\0\4sw\0p\0\0",
        b"\0\0\x10\1" + b"x" * 4097 + b"\0\0",
    ],
)
@pytest.mark.parametrize("option", [Option.INFO, Option.GO])
def test_malformed_info_and_go_are_invalid(option: Option, data: bytes) -> None:
    client = Client()
    assert client.types(option, data) == [OptionReply.ERR_INVALID]
    assert client.pending() and client.shelf.entered == []


@pytest.mark.parametrize("reply", [OptionReply.ERR_POLICY, OptionReply.ERR_SHUTDOWN])
def test_a_refusal_of_the_catalogue_is_passed_on_with_its_reason(reply: OptionReply) -> None:
    client = Client()
    client.shelf.refusal = Refusal(reply, "come back later")
    assert client.ask(Option.GO, nbd.pack_info("swap")) == [(reply, b"come back later")]
    assert client.pending()
    assert client.send(nbd.pack_option(Option.EXPORT_NAME, b"swap")) == b""
    assert isinstance(client.decision, nbd.End) and "come back later" in client.decision.reason


def test_transmission_flags() -> None:
    flag = TransmissionFlag
    both = flag.HAS_FLAGS | flag.SEND_FLUSH | flag.SEND_FUA | flag.CAN_MULTI_CONN | flag.SEND_CACHE
    writing = flag.SEND_TRIM | flag.SEND_WRITE_ZEROES | flag.SEND_FAST_ZERO
    assert nbd.transmission_flags(read_only=False, structured=False) == both | writing
    assert nbd.transmission_flags(read_only=True, structured=False) == both | flag.READ_ONLY
    assert nbd.transmission_flags(read_only=False, structured=True) == both | writing | flag.SEND_DF


def test_df_is_offered_with_structured_replies_alone() -> None:
    for structured in (False, True):
        client = Client()
        if structured:
            assert client.types(Option.STRUCTURED_REPLY) == [OptionReply.ACK]
        told = information(client.ask(Option.GO, nbd.pack_info("swap")))
        assert bool(told[Info.EXPORT][-1] & TransmissionFlag.SEND_DF) == structured
        assert client.decision == nbd.Serve(EXPORTS[0], structured, None)


# --- metadata contexts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_metadata_needs_structured_replies(option: Option) -> None:
    assert Client().types(option, nbd.pack_queries("swap", "base:allocation")) == [OptionReply.ERR_INVALID]


def structured_client() -> Client:
    client = Client()
    client.ask(Option.STRUCTURED_REPLY)
    return client


@pytest.mark.parametrize(
    ("option", "queries", "found"),
    [
        (Option.LIST_META_CONTEXT, (), True),
        (Option.LIST_META_CONTEXT, ("base:",), True),
        (Option.LIST_META_CONTEXT, ("base:allocation",), True),
        (Option.LIST_META_CONTEXT, ("qemu:", "base:other"), False),
        (Option.SET_META_CONTEXT, (), False),
        (Option.SET_META_CONTEXT, ("base:",), False),
        (Option.SET_META_CONTEXT, ("base:allocation",), True),
        (Option.SET_META_CONTEXT, ("base:allocation", "base:allocation"), True),
        (Option.SET_META_CONTEXT, ("qemu:dirty-bitmap:x", "base:allocation"), True),
        (Option.SET_META_CONTEXT, ("base:allocations", "x-foo:"), False),
    ],
)
def test_queries_find_the_one_context_or_nothing(option: Option, queries: tuple[str, ...], found: bool) -> None:
    client = structured_client()
    replies = client.ask(option, nbd.pack_queries("swap", *queries))
    assert replies[-1] == (OptionReply.ACK, b"") and len(replies) == 1 + found
    if found:
        kind, body = replies[0]
        assert kind == OptionReply.META_CONTEXT and body[4:] == b"base:allocation"
    client.ask(Option.GO, nbd.pack_info("swap"))
    assert isinstance(client.decision, nbd.Serve)
    chosen = found and option == Option.SET_META_CONTEXT
    wanted = int.from_bytes(replies[0][1][:4], "big") if chosen else None
    assert client.decision.allocation_context == wanted


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\4swap",
        b"\0\0\0\4swap\0\0\0\1",
        b"\0\0\0\4swap\0\0\0\1\0\0\0\x10base:allocation",
        b"\0\0\0\4swap\0\0\0\0x",
        b"\0\0\0\4swap\0\0\0\1\0\0\0\4base",  # no namespace
        b"\0\0\0\4swap\0\0\0\1\0\0\0\2:x",
        b"\0\0\0\4swap\0\0\0\1\0\0\0\0",
        b"\0\0\0\4swap\0\0\0\1\0\0\0\2\xff:",
    ],
)
@pytest.mark.parametrize("option", [Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT])
def test_malformed_queries_are_invalid(option: Option, data: bytes) -> None:
    assert structured_client().types(option, data) == [OptionReply.ERR_INVALID]


def test_contexts_of_an_unknown_export_are_unknown_and_too_many_queries_too_big() -> None:
    client = structured_client()
    for option in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert client.types(option, nbd.pack_queries("none", "base:")) == [OptionReply.ERR_UNKNOWN]
        queries = ["base:allocation"] * (nbd.QUERIES_MAX + 1)
        assert client.types(option, nbd.pack_queries("swap", *queries)) == [OptionReply.ERR_TOO_BIG]


CHOICE = nbd.pack_queries("swap", "base:allocation")


@pytest.mark.parametrize(
    ("option", "data", "kept"),
    [
        (Option.SET_META_CONTEXT, nbd.pack_queries("swap"), False),
        (Option.SET_META_CONTEXT, nbd.pack_queries("none", "base:allocation"), False),
        (Option.SET_META_CONTEXT, b"nonsense", False),
        (Option.LIST_META_CONTEXT, nbd.pack_queries("swap"), True),
        (Option.INFO, nbd.pack_info("old"), True),
        (99, b"", True),
    ],
)
def test_a_choice_lasts_until_the_next_one_even_if_that_fails(option: int, data: bytes, kept: bool) -> None:
    client = structured_client()
    client.ask(Option.SET_META_CONTEXT, CHOICE)
    client.ask(option, data)
    client.ask(Option.GO, nbd.pack_info("swap"))
    assert isinstance(client.decision, nbd.Serve)
    assert (client.decision.allocation_context is not None) == kept


def test_a_choice_for_one_export_is_none_for_another() -> None:
    client = structured_client()
    client.ask(Option.SET_META_CONTEXT, CHOICE)
    client.ask(Option.GO, nbd.pack_info("old"))
    assert client.decision == nbd.Serve(EXPORTS[1], True, None)


# --- TLS ----------------------------------------------------------------------------------------------------------


def test_without_tls_starttls_is_against_the_policy_and_the_client_may_go_on() -> None:
    client = Client(Tls.OFF)
    assert client.types(Option.STARTTLS) == [OptionReply.ERR_POLICY]
    assert client.types(Option.GO, nbd.pack_info("swap"))[-1] == OptionReply.ACK


def test_where_tls_is_offered_a_client_may_do_without() -> None:
    assert Client(Tls.OFFERED).types(Option.GO, nbd.pack_info("swap"))[-1] == OptionReply.ACK


@pytest.mark.parametrize(
    "option", [Option.LIST, Option.INFO, Option.GO, Option.STRUCTURED_REPLY, Option.SET_META_CONTEXT, 11, 99]
)
def test_where_tls_is_required_nothing_is_told_without(option: int) -> None:
    client = Client(Tls.REQUIRED)
    for data in (b"", nbd.pack_info("swap"), nbd.pack_info("none"), bytes(nbd.OPTION_BYTES_MAX + 1)):
        assert client.types(option, data) == [OptionReply.ERR_TLS_REQD]
    assert client.shelf.entered == []
    client.start_tls()
    assert client.types(Option.GO, nbd.pack_info("swap"))[-1] == OptionReply.ACK


def test_where_tls_is_required_export_name_ends_the_connection() -> None:
    client = Client(Tls.REQUIRED)
    assert client.send(nbd.pack_option(Option.EXPORT_NAME, b"swap")) == b""
    assert client.ended("refused") and client.shelf.entered == []


@pytest.mark.parametrize("tls", [Tls.OFFERED, Tls.REQUIRED])
def test_a_second_starttls_is_invalid(tls: Tls) -> None:
    client = Client(tls)
    client.start_tls()
    assert client.types(Option.STARTTLS) == [OptionReply.ERR_INVALID]
    assert client.types(Option.LIST)[-1] == OptionReply.ACK


def test_tls_forgets_what_was_negotiated_in_the_clear() -> None:
    client = Client(Tls.OFFERED)
    client.ask(Option.STRUCTURED_REPLY)
    client.ask(Option.SET_META_CONTEXT, CHOICE)
    client.start_tls()
    assert client.types(Option.SET_META_CONTEXT, CHOICE) == [OptionReply.ERR_INVALID]
    client.ask(Option.GO, nbd.pack_info("swap"))
    assert client.decision == nbd.Serve(EXPORTS[0], False, None)


# --- limits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [nbd.OPTION_BYTES_MAX + 1, 3 * nbd.OPTION_BYTES_MAX, nbd.SKIP_BYTES_MAX])
def test_long_options_are_dropped_piece_by_piece_and_refused(length: int) -> None:
    client = Client()
    assert client.types(Option.GO, bytes(length)) == [OptionReply.ERR_TOO_BIG]
    assert client.types(99, bytes(length)) == [OptionReply.ERR_UNSUP]
    assert client.types(Option.ABORT, bytes(length)) == [OptionReply.ACK] and client.ended("abort")


def test_it_never_wants_more_than_its_limit_at_once() -> None:
    client = Client()
    client.send(struct.pack(">QII", nbd.OPTION_MAGIC, Option.GO, nbd.SKIP_BYTES_MAX))
    assert client.handshake.wants == nbd.OPTION_BYTES_MAX


@pytest.mark.parametrize("option", [Option.GO, Option.EXPORT_NAME, Option.ABORT, 99])
@pytest.mark.parametrize("length", [nbd.SKIP_BYTES_MAX + 1, 0xFFFFFFFF])
def test_absurd_lengths_end_the_connection_before_a_byte_is_read(option: int, length: int) -> None:
    client = Client()
    assert client.send(struct.pack(">QII", nbd.OPTION_MAGIC, option, length)) == b""
    assert client.ended("broken")


def test_the_number_of_options_is_limited() -> None:
    client = Client()
    for _ in range(nbd.OPTIONS_MAX):
        assert client.types(99) == [OptionReply.ERR_UNSUP]
    assert client.send(nbd.pack_option(99)) == b"" and client.ended("broken")


# --- anything -----------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["swap", "old", "none", "", "secret"]) | st.text(max_size=8)
QUERIES = st.sampled_from(["base:", "base:allocation", "base:x", "qemu:y", ":", ""]) | st.text(max_size=8)
GOOD_DATA = (
    st.just(b"")
    | st.builds(lambda name: name.encode("utf-8", "surrogatepass"), NAMES)
    | st.builds(
        lambda name, asked: nbd.pack_info(name, *asked),
        st.sampled_from(["swap", "old", "none"]),
        st.lists(st.integers(0, 5), max_size=4),
    )
    | st.builds(
        lambda name, queries: nbd.pack_queries(name, *queries),
        st.sampled_from(["swap", "old", "none"]),
        st.lists(st.sampled_from(["base:", "base:allocation", "qemu:y", "x"]), max_size=3),
    )
    | st.binary(max_size=64)
)
ITEMS = (
    st.builds(nbd.pack_option, st.integers(0, 12), GOOD_DATA)
    | st.builds(nbd.pack_option, st.integers(0, 2**32 - 1), st.binary(max_size=64))
    | st.builds(
        struct.Struct(">QII").pack,
        st.just(nbd.OPTION_MAGIC),
        st.integers(0, 12),
        st.integers(0, 2 * nbd.SKIP_BYTES_MAX),
    )
    | st.binary(max_size=64)
)


def check(client: Client, sent: int) -> None:
    """What must hold whatever was sent."""
    assert b"secret" not in client.out and b"somebody else" not in client.out
    assert SECRET.size_bytes.to_bytes(8, "big") not in client.out
    # An option is at least 16 bytes long and is answered with a page at most.
    assert len(client.out) <= (sent // 16 + 1) * (nbd.STRING_BYTES_MAX + 20)
    if isinstance(client.decision, nbd.Serve):
        assert client.decision.export in EXPORTS
        assert client.shelf.entered[-1] == client.decision.export.name
        assert client.decision.structured or client.decision.allocation_context is None


def converse(client: Client, items: Iterable[bytes]) -> None:
    sent = 0
    for item in items:
        sent += len(item)
        client.send(item)
        if isinstance(client.decision, nbd.StartTls):
            client.handshake.tls_started()
            client.decision = None
    check(client, sent)


@given(
    tls=st.sampled_from(Tls), flags=st.sampled_from([FIXED, b"\0\0\0\1", bytes(4)]), items=st.lists(ITEMS, max_size=20)
)
def test_no_sequence_of_options_gets_anything_but_answers_or_an_end(tls: Tls, flags: bytes, items: list[bytes]) -> None:
    converse(Client(tls, flags), items)


@given(data=st.binary(max_size=400))
def test_no_bytes_get_anything_but_answers_or_an_end(data: bytes) -> None:
    converse(Client(flags=b""), [data])


@given(option=st.sampled_from([*Option]), data=st.binary(max_size=200))
def test_answers_to_any_data_are_well_formed(option: Option, data: bytes) -> None:
    client = Client(Tls.OFFERED)
    client.ask(Option.STRUCTURED_REPLY)
    out = client.send(nbd.pack_option(option, data))
    if option != Option.EXPORT_NAME:
        replies = list(nbd.unpack_replies(out))
        assert [answered for answered, _, _ in replies] == [option] * len(replies) and replies
        for _, kind, body in replies[:-1]:
            assert kind in (OptionReply.SERVER, OptionReply.INFO, OptionReply.META_CONTEXT) and body
        last, text = replies[-1][1:]
        assert last == OptionReply.ACK or (last & 1 << 31 and text.decode().isprintable())
