"""How far this machine's clock is from the datastore's: signatures expire by it, and swamp judges locks by it."""

from __future__ import annotations

import time
import uuid
from contextlib import suppress
from typing import NamedTuple

import trio

from swampfs.errors import StoreError
from swampfs.names import Keyspace
from swampfs.provider import ABSENT
from swampfs.records import instant_ns
from swampfs.sync.remote import Remote

_CLEAN_UP_S = 10.0
_RESOLUTION_S = 1.0  # of the times stores tell, cut off


class Skew(NamedTuple):
    """Seconds by which this machine's clock is ahead, give or take ``unsure_s``."""

    ahead_s: float
    unsure_s: float

    @property
    def at_least_s(self) -> float:
        return max(0.0, abs(self.ahead_s) - self.unsure_s)


async def measure(remote: Remote, keys: Keyspace) -> Skew | None:
    """By the time the datastore gives to an object made for it, and removed. ``None``: it tells no time.

    Raises AccessDeniedError where nothing may be written, StoreError.
    """
    key = keys.data(f"_control/swampfs/clock-{uuid.uuid4()}")
    before = time.time()
    try:
        await remote.put(key, b"swampfs clock probe\n", ABSENT)
        after = time.time()
        info = await remote.head(key)
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(_CLEAN_UP_S), suppress(StoreError):
            await remote.delete(key)
    told = instant_ns(info.last_modified)
    if told is None:
        return None
    there = told / 1e9 + _RESOLUTION_S / 2
    return Skew((before + after) / 2 - there, (after - before) / 2 + _RESOLUTION_S / 2)
