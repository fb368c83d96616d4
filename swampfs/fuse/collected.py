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

_AT_ONCE = 500  # names in one command


async def bring_collected(mountpoint: Path, paths: Iterable[str], timeout_s: float) -> bool:
    """Have the kernel write all it has. Returns whether that was done in time, for sure of some files.

    ``paths`` are relative to the mount point. What is refused is told to who wrote it.
    """
    names = [str(mountpoint / path) for path in paths]
    commands = [["sync", "--file-system", str(mountpoint)]]  # of whatever is open; begins it, where it does not wait
    commands += [["sync", "--data", "--", *names[at : at + _AT_ONCE]] for at in range(0, len(names), _AT_ONCE)]
    with trio.move_on_after(timeout_s) as scope:
        for command in commands:
            await _run(command)
    return not scope.cancelled_caught


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
