"""Node processes to measure: the product's own settings on a throw-away cluster."""

from __future__ import annotations

from ramster.cli.cluster_files import Sections
from ramster.testing.cluster import Cluster

# testing.cluster is small and impatient; what is measured is what a user gets.
_AS_SHIPPED: Sections = {
    "arena": {"segment": "256KiB", "lock": True, "full_wait": "1s"},
    "links": {
        "request_deadline": "2s",
        "give_up": "5s",
        "idle_timeout": "5s",
        "keepalive": "1s",
        "reconnect_min": "100ms",
        "reconnect_max": "1s",
    },
    "remotify": {"cold_after": "30s", "tick": "50ms"},
    "region": {"full_wait": "2s", "node_wait": "2s"},
}


def cluster(nodes: dict[str, Sections]) -> Cluster:
    """Not started yet. `nodes`: for each name what differs from the product's defaults."""
    return Cluster(
        {
            name: {
                section: {**_AS_SHIPPED.get(section, {}), **sections.get(section, {})}
                for section in _AS_SHIPPED.keys() | sections.keys()
            }
            for name, sections in nodes.items()
        },
        identity="bench",
    )
