"""The object graph of a node, on one screen, and the answers that it gives about itself."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import Sequence
from importlib.metadata import version
from itertools import starmap
from typing import Any

from ramster.cluster.identity import NodeFiles
from ramster.config import paths
from ramster.config.knobs import Config
from ramster.engine.links import Links
from ramster.engine.nbd import NbdServer
from ramster.engine.region import Region
from ramster.engine.spill import Spill
from ramster.engine.store import Store
from ramster.frontswap.capacity import of_tiers
from ramster.frontswap.nbd import ExportService
from ramster.frontswap.region_service import RegionService
from ramster.node.control import ControlServer
from ramster.node.credentials import Credentials
from ramster.node.peering import Peering
from ramster.node.privileges import Check, Guard, arena_lock, keeps_in_ram
from ramster.node.watch import Watch
from ramster.remotify.policy import Lender, Policy, Settings
from ramster.remotify.worker import Worker
from ramster.wire.hello import Hello

log = logging.getLogger(__name__)


class Node:
    """Everything that one node consists of. `start`, then `wait`, then `close`; nothing runs before `start`."""

    def __init__(self, config: Config, guard: Guard, arena_fd: int | None = None) -> None:
        c = self.config = config
        self.guard = guard
        credentials: Credentials | None = None
        if c.cluster is not None:
            files = NodeFiles(c.cluster.ca, c.cluster.cert, c.cluster.key)
            credentials = Credentials(files, c.cluster.id, c.node.name)
        self.generation = secrets.randbits(63)
        self.started = time.monotonic()
        self.version = version("ramster")  # read now: later there may be no descriptor for it
        self.state = "starting"
        self.store = Store(
            c.arena.size_bytes,
            segment_bytes=c.arena.segment_bytes,
            path=None if c.arena.path is None else str(c.arena.path),
            lock=c.arena.lock,
            full_wait_ms=c.arena.full_wait_ms,
            clean_low=c.arena.clean_low,
            pressure=1 - c.remotify.high,
            arena_fd=arena_fd,
        )
        self.links = Links(
            self.store,
            c.node.number,
            lend_bytes=c.lend.size_bytes,
            lock=c.arena.lock,
            request_deadline_ms=c.links.request_deadline_ms,
            give_up_ms=c.links.give_up_ms,
            idle_ms=c.links.idle_timeout_ms,
            keepalive_ms=c.links.keepalive_ms,
            bulk_in_flight=c.links.bulk_in_flight_segments,
            borrower_share=c.lend.borrower_share,
            compact_below=c.remotify.compact_below,
            recompress=c.remotify.recompress,
        )
        self.spill = None
        if c.spill.path is not None:
            self.spill = Spill(self.links, c.spill.path, c.spill.size_bytes, mirror=c.spill.mirror)
            if self.spill.in_memory:
                log.warning(
                    "spill file %s lies on a %s, that is in RAM: set [spill] path to a disk",
                    c.spill.path,
                    self.spill.file_system,
                )
        r = c.remotify
        # A put that waits for room must see a lender passed over well before it gives up.
        stalled_ms = max(10, min(c.arena.full_wait_ms, c.region.full_wait_ms) // 4)
        policy = Policy(Settings(r.enabled, r.high, r.low, r.cold_after_ms, stalled_ms))
        names = {peer.number: peer.name for peer in c.peers}
        self.remotify = Worker(self.store, self.links, policy, r.tick_ms, self.spill, names)
        self.region_service = RegionService(c.node.run_dir, self.make_region, c.region, self.tiers)
        self.export_service = ExportService(c.node.run_dir, self.store, self.make_nbd_server, c.nbd, credentials)
        self.control = ControlServer(self, paths.control_socket(c.node.run_dir))
        self.watch = Watch(
            self.store,
            self.links,
            self.region_service,
            self.export_service,
            c.peers,
            c.links.keepalive_ms,
            self.spill,
        )
        self.region_service.before_leaving = self.watch.look
        self.peering: Peering | None = None
        if credentials is not None:
            self.peering = Peering(
                self.links,
                credentials,
                self.hello,
                c.peers,
                c.links,
                c.node.number,
                c.lend.foreign_grace_ms,
                self.watch.look,
            )
        self._stop = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def make_region(self, pages: int, resident_pages: int, name: str) -> Region:
        r = self.config.region
        return Region(
            self.links,
            pages,
            resident_pages,
            name=name,
            fault_threads=r.fault_threads,
            evictor_threads=r.evictor_threads,
            full_wait_ms=r.full_wait_ms,
            busy_poll_us=r.busy_poll_us,
            poison=r.poison,
        )

    def tiers(self) -> dict[str, int]:
        """What arena, lenders and spill file can take: for whoever makes a region."""
        spill = None
        if self.spill is not None:
            spill = {**self.spill.counters(), "mirror": self.spill.mirror}
        granted = (lender.credit for lender in starmap(Lender, self.links.lenders()) if lender.up)
        return of_tiers(self.store.counters(), granted, spill)

    def make_nbd_server(self) -> NbdServer:
        return NbdServer(self.links, requests_max=self.config.nbd.requests_max)

    def hello(self, kind: str, peer: int) -> Hello:
        assert self.config.cluster is not None
        return Hello(
            cluster=self.config.cluster.id,
            name=self.config.node.name,
            number=self.config.node.number,
            generation=self.generation,
            kind="get" if kind == "get" else "bulk",
            segment_bytes=self.config.arena.segment_bytes,
            lend_segments=self.links.lends(peer),
        )

    async def start(self) -> None:
        """Open the sockets and begin to work. PortTaken, UsageError: nothing is left open."""
        try:
            await self.region_service.start()  # first: it makes sure that the run directory is ours alone
            await self.export_service.start(self.config.exports)
            self._guard_exports()
            await self.control.start()
            if self.peering is not None:
                await self.peering.start()
        except BaseException:
            await self.close()
            raise
        self._tasks = [asyncio.create_task(self.remotify.run()), asyncio.create_task(self.watch.run())]
        self.guard.loaded()
        self.state = "running"

    async def wait(self) -> None:
        """Until request_stop."""
        await self._stop.wait()

    async def close(self) -> None:
        """Orderly: regions and the exports' connections end, lenders and borrowers hear goodbye, threads are joined."""
        self.state = "stopping"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.region_service.close()
        await self.export_service.close()
        await asyncio.to_thread(self.links.goodbye)
        if self.peering is not None and self.peering.address is not None:
            await self.peering.close()
        await self.control.stop()
        await asyncio.to_thread(self.links.stop)
        if self.spill is not None:
            await asyncio.to_thread(self.spill.close)
        await asyncio.to_thread(self.store.close)

    # --- NodeView: what the control API asks ----------------------------------------------------------------------

    def request_stop(self, force: bool) -> None:
        self._stop.set()

    async def would_lose(self) -> dict[str, Any]:
        """Foreign segments that have their only copy here, regions of running applications, exports with pages."""
        names = {peer.number: peer.name for peer in self.config.peers}
        segment = self.config.arena.segment_bytes
        foreign = {names.get(owner, f"node {owner}"): n * segment for owner, n in self.links.foreign().items()}
        regions = [
            {"id": each.number, "name": each.name, "pid": each.pid, "pages": each.statistics["pages"]}
            for each in await self.region_service.describe()
        ]
        exports = [
            {"name": each["name"], "pages": each["pages_stored"], "connections": each["connections"]}
            for each in await self.export_service.describe()
            if each["pages_stored"]
        ]
        found = {"foreign": foreign, "regions": regions, "exports": exports}
        return found if any(found.values()) else {}

    async def regions(self) -> list[dict[str, Any]]:
        return [
            {"id": each.number, "name": each.name, "pid": each.pid, "pids": list(each.pids), **each.statistics}
            for each in await self.region_service.describe()
        ]

    async def exports(self) -> list[dict[str, Any]]:
        return await self.export_service.describe()

    async def create_export(
        self, name: str, size_bytes: int, max_bytes: int | None, read_only: bool, swap: bool, allow: Sequence[str]
    ) -> dict[str, Any]:
        created = await self.export_service.create(name, size_bytes, max_bytes, read_only, swap=swap, allow=allow)
        self._guard_exports()
        return created

    async def change_export(
        self,
        name: str,
        size_bytes: int | None,
        read_only: bool | None,
        allow: Sequence[str] | None,
        swap: bool | None,
    ) -> dict[str, Any]:
        changed = await self.export_service.change(name, size_bytes, read_only, allow=allow, swap=swap)
        self._guard_exports()
        return changed

    async def remove_export(self, name: str, force: bool) -> None:
        await self.export_service.remove(name, force)
        self._guard_exports()

    def _guard_exports(self) -> None:
        self.guard.serve(self.export_service.count(), self.export_service.count(swap=True))

    def _look_at_arena(self, locked: bool) -> None:
        a = self.config.arena
        self.guard.add(
            arena_lock(a.size_bytes, locked)
            if a.lock
            else Check("arena", "off", "[arena] lock is false: it may be swapped out")
        )
        if a.path is not None:
            self.guard.add(keeps_in_ram(a.path))

    async def status(self) -> dict[str, Any]:
        unreachable = self.links.unreachable()
        arena = dataclasses.asdict(self.store.statistics()) | {"pages_unreachable": sum(unreachable.values())}
        links = self.links.counters()
        seen = {row["number"]: row for row in self.links.peers()}
        reasons = self.peering.reasons() if self.peering is not None else {}
        refusals = self.peering.refusals() if self.peering is not None else {}
        peers = []
        for peer in self.config.peers:
            row = seen.get(peer.number, {})
            state = "up" if row.get("up") else "down" if row else "connecting"
            # Who has said goodbye refuses connections, too, which is the lesser news.
            reason = (not row.get("gone") and reasons.get(peer.number)) or row.get("reason", "")
            reason = refusals.get(peer.number) or reason
            if not reason and peer.number > self.config.node.number:
                reason = (
                    f"no connection yet; {peer.name}, which has the higher number, connects, and this node asks it to"
                )
            peers.append(
                {
                    "name": peer.name,
                    "number": peer.number,
                    "address": str(peer.address),
                    "state": state,
                    "standing": self._standing(peer.number),
                    "reason": "" if state == "up" else reason,
                    **{key: row.get(key, 0) for key in _PEER_KEYS},
                    "pages_unreachable": unreachable.get(peer.number, 0),
                }
            )
        names = {peer.number: peer.name for peer in self.config.peers}
        peering = dataclasses.asdict(self.peering.counters) if self.peering is not None else {}
        self._look_at_arena(arena["locked"])
        return {
            "name": self.config.node.name,
            "number": self.config.node.number,
            "version": self.version,
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self.started, 3),
            "generation": self.generation,
            "state": self.state,
            "listen": "{}:{}".format(*self.peering.address) if self.peering and self.peering.address else None,
            "arena": arena,
            "guard": self.guard.report(),
            "lend": {
                "bytes": links["lend_bytes"],
                "frames_total": links["lent_frames"],
                "frames_used": links["lent_frames"] - links["lent_free"],
                "bytes_used": links["lend_bytes"] - links["lent_bytes_free"],
                "locked": links["lent_locked"],
                "owners": {names.get(owner, str(owner)): n for owner, n in self.links.foreign().items()},
            },
            "spill": self._spill_status(arena),
            "peers": peers,
            "regions": await self.regions(),
            "exports": await self.exports(),
            "nbd": {"socket": str(self.export_service.path), "listen": self.export_service.addresses},
            "counters": {
                "puts": arena["puts"],
                "local_gets": arena["local_gets"],
                "segments_shipped": arena["shipped_segments"],
                "bytes_sent": sum(row["bytes_sent"] for row in seen.values()),
                "bytes_compressed": arena["bytes_compressed"],
                "pages_damaged": arena["corrupt_pages"] + links["corrupt_replies"],
                **{key: value for key, value in links.items() if not key.startswith("le")},
                **peering,
                **{f"region_{key}": value for key, value in dataclasses.asdict(self.region_service.counters).items()},
                **{f"nbd_{key}": value for key, value in dataclasses.asdict(self.export_service.counters).items()},
            },
            "remotify": {
                "enabled": self.config.remotify.enabled,
                "draining": self.remotify.policy.draining,
                "decisions": self.remotify.decisions,
                "segments_ordered": self.remotify.ordered,
                "under_way": self.links.shipping(),
            },
        }

    def _standing(self, number: int) -> str:
        """What this node thinks of a peer, and why."""
        shut_out = self.peering.shut_out(number) if self.peering is not None else ""
        return shut_out or self.remotify.policy.trust.word(number)

    def _spill_status(self, arena: dict[str, Any]) -> dict[str, Any] | None:
        """None without a spill file."""
        if self.spill is None:
            return None
        seen = dataclasses.asdict(self.spill.statistics())
        return {
            "path": str(self.spill.path),
            "mirror": self.spill.mirror,
            "file_system": self.spill.file_system,
            "reserved": self.spill.reserved,
            "linked": self.spill.linked,
            "segments": arena["segments_spilled"],
            "mirrored": arena["segments_mirrored"],
            "unmirrored": arena["segments_unmirrored"] if self.spill.mirror else 0,
            "pages_unmirrored": arena["pages_unmirrored"] if self.spill.mirror else 0,
            "pages": arena["pages_spilled"],
            "errors": seen["read_errors"] + seen["write_errors"],
            **seen,
        }


_PEER_KEYS = (
    "generation",
    "credit",
    "shipping",
    "gone",
    "lost",
    "bytes_sent",
    "bytes_received",
    "gets",
    "segments_sent",
    "refused",
    "damaged",
    "round_trip_p50_us",
    "round_trip_p99_us",
)
