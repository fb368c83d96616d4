"""One process of the soak: works on files of its own, whatever happens, until it is told to stop.

Run as a program: ``ROOT SEED``. After an error it looks what became of the step. On SIGTERM it ends after the step it
is at, and prints as JSON what its files hold, how many steps were done, and which errors were met how often.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path

from tests.fault.crash_load import paths

_AGAIN_S = 0.2


class Work:
    def __init__(self, root, seed):
        self.root, self.seed = root, seed
        self.random = random.Random(seed)
        self.state = {}
        self.done = 0
        self.errors = Counter()
        self.stopped = False

    def run(self):
        while not self.stopped:
            path = self.random.choice(paths(self.seed))
            steps = [self.write, self.look, self.list]
            if path in self.state:
                steps += [self.append, self.replace, self.remove, self.rename, self.truncate]
            step = self.random.choice(steps)
            touched = {path}
            try:
                step(path, touched)
                self.done += 1
            except OSError as error:
                self.errors[f"{step.__name__} {errno.errorcode.get(error.errno, error.errno)}"] += 1
                for one in touched:
                    self.state.pop(one, None)
                    there = self.read_back(one)
                    if there is not None:
                        self.state[one] = there

    def read_back(self, path):
        """What a file holds, once that can be said; ``None``: there is none."""
        while True:
            try:
                return (self.root / path).read_text()
            except FileNotFoundError:
                return None
            except OSError as error:
                self.errors[f"read_back {errno.errorcode.get(error.errno, error.errno)}"] += 1
                time.sleep(_AGAIN_S)

    def body(self):
        return f"{self.seed}-{self.done}-{self.random.random()}\n" * self.random.choice([1, 1, 30, 3000])

    def write(self, path, touched):
        body = self.body()
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_text(body)
        self.state[path] = body

    def append(self, path, touched):
        piece = self.body()[:100]
        with open(self.root / path, "ab", buffering=0) as file:
            file.write(piece.encode())
            os.fsync(file.fileno())
        self.state[path] += piece

    def replace(self, path, touched):
        body = self.body()
        temporary = f"{path}.{self.seed}-{self.done}.tmp"
        touched.add(temporary)
        (self.root / temporary).write_text(body)
        (self.root / temporary).rename(self.root / path)
        self.state.pop(temporary, None)  # of an attempt that failed half-way
        self.state[path] = body

    def remove(self, path, touched):
        (self.root / path).unlink()
        del self.state[path]

    def rename(self, path, touched):
        target = self.random.choice([other for other in paths(self.seed) if other != path])
        touched.add(target)
        (self.root / target).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).rename(self.root / target)
        self.state[target] = self.state.pop(path)

    def truncate(self, path, touched):
        body = self.state[path]
        os.truncate(self.root / path, len(body) // 2)
        self.state[path] = body[: len(body) // 2]

    def look(self, path, touched):
        there = self.read_back(path)
        assert there == self.state.get(path), f"{path} holds {there and there[:80]!r}"

    def list(self, path, touched):
        """Walk the tree, and read something of somebody else's."""
        found = [Path(top) / name for top, _, names in os.walk(self.root) for name in names]
        if found:
            with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                self.random.choice(found).read_bytes()


if __name__ == "__main__":
    work = Work(Path(sys.argv[1]), int(sys.argv[2]))
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(work, "stopped", True))
    work.run()
    json.dump({"state": work.state, "done": work.done, "errors": work.errors}, sys.stdout)
