"""How a node that has lost a peer goes about having it back. Pure: pauses and patience, no I/O.

The page path waits `give_up` for a page, so what is tried has to fit into that several times: a fault of the network
that is over must not go on because of a pause that it caused. Packets that a fault swallowed are sent again after
pauses that double (1 s, 2 s, 4 s for a connection that is being made), and so an attempt is given up early at first,
and another made.
"""

from __future__ import annotations

from dataclasses import dataclass

#: The most that one attempt may take, and each step of a handshake.
HANDSHAKE_S = 5.0
#: Less than this, and a busy machine would never get through a handshake.
PATIENCE_MIN_S = 0.25
#: Parts of `give_up`: the longest pause while gets wait, and how long the first attempt may take.
URGENT_SHARE = 10
PATIENCE_SHARE = 4
#: The other node may be in a greater hurry than this one.
LOOK_MAX_S = 0.5


@dataclass(frozen=True, slots=True)
class Redial:
    """The knobs of [links], in seconds."""

    reconnect_min: float
    reconnect_max: float
    give_up: float

    def pause(self, tries: int, urgent: bool) -> tuple[float, float]:
        """The range of the pause after so many attempts in a row that failed, 1 or more; urgent: gets wait for this
        peer. Random within it, so that nodes that lost one lender together do not come back together.
        """
        most = min(self.reconnect_min * 2.0 ** min(tries - 1, 30), self.reconnect_max)
        if urgent:
            most = min(most, self.give_up / URGENT_SHARE)
        return min(self.reconnect_min, most), most

    def patience(self, tries: int) -> float:
        """How long an attempt may take after so many that failed: doubles, for a network that is slow, not broken."""
        return min(max(self.give_up / PATIENCE_SHARE, PATIENCE_MIN_S) * 2.0 ** min(tries, 30), HANDSHAKE_S)

    def takes_the_other_way(self, tried_s: float) -> bool:
        """Whether a node that has tried to connect for so long lets the other one, which asks to be called, do it: it
        may be that one's port that is crowded, and nobody stands in this one's.
        """
        return tried_s > self.look

    @property
    def look(self) -> float:
        """How often somebody who pauses looks whether gets wait by now; how long the node that does not connect waits
        for the one that does before it asks to be called; and how long after a call somebody who asked too early is
        not called again.
        """
        return min(self.give_up / URGENT_SHARE, LOOK_MAX_S)
