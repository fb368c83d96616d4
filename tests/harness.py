"""Real mounts for tests: one per (state directory, mount point), driven through the command line."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
FIXTURES = REPO.parent / "shared" / "fixtures" / "reference"
WAIT_S = 20.0


def wait_for(condition: Callable[[], object], what: str, timeout_s: float = WAIT_S) -> None:
    """Poll until true; fails the test with ``what`` otherwise."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s} s: {what}")


def tree(root: Path) -> dict[str, str]:
    """Relative path → sha256 of every regular file, read through the mount."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory) / name
            found[str(path.relative_to(root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass
class Machine:
    """One simulated machine: its home, its mount point, its requests. Mount it, use ``path``, unmount it."""

    home: Path
    env: dict[str, str] = field(default_factory=dict)
    name: str = "a"
    options: tuple[str, ...] = ("--refresh", "300ms", "--push-delay", "200ms")
    within: tuple[str, ...] = ()  # a command that runs the others in a namespace of their own

    def __post_init__(self) -> None:
        self.mountpoint = self.home / f"mnt-{self.name}"
        self.state_dir = self.home / f"state-{self.name}"
        self.trace_file = self.home / f"trace-{self.name}.jsonl"
        self.mountpoint.mkdir(parents=True, exist_ok=True)

    @property
    def path(self) -> Path:
        return self.mountpoint

    def environment(self) -> dict[str, str]:
        keep = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "SWAMP"))}
        return {**keep, "SWAMP_HOME": str(self.home / "swamp-home"), **self.env}

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*self.within, sys.executable, "-m", "swampfs", *arguments],
            env=self.environment(), capture_output=True, text=True, timeout=120, cwd=self.home,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise AssertionError(f"swampfs {arguments} ended with {done.returncode}: {done.stderr}")
        return done

    def mount(self, source: str, *more: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(
            "mount", source, str(self.mountpoint), "--state-dir", str(self.state_dir),
            "--trace-file", str(self.trace_file), *self.options, *more, check=check,
        )  # fmt: skip

    def umount(self) -> None:
        self.run("umount", str(self.mountpoint))

    def status(self) -> dict[str, Any]:
        return json.loads(self.run("status", "--json", str(self.mountpoint)).stdout)

    def flush(self, *paths: Path) -> None:
        self.run("flush", *(str(path) for path in paths or (self.mountpoint,)))

    def kill(self) -> None:
        """``kill -9`` of the daemon; the dead mount stays for the next mount to clear."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: _is_gone(pid), "the daemon is dead, all its threads with it")

    def pid(self) -> int:
        return int((self.state_dir / "state" / "lock").read_text())

    def is_mounted(self) -> bool:
        mounts = Path("/proc/self/mounts").read_bytes()  # those of others may have any name
        return os.fsencode(f" {self.mountpoint} fuse.swampfs ") in mounts

    def log(self) -> str:
        path = self.state_dir / "swampfs.log"
        return path.read_text() if path.exists() else ""

    def requests(self) -> list[dict[str, Any]]:
        """Every request made so far, as the driver traced it."""
        if not self.trace_file.exists():
            return []
        return [json.loads(line) for line in self.trace_file.read_text().splitlines()]

    def clear_requests(self) -> None:
        if self.trace_file.exists():
            os.truncate(self.trace_file, 0)  # the mount appends to it

    def close(self) -> None:
        """Leave nothing behind, whatever state the test ended in."""
        if self.is_mounted():
            subprocess.run(["umount", "-l", str(self.mountpoint)], capture_output=True)
        lock = self.state_dir / "state" / "lock"
        if lock.exists() and lock.read_text().strip():
            pid = self.pid()
            try:
                if b"swampfs" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, FileNotFoundError):
                pass


def _is_gone(pid: int) -> bool:
    """No thread is left: the first one may be a zombie while others still hold the files."""
    try:
        return os.listdir(f"/proc/{pid}/task") == [str(pid)] and _is_zombie(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True


def _is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
