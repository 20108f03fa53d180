"""Runs a node in the foreground until it is told to stop."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import threading
from typing import Final

from ramster import limits, logs
from ramster.config.knobs import Config
from ramster.config.units import counted
from ramster.node import holder, run_dir
from ramster.node.node import Node
from ramster.node.privileges import Guard, dumps, forbid_dumps

log = logging.getLogger(__name__)

# Each wait of a close has its own, shorter deadline; `ramster stop` waits a minute.
END_S: Final = 45.0


def run(config: Config) -> int:
    """Exit status 0 after an orderly stop; a RamsterError says why the node could not start.

    The first SIGINT or SIGTERM is refused while the node holds somebody's only copy, and says what would be lost; a
    second one stops it anyway.
    """
    handler = logs.set_up()
    try:
        return _guarded(config)
    finally:
        handler.settle(at_once=True)


def _guarded(config: Config) -> int:
    guard = Guard(config.node.guard)
    dumped = dumps() if config.node.core_dumps else forbid_dumps()  # before a key is read
    guard.begin()  # before anything starts a thread
    guard.add(dumped)
    run_dir.prepare(config.node.run_dir)
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
        lost: dict[str, object] = {}
        if not warned:
            try:
                lost = await node.would_lose()
            except Exception:  # a node that cannot even tell is not kept alive by that
                log.exception("cannot tell what a stop would lose; stopping")
        if lost:
            warned = True
            log.warning("not stopping: %s; send the signal again to stop anyway", describe_loss(lost))
        else:
            node.request_stop(force=True)

    asked: set[asyncio.Task[None]] = set()  # keeps them alive until they have run
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: asked.add(loop.create_task(stop())))
    with limits.named("start", "the node"):
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
        end_within(END_S)
        await node.close()
    log.info("node %s has stopped", config.node.name)
    return 0


def end_within(seconds: float) -> None:
    """Whatever a close then waits for, the process ends: a node that was told to stop must not stay half-closed."""

    def end() -> None:
        log.error("the node does not close within %g s: it ends at once; this is where it stood", seconds)
        faulthandler.dump_traceback(all_threads=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


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
        parts += [f"export {each['name']} holds {counted(each['pages'], 'page')}" for each in exports]
    return "; ".join(parts)
