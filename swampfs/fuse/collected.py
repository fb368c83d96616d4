"""What the kernel has collected of files that are open (decision 0016), from outside.

Who asks for it waits for writes that this process answers, and cannot be killed meanwhile. So other processes ask.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import trio

log = logging.getLogger(__name__)

_PATIENCE_S = 10.0
_AT_ONCE = 500  # names in one command


async def bring_collected(mountpoint: Path, paths: Iterable[str]) -> None:
    """Have the kernel write all it has, and return when that is done of some files, or takes too long.

    ``paths`` are relative to the mount point.
    """
    names = [str(mountpoint / path) for path in paths]
    commands = [["sync", "--file-system", str(mountpoint)]]  # of whatever is open; begins it, where it does not wait
    commands += [["sync", "--data", "--", *names[at : at + _AT_ONCE]] for at in range(0, len(names), _AT_ONCE)]
    with trio.move_on_after(_PATIENCE_S) as scope:
        for command in commands:
            await _run(command)
    if scope.cancelled_caught:
        log.info("the kernel has not written what it collected after %g s", _PATIENCE_S)


async def _run(command: Sequence[str]) -> None:
    """The command, in a session of its own; who gives up leaves it to end when it can."""
    try:
        process = await trio.lowlevel.open_process(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        log.info("the kernel was not asked for what it collected: %s", error)
        return
    try:
        await process.wait()
    except trio.Cancelled:
        process.kill()
        raise
