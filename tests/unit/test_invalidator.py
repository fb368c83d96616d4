"""Telling the kernel what it must forget, without a kernel."""

from __future__ import annotations

import logging
import threading

import pytest
import trio
import trio.testing

from swampfs.fuse.session import Invalidator, _is_news
from swampfs.records import TreeChange
from swampfs.threads import Threads


def test_who_waits_until_the_kernel_was_told_is_woken_though_more_comes_meanwhile():
    """Who waits is often the acquisition of a lock: other machines wait for that."""
    may_go = threading.Event()

    async def main():
        invalidator = Invalidator(Threads())
        invalidator.forget_inode = lambda ino: may_go.wait(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(invalidator.run)
            with trio.fail_after(5):
                async with trio.open_nursery() as waiting:
                    for ino in (5, 6):
                        invalidator([TreeChange(1, "", ino)])
                        waiting.start_soon(invalidator.settle)
                        await trio.testing.wait_all_tasks_blocked()
                    assert len(waiting.child_tasks) == 2
                    may_go.set()
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.parametrize(
    ("said", "why", "is_news"),
    [
        ("fuse_release(): fuse_reply_* failed with %s", "No such file or directory", False),
        ("fuse_read(): fuse_reply_* failed with %s", "Invalid argument", True),
        ("No such file or directory", None, True),
    ],
)
def test_that_nobody_waits_for_an_answer_is_no_news(said, why, is_news):
    record = logging.makeLogRecord({"msg": said, "args": () if why is None else (why,), "name": "pyfuse3"})
    assert _is_news(record) == is_news
