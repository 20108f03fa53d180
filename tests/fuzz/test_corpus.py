"""The fuzzer's first inputs and those that once found something, through the ordinary build."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz import handshake, seeds
from tests.fuzz.transmission import Broken, Player, mutate

CORPUS = Path(__file__).parent / "corpus"


def inputs(target: str) -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in sorted((CORPUS / target).glob("*.bin"))}
    return seeds.TARGETS[target]() | found


@pytest.fixture(scope="module")
def player() -> Iterator[Player]:
    player = Player()
    yield player
    player.close()


@pytest.mark.parametrize("name", inputs("transmission"))
def test_transmission(player: Player, name: str) -> None:
    player.run(inputs("transmission")[name])


@pytest.mark.parametrize("name", inputs("handshake"))
def test_handshake(name: str) -> None:
    handshake.run(inputs("handshake")[name])


def test_mutations_of_valid_sessions_hold_too(player: Player) -> None:
    """A few, the same ones each time: that the fuzzer's own parts work. The search is `make fuzz`."""
    r = random.Random(1)
    made = list(inputs("transmission").values())
    for seed in range(200):
        data = mutate(r.choice(made), 4096, seed)
        assert 2 <= len(data) <= 4096
        player.run(data)
        made.append(data)


@pytest.mark.parametrize("change", ["contents", "foreign", "twice", "late"])
def test_wrong_answers_are_seen(change: str) -> None:
    """The oracle itself."""
    from tests.fuzz import transmission as t

    plan = t.Plan(structured=True, allocation=True, world=3, lockstep=False, spelt=False, leaves=0, piece=0)
    said = t.script(plan, t.request(0, 0, 4096) + t.request(0, 4096, 4096))
    for r in said.requests:
        r.errors = {0}
        t.Model(plan, said.requests).play(r)
    answers = t.Answers(plan)
    answers.waiting = {r.cookie: r for r in said.requests}

    def reply(cookie: int, offset: int, page: bytes) -> bytes:
        return t._CHUNK.pack(0x668E33EF, 1, 1, cookie, 4104) + offset.to_bytes(8) + page

    first, second = (r.cookie for r in said.requests)
    answers.feed(reply(first, 0, t.stored(0)))
    wrong = {
        "contents": reply(second, 4096, bytes(4096)),
        "foreign": reply(second, 4096, t._SECRET * 64),
        "twice": reply(first, 0, t.stored(0)),
        "late": reply(99, 0, t.stored(0)),
    }[change]
    with pytest.raises(Broken):
        answers.feed(wrong)
