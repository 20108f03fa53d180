"""Who is let in: one table of everything that is refused, and in which words."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramster.errors import ProtocolError
from ramster.wire import hello
from ramster.wire.hello import Hello, Refusal

OWN = Hello(cluster="lab", name="alpha", number=5, generation=1, kind="get", segment_bytes=262144)
KNOWN = {7: "beta", 3: "gamma"}
THEIRS = Hello(
    cluster="lab", name="beta", number=7, generation=2**63, kind="get", segment_bytes=262144, lend_segments=4
)


def objection(accepted: bool = True, certificate: str = "beta", **changed: object) -> str | None:
    theirs = msgspec.structs.replace(THEIRS, **changed)
    return hello.objection(OWN, theirs, certificate, KNOWN, accepted=accepted)


def test_a_known_peer_is_let_in() -> None:
    assert objection() is None
    assert objection(accepted=False, certificate="gamma", name="gamma", number=3) is None


def test_what_both_speak_is_enough() -> None:
    assert objection(versions=(1, 9)) is None
    assert objection(features=("anything", "new")) is None
    assert objection(kind="bulk") is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"cluster": "farm"}, "it belongs to cluster 'farm', this node to 'lab'"),
        ({"number": 255}, "out of range"),
        ({"number": -1}, "out of range"),
        ({"generation": -1}, "out of range"),
        ({"generation": 1 << 64}, "out of range"),
        ({"certificate": "gamma"}, "it calls itself 'beta', but its certificate is for 'gamma'"),
        ({"number": 5}, "this node's own number, 5"),
        ({"number": 9}, "no [[peers]] has number 9"),
        ({"number": 3}, "node 3 is 'gamma' here"),
        ({"name": "gamma", "certificate": "gamma", "number": 3}, "node 5 connects to node 3, not the other way round"),
        ({"versions": (3, 4)}, "it speaks versions 3 to 4, this node 2 to 2"),
        ({"versions": (0, 0)}, "it speaks versions 0 to 0"),
        ({"versions": (1, 1)}, "it speaks versions 1 to 1"),
        ({"page_bytes": 65536}, "its pages have 65536 bytes, ours 4096"),
        ({"segment_bytes": 65536}, "its segments have 65536 bytes, ours 262144: set [arena] segment alike"),
    ],
)
def test_everybody_else_is_told_why(changed: dict[str, object], words: str) -> None:
    reason = objection(**changed)  # type: ignore[arg-type]
    assert reason is not None and words in reason


def test_hellos_survive_encoding() -> None:
    assert hello.decode_hello(hello.encode(THEIRS)) == THEIRS
    assert hello.decode_refusal(hello.encode(Refusal(reason="no"))) == "no"


def test_a_hello_with_more_to_say_is_read() -> None:
    more = msgspec.json.decode(hello.encode(THEIRS)) | {"zone": "rack 3"}
    assert hello.decode_hello(msgspec.json.encode(more)) == THEIRS


@given(st.one_of(st.binary(max_size=200), st.integers(0, len(hello.encode(THEIRS)) - 1)))
def test_a_hello_that_cannot_be_read_is_a_protocol_error(data: bytes | int) -> None:
    body = hello.encode(THEIRS)[:data] if isinstance(data, int) else data
    with pytest.raises(ProtocolError, match="cannot be read"):
        hello.decode_hello(body)


@given(st.binary(max_size=200))
def test_a_refusal_that_cannot_be_read_is_one_without_a_reason(body: bytes) -> None:
    assert hello.decode_refusal(body) == "it gave no reason"


def test_a_refusal_is_not_longer_than_a_log_line() -> None:
    assert len(hello.decode_refusal(hello.encode(Refusal(reason="x" * 10_000)))) == 500


def test_a_refusal_cannot_move_a_cursor_or_begin_a_line() -> None:
    said = hello.decode_refusal(hello.encode(Refusal(reason="no\n\x1b[2Jyes")))
    assert said == r"no\n\x1b[2Jyes"


@pytest.mark.parametrize(
    ("changed", "where"),
    [
        ({"lend_segments": -1}, "lend_segments"),
        ({"lend_segments": 1 << 32}, "lend_segments"),
        ({"lend_segments": 10**30}, "lend_segments"),
        ({"lend_segments": 1.5}, "lend_segments"),
        ({"segment_bytes": -1}, "segment_bytes"),
        ({"page_bytes": 1 << 40}, "page_bytes"),
        ({"number": -1}, "number"),
        ({"number": 1 << 70}, "number"),
        ({"generation": -1}, "generation"),
        ({"kind": "spill"}, "kind"),
        ({"kind": "x" * 9000}, ""),
        ({"versions": [2]}, "versions"),
        ({"versions": [-1, 2]}, "versions"),
        ({"versions": [2, 1 << 16]}, "versions"),
        ({"features": ["x"] * 65}, "features"),
        ({"features": ["x" * 64]}, "features"),
        ({"name": "x" * 64}, "name"),
        ({"name": "be\nta"}, "name"),
        ({"name": "beta\n"}, "name"),
        ({"cluster": ""}, "cluster"),
        ({"cluster": "lab\x1b[2J"}, "cluster"),
    ],
)
def test_what_is_out_of_bounds_goes_no_further(changed: dict[str, object], where: str) -> None:
    more = msgspec.json.decode(hello.encode(THEIRS)) | changed
    with pytest.raises(ProtocolError, match="its hello cannot be read") as raised:
        hello.decode_hello(msgspec.json.encode(more))
    assert where in str(raised.value) and len(str(raised.value)) < 400


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_json_nested_deeply_is_a_protocol_error_too(opening: bytes) -> None:
    deep = opening * (16000 // len(opening))
    body = hello.encode(THEIRS)[:-1] + b',"zone":' + deep
    with pytest.raises(ProtocolError, match="nested too deeply"):
        hello.decode_hello(body)
    assert hello.decode_refusal(b'{"zone":' + deep) == "it gave no reason"


@pytest.mark.parametrize("generation", [0, 1 << 63, (1 << 64) - 1])
def test_every_generation_of_64_bits_is_read(generation: int) -> None:
    said = msgspec.structs.replace(THEIRS, generation=generation)
    assert hello.decode_hello(hello.encode(said)) == said
