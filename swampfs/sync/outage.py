"""Watching whether the datastore answers, so that an outage costs nobody's time twice and ends within a second."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from swampfs.backends.circuit import CircuitStore
from swampfs.threads import Lane, Threads

log = logging.getLogger(__name__)

_LOOK_S = 1.0


async def watch(circuit: CircuitStore, threads: Threads, on_return: Callable[[], None]) -> None:
    """Probe while that is due, for ever; ``on_return`` is called when an outage is over."""
    while True:
        await trio.sleep(_LOOK_S)
        if not circuit.is_probe_due():
            continue
        was_open = circuit.open_since is not None
        try:
            is_back = await threads.read(Lane.PROBE, circuit.probe)
        except Exception:  # this task must outlive whatever a probe meets
            log.exception("probing the datastore failed")
            continue
        if is_back:
            log.info("the datastore answers again")
            on_return()
        elif circuit.open_since is not None and not was_open:
            log.info("the datastore does not answer")
