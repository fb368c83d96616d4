"""What becomes of work in threads when those who asked for it are cancelled."""

from __future__ import annotations

import threading

import pytest
import trio

from swampfs.threads import Lane, Threads


def test_a_write_that_waits_for_a_thread_can_be_cancelled_and_one_that_has_begun_is_awaited():
    async def main():
        threads, begun, go_on, done = Threads({Lane.LOCK: 1}), threading.Event(), threading.Event(), []

        def work(name):
            begun.set()
            assert go_on.wait(10)
            done.append(name)

        async def first():
            with trio.move_on_after(0.2):
                await threads.write(Lane.LOCK, work, "first")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(first)
            await trio.to_thread.run_sync(begun.wait, 10)
            with trio.move_on_after(0.1) as waiting:
                await threads.write(Lane.LOCK, work, "second")
            assert waiting.cancelled_caught, "it had not begun"
            await trio.sleep(0.2)
            assert not done, "the first is cancelled by now, and awaited"
            go_on.set()
        assert done == ["first"]

    trio.run(main)


def test_who_leaves_waits_for_a_while_and_then_for_nothing():
    async def main():
        threads, begun, go_on = Threads(), threading.Event(), threading.Event()

        def work():
            begun.set()
            go_on.wait(10)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(threads.write, Lane.LOCK, work)
            await trio.to_thread.run_sync(begun.wait, 10)
            with trio.fail_after(5):
                await threads.leave(0.1)
                nursery.cancel_scope.cancel()
        assert not go_on.is_set(), "its thread was still at work"
        go_on.set()

    trio.run(main)


@pytest.mark.parametrize("lane", list(Lane))
def test_a_lane_runs_no_more_at_once_than_it_has_threads(lane):
    async def main():
        threads, lock, now, most = Threads({lane: 2}), threading.Lock(), [], []
        met = threading.Barrier(2)

        def work(number):
            with lock:
                now.append(number)
                most.append(len(now))
            met.wait(10)
            with lock:
                now.remove(number)

        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(threads.write, lane, work, number)
        assert max(most) == 2

    trio.run(main)
