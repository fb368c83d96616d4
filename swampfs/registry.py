"""Which mounts run on this machine, for the commands that talk to them.

``<user data dir>/swampfs/run/<digest of mount point>.json`` names the process and its control socket beside it.
Sockets are addressed through ``/proc/self/fd`` because a socket path may have only 107 bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from swampfs.errors import NotMountedError
from swampfs.settings import user_data_dir

_LOOK_S = 0.2  # at what happens meanwhile


class Registration(NamedTuple):
    """One running mount."""

    mountpoint: str
    pid: int
    source: str
    state_dir: str
    socket: str  # path


def _digest(mountpoint: Path) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:20]


def run_dir(env: Mapping[str, str]) -> Path:
    directory = user_data_dir(env) / "swampfs" / "run"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory


def socket_path(env: Mapping[str, str], mountpoint: Path) -> Path:
    return run_dir(env) / f"{_digest(mountpoint)}.sock"


def register(env: Mapping[str, str], registration: Registration) -> Path:
    """Write the record of a mount; returns its path, to be removed at unmount."""
    path = run_dir(env) / f"{_digest(Path(registration.mountpoint))}.json"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(registration._asdict()), encoding="utf-8")
    temporary.rename(path)
    return path


def forget_dead(env: Mapping[str, str]) -> None:
    """Remove the records of mounts whose process is gone and that nothing is mounted by any more."""
    for registration in registrations(env):
        try:
            is_dead = has_ended(registration.pid) and not os.path.ismount(registration.mountpoint)
        except PermissionError:
            continue  # somebody else's process has the number now
        if is_dead:
            record = run_dir(env) / f"{_digest(Path(registration.mountpoint))}.json"
            record.unlink(missing_ok=True)
            Path(registration.socket).unlink(missing_ok=True)


def has_ended(pid: int) -> bool:
    """Whether there is no such process, or nobody has asked yet how it ended. Raises PermissionError."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def registrations(env: Mapping[str, str]) -> list[Registration]:
    found = []
    for path in sorted(run_dir(env).glob("*.json")):
        try:
            found.append(Registration(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue  # being written or removed right now
    return found


def find(env: Mapping[str, str], path: Path) -> Registration:
    """The mount at or above a path. Raises NotMountedError."""
    candidates = [r for r in registrations(env) if Path(r.mountpoint) in (path, *path.parents)]
    if not candidates:
        raise NotMountedError(f"no swampfs mount at {path}")
    return max(candidates, key=lambda r: len(r.mountpoint))


@contextmanager
def short_socket_path(path: Path) -> Iterator[str]:
    """An address for a socket of any path length."""
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def listen(path: Path) -> socket.socket:
    """A listening control socket, mode 0600, replacing one left by a dead process."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with short_socket_path(path) as address:
        previous = os.umask(0o177)
        try:
            listener.bind(address)
        finally:
            os.umask(previous)
    listener.listen(16)
    return listener


def request(
    registration: Registration,
    message: Mapping[str, object],
    timeout_s: float,
    meanwhile: Callable[[], None] | None = None,
) -> dict[str, object]:
    """Ask a mount something over its control socket; ``meanwhile`` is called now and then until it answers.

    Raises NotMountedError if it does not answer.
    """
    until = time.monotonic() + timeout_s
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(timeout_s)
        try:
            with short_socket_path(Path(registration.socket)) as address:
                client.connect(address)
            client.sendall(json.dumps(message).encode() + b"\n")
            if meanwhile is not None:
                client.settimeout(min(_LOOK_S, timeout_s))
            answer = b""
            while not answer.endswith(b"\n"):
                try:
                    chunk = client.recv(65536)
                except TimeoutError:
                    if meanwhile is None or time.monotonic() >= until:
                        raise
                    meanwhile()
                    continue
                if not chunk:
                    break
                answer += chunk
        except OSError as error:
            raise NotMountedError(
                f"the mount at {registration.mountpoint} (pid {registration.pid}) does not answer: {error}",
                remedy="if its process is gone, mount again: unpushed changes are replayed",
            ) from None
    try:
        decoded = json.loads(answer)
    except ValueError:
        raise NotMountedError(f"the mount at {registration.mountpoint} ended while answering") from None
    return decoded if isinstance(decoded, dict) else {}
