"""What one process on one machine does in tests/fuse/test_many_machines.py: run as a program, prints JSON."""

from __future__ import annotations

import json
import os
import random
import sys
import time
import uuid
from pathlib import Path

PATIENCE_S = 120.0


def locked(path: Path) -> None:
    """Take a swamp lock file, as a shell script would: try until it can be created."""
    body = {
        "holder": f"worker@{os.uname().nodename}",
        "hostname": os.uname().nodename,
        "pid": os.getpid(),
        "acquiredAt": time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime()),
        "ttlMs": 30_000,
        "nonce": str(uuid.uuid4()),
    }
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if time.monotonic() > until:
                raise
            time.sleep(random.uniform(0.005, 0.02))
            continue
        os.write(fd, json.dumps(body, indent=2).encode())
        os.close(fd)
        return


def increment(lock: Path, counter: Path, times: int) -> list[int]:
    """Plain read, add one, write; nothing but the lock file stands between the machines."""
    done = []
    for _ in range(times):
        locked(lock)
        value = int(counter.read_text())
        counter.write_text(str(value + 1))
        done.append(value + 1)
        lock.unlink()
    return done


def create(directory: Path, names: int) -> list[int]:
    """Try to create each name exclusively; returns those that were ours."""
    won = []
    for number in range(names):
        try:
            fd = os.open(directory / f"name-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue
        os.write(fd, str(os.getpid()).encode())
        os.close(fd)
        won.append(number)
    return won


def allocate(directory: Path, versions: int) -> list[int]:
    """Allocate version numbers as swamp does: the next one that ``mkdir`` lets us have."""
    got: list[int] = []
    while len(got) < versions:
        number = max((int(name) for name in os.listdir(directory) if name.isdigit()), default=0) + 1
        while True:
            try:
                os.mkdir(directory / str(number))
                break
            except FileExistsError:
                number += 1
        got.append(number)
    return got


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "increment":
        result = increment(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    elif what == "create":
        result = create(Path(arguments[0]), int(arguments[1]))
    else:
        result = allocate(Path(arguments[0]), int(arguments[1]))
    print(json.dumps(result))
