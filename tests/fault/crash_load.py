"""One process that works on files of its own until its mount dies, and keeps a log of what was acknowledged.

Run as a program: ``ROOT LOG SEED``, with the start as JSON on standard input. Each line of the log is what a step is
about to make of which paths (``null``: gone), or ``ok`` when its last system call has returned.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"


def paths(seed):
    """Of one worker: nobody else writes them."""
    return [f"files/w{seed}/{name}" for name in "abcd"] + [f"{MODEL}/w{seed}/{name}/raw" for name in "12"]


def work(root, log, seed, state):
    chance = random.Random()

    def step(change, act):
        log.write(json.dumps(change) + "\n")
        log.flush()
        act()
        log.write('"ok"\n')
        log.flush()
        state.update(change)

    def write(path, body):
        def act():
            path_there = root / path
            path_there.parent.mkdir(parents=True, exist_ok=True)
            path_there.write_bytes(body.encode())

        step({path: body}, act)

    def append(path, piece):
        def act():
            with open(root / path, "ab", buffering=0) as file:
                file.write(piece.encode())

        step({path: state[path] + piece}, act)

    for number in range(1_000_000):
        path = chance.choice(paths(seed))
        body = f"{seed}-{number}-{chance.random()}\n" * chance.choice([1, 1, 30, 2000])
        there = state.get(path) is not None
        what = chance.choice(["write", "append", "replace", "remove", "rename", "truncate"]) if there else "write"
        if what == "write":
            write(path, body)
        elif what == "append":
            append(path, body[:100])
        elif what == "replace":
            temporary = f"files/w{seed}/.{number}.tmp"
            write(temporary, body)
            step({path: body, temporary: None}, lambda path=path, t=temporary: (root / t).rename(root / path))
        elif what == "remove":
            step({path: None}, lambda path=path: (root / path).unlink())
        elif what == "truncate":
            size = len(state[path]) // 2
            step({path: state[path][:size]}, lambda path=path, size=size: os.truncate(root / path, size))
        else:
            target = chance.choice([other for other in paths(seed) if other != path])

            def act(path=path, target=target):
                (root / target).parent.mkdir(parents=True, exist_ok=True)
                (root / path).rename(root / target)

            step({path: None, target: state[path]}, act)


if __name__ == "__main__":
    with open(sys.argv[2], "w", encoding="utf-8") as log:
        try:
            work(Path(sys.argv[1]), log, int(sys.argv[3]), json.load(sys.stdin))
        except OSError as error:
            log.write(json.dumps({"ended": str(error)}) + "\n")
