"""Runs a node in the foreground until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys

from ramster import limits
from ramster.config.knobs import Config
from ramster.node import holder
from ramster.node.node import Node
from ramster.node.privileges import Guard

log = logging.getLogger(__name__)


def run(config: Config) -> int:
    """Exit status 0 after an orderly stop; a RamsterError says why the node could not start.

    The first SIGINT or SIGTERM is refused while the node holds somebody's only copy, and says what would be lost; a
    second one stops it anyway.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    guard = Guard(config.node.guard)
    guard.begin()  # before anything starts a thread
    a = config.arena
    if a.keep_ms == 0:
        holder.end(config.node.run_dir)  # of a node whose configuration was another one
        return asyncio.run(_run(config, guard, None))
    with holder.take(config.node.run_dir, a.size_bytes, a.segment_bytes, a.lock, a.keep_ms) as kept:
        guard.add(kept.check())
        return asyncio.run(_run(config, guard, kept.descriptor))


async def _run(config: Config, guard: Guard, arena_fd: int | None) -> int:
    limits.raise_descriptors()
    with limits.named("start", "the node"):
        node = Node(config, guard, arena_fd)
    loop = asyncio.get_running_loop()
    warned = False

    async def stop() -> None:
        nonlocal warned
        if node.state == "stopping":
            return
        lost = {} if warned else await node.would_lose()
        if lost:
            warned = True
            log.warning("not stopping: %s; send the signal again to stop anyway", describe_loss(lost))
        else:
            node.request_stop(force=True)

    asked: set[asyncio.Task[None]] = set()  # keeps them alive until they have run
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: asked.add(loop.create_task(stop())))
    await node.start()
    where = node.peering.address if node.peering is not None else None
    log.info(
        "node %s is up, sockets in %s%s",
        config.node.name,
        config.node.run_dir,
        f", peers on {where[0]}:{where[1]}" if where else "",
    )
    try:
        await node.wait()
    finally:
        await node.close()
    log.info("node %s has stopped", config.node.name)
    return 0


def describe_loss(lost: dict[str, object]) -> str:
    """In words, what a stop would lose."""
    parts = []
    foreign = lost.get("foreign")
    if isinstance(foreign, dict):
        parts += [f"the only copy of {n >> 20} MiB of node {name}'s pages is here" for name, n in foreign.items()]
    regions = lost.get("regions")
    if isinstance(regions, list):
        parts += [f"process {each['pid']} uses region {each['name']}" for each in regions]
    exports = lost.get("exports")
    if isinstance(exports, list):
        parts += [f"export {each['name']} holds {each['pages']} pages" for each in exports]
    return "; ".join(parts)
