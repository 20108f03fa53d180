"""Which process of a peer is believed when a connection says that it comes from another one: the decision alone.

A new generation in a HELLO means that the peer was restarted and what it held is lost. Whoever has its key can say so,
while the peer is up and everything is there. A process that ended, or a machine that started anew, leaves connections
that are closed or reset at the first probe; one that answers lives, and then it is the newcomer who is wrong.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

# Of a link that lives: the generation of its process, and when that was heard last, in ns.
Life = tuple[int, int]

# A newcomer waits for no longer: it wants its answer within the time of a handshake.
ANSWER_S_MAX: Final = 4.0


class Verdict(Enum):
    """What becomes of a newcomer."""

    BELIEVED = "the link is its own process's, or is gone, or does not answer"
    WAITS = "the link has been asked and may still answer"
    REFUSED = "the link has answered"


def judge(generation: int, asked: Life | None, now: Life | None, waited_s: float, answer_s: float) -> Verdict:
    """For a newcomer of `generation`.

    asked: the link when it was asked for a sign of life, waited_s ago; now: what there is of it now. None where there
    is no link that lives. answer_s: how long it has to answer.
    """
    if now is None or now[0] == generation:
        return Verdict.BELIEVED
    if asked is None or now != asked:
        return Verdict.REFUSED  # it answered, or came back meanwhile
    return Verdict.BELIEVED if waited_s >= answer_s else Verdict.WAITS
