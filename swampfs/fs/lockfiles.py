"""Swamp's lock files, which are not files: creating one takes the lock of the whole datastore.

``O_CREAT|O_EXCL`` is a conditional put on the key all machines use, a rewrite in place a fenced renewal, ``unlink`` a
fenced release, ``read`` a look at who holds it (architecture §4). As with NFS locks, what the holder of a lock sees is
the latest state, and what it wrote is published before the lock is given up.

A swamp process that believes to be on a plain directory judges by process id and wall clock whether a lock is stale
(data model §7.1), which is wrong for a lock of another machine. So it is shown content by which it judges as we do.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import msgspec
import trio

from swampfs.errors import LeaseLostError, SwampfsError
from swampfs.fs.attributes import Attributes, Caller, Owner, fail, stale
from swampfs.fs.guard import process_of
from swampfs.names import GLOBAL_LOCK_FILE, Keyspace, RelPath, is_model_lock, parent_of
from swampfs.records import LockInfo, timestamp, timestamp_ns
from swampfs.sync.lease import Lease
from swampfs.sync.leases import Leases
from swampfs.sync.locks import Lock, decode_lock, encode_lock
from swampfs.sync.remote import Remote

log = logging.getLogger(__name__)

LOCK_BASE = 1 << 62
"""Inodes of lock files; those of the other tiers stay below."""

_LARGEST = 1 << 16
_MODE = 0o644
_SCAN_S = 1.0


@dataclass(slots=True)
class _Shown:
    """A lock file as the kernel knows it."""

    path: RelPath
    ino: int
    content: bytes = b""
    etag: str = ""  # of the version that was shown; '' = taken here
    mtime_ns: int = 0
    caller: Caller | None = None  # who took it here


class LockFiles:
    """The third tier of the tree. Everything but :meth:`attributes` and :meth:`children` may wait."""

    def __init__(
        self,
        leases: Leases,
        remote: Remote,
        keys: Keyspace,
        *,
        owner: Owner,
        make_lock: Callable[[str], Lock],
        start_soon: Callable[..., object],
    ) -> None:
        self._leases = leases
        self._remote = remote
        self._keys = keys
        self._owner = owner
        self._make_lock = make_lock
        self._start_soon = start_soon
        self._shown: dict[RelPath, _Shown] = {}
        self._by_ino: dict[int, _Shown] = {}
        self._next = LOCK_BASE
        self._lost: set[RelPath] = set()  # locks of our users that somebody else has by now
        self._foreign: set[RelPath] = set()  # model locks of others, while a user of ours holds the global lock
        self.publish: Callable[[RelPath], Awaitable[None]] = _nothing
        """Commit what was written under the locks we hold; set by the composition root."""

    # --- looking ------------------------------------------------------------------------------------------

    async def lookup(self, path: RelPath) -> Attributes | None:
        """Who holds it, as of now: one request. A lock that nobody keeps alive is nobody's. Raises StoreError."""
        await self._leases.settled(path)
        if self._leases.holds(path):
            return None  # ours, on behalf of our writers: they shall not wait for themselves
        lock = self._make_lock(self._keys.lock(path))
        before = self._leases.taken(path)
        writes = before.lock.writes if before is not None else 0
        found = await lock.look()
        lease = self._leases.taken(path)
        if lease is not None:
            moved = lease is not before or lease.lock.writes != writes or lease.lock.is_busy
            if moved or (found is not None and lease.lock.is_version(found[2].etag)):
                if lease.lock.is_sure or moved:
                    return self._attributes(self._show(path))
                return None  # nobody keeps it alive: it may be taken, by a new creation
            self._leases.forsake(lease)
            self._lost.add(path)
        if found is None or lock.is_stale(found[0], found[2].etag):
            self._foreign.discard(path)
            return None
        holder, body, info = found
        shown = self._shown.get(path)
        if shown is None or shown.etag != info.etag:
            shown = self._show_another(path)  # as of files: other content is another inode
        shown.content = _as_seen_here(lock, holder, body, info.etag)
        shown.etag, shown.caller = info.etag, None
        shown.mtime_ns = timestamp_ns(holder.acquired_at if holder else info.last_modified) or 0
        return self._attributes(shown)

    def attributes(self, ino: int) -> Attributes:
        """As last shown. Raises ESTALE."""
        return self._attributes(self._at(ino))

    def children(self, directory: RelPath) -> list[tuple[str, Attributes]]:
        """Locks to list: those users of this mount hold; while one is the global lock, all that must be drained."""
        names = {*self._leases.taken_names(), *self._foreign}
        found = [path for path in names if parent_of(path) == directory]
        return sorted(((path.rpartition("/")[2], self._attributes(self._show(path))) for path in found), key=_by_inode)

    def shows_any(self) -> bool:
        """Whether there is any to list, anywhere."""
        return bool(self._foreign or self._leases.taken_names())

    def forget(self, ino: int) -> None:
        shown = self._by_ino.get(ino)
        if shown is None:
            return
        if self._shown.get(shown.path) is not shown:
            del self._by_ino[ino]
        elif self._leases.taken(shown.path) is None:
            del self._by_ino[ino], self._shown[shown.path]

    # --- taking and giving back ---------------------------------------------------------------------------

    async def create(self, path: RelPath, caller: Caller) -> tuple[int, Attributes]:
        """Take the lock. Returns an anonymous file for its content. Raises EEXIST if it is held, StoreError."""
        if path == GLOBAL_LOCK_FILE:
            async with self._leases.global_gate:
                lease = await self._leases.take(path)
        else:
            lease = await self._leases.take(path)
        if lease is None:
            raise fail(errno.EEXIST, path)
        shown = self._show(path)
        shown.content, shown.etag, shown.mtime_ns, shown.caller = b"", "", time.time_ns(), caller
        self._lost.discard(path)
        process = process_of(caller.pid)
        lease.alive = lambda: _is_alive(shown, process)
        if path == GLOBAL_LOCK_FILE:
            with trio.move_on_after(_SCAN_S):
                await self._scan()
            self._start_soon(self._scan_while, lease)
        return self._file(b""), self._attributes(shown)

    async def unlink(self, path: RelPath) -> None:
        """Give the lock back, or break somebody's: exactly the version that was looked at.

        Raises EBUSY if it is another's by now, ENOENT, PushPendingError if what was written is not published.
        """
        lease = self._leases.taken(path)
        if lease is not None:
            await self.publish(path)
            try:
                await self._leases.untake(lease)
                return
            except LeaseLostError:
                raise fail(errno.EBUSY, path) from None
        if path in self._lost:
            self._lost.discard(path)
            raise fail(errno.EBUSY, path)  # by whoever had it: it is a successor's; asked again, it is meant
        shown = self._shown.get(path)
        if shown is None or not shown.etag:
            raise fail(errno.ENOENT, path)
        lock = self._make_lock(self._keys.lock(path))
        if not await lock.break_version(shown.etag):
            raise fail(errno.ENOENT if await lock.look() is None else errno.EBUSY, path)

    async def replace(self, path: RelPath, content: bytes, caller: Caller) -> None:
        """A file is renamed over the lock: a renewal by its holder, or taking it with that content."""
        if self._leases.taken(path) is not None:
            await self._rewrite(self._show(path), content)
            return
        number, _ = await self.create(path, caller)
        os.close(number)
        try:
            await self._rewrite(self._show(path), content)
        except BaseException:
            with trio.CancelScope(shield=True), contextlib.suppress(SwampfsError):
                lease = self._leases.taken(path)
                if lease is not None:
                    await self._leases.untake(lease)
            raise

    # --- content ------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int) -> int:
        """A private copy of the content. Writing is for the holder. Raises ESTALE, EBUSY."""
        shown = self._at(ino)
        writing = flags & (os.O_WRONLY | os.O_RDWR)
        if writing and self._leases.taken(shown.path) is None:
            raise fail(errno.EBUSY, shown.path)
        return self._file(b"" if flags & os.O_TRUNC and writing else shown.content)

    async def written(self, ino: int, fd: int) -> None:
        """The holder changed its copy: once it is a whole lock record, renew with it."""
        await self._rewrite(self._at(ino), os.pread(fd, _LARGEST, 0))

    async def _rewrite(self, shown: _Shown, content: bytes) -> None:
        lease = self._leases.taken(shown.path)
        if lease is None:
            raise fail(errno.EBUSY, shown.path)
        if decode_lock(content) is not None:
            await lease.lock.rewrite(content)
        shown.content, shown.mtime_ns = content, time.time_ns()

    # --- parts --------------------------------------------------------------------------------------------

    def _show(self, path: RelPath) -> _Shown:
        return self._shown.get(path) or self._show_another(path)

    def _show_another(self, path: RelPath) -> _Shown:
        """What the kernel knows under an earlier number stays until it forgets that."""
        self._next += 1
        shown = self._shown[path] = self._by_ino[self._next] = _Shown(path, self._next)
        return shown

    def _at(self, ino: int) -> _Shown:
        try:
            return self._by_ino[ino]
        except KeyError:
            raise stale(ino) from None

    def _attributes(self, shown: _Shown) -> Attributes:
        uid, gid = (shown.caller.uid, shown.caller.gid) if shown.caller else self._owner[:2]
        time_ns = shown.mtime_ns
        size = len(shown.content)
        mode = stat.S_IFREG | _MODE & ~self._owner.umask
        return Attributes(shown.ino, mode, 1, uid, gid, size, 1, time_ns, time_ns, time_ns)

    def _file(self, content: bytes) -> int:
        fd = os.memfd_create("lock", os.MFD_CLOEXEC)
        os.pwrite(fd, content, 0)
        return fd

    async def _scan_while(self, lease: Lease) -> None:
        """Swamp's structural commands look for model locks in the tree, until there are none (spec §9.4)."""
        while self._leases.taken(lease.name) is lease:
            started = trio.current_time()
            await self._scan()
            await trio.sleep(max(_SCAN_S, 5 * (trio.current_time() - started)))
        self._foreign = set()

    async def _scan(self) -> None:
        """The last answer stands where there is no other."""
        try:
            listed = await self._remote.list(self._keys.data("data/"))
        except Exception as error:
            log.info("the model locks of others could not be listed: %s", error)
            return
        found = set()
        for info in listed:
            path = RelPath(self._keys.rel(info.key) or "")
            if is_model_lock(path) and not self._leases.holds(path) and self._leases.taken(path) is None:
                found.add(path)
        self._foreign = found


async def _nothing(path: RelPath) -> None:
    return


def _by_inode(item: tuple[str, Attributes]) -> int:
    return item[1].ino


def _is_alive(shown: _Shown, maker: int) -> bool:
    """Whether the process that took a lock lives: the one it wrote into the file, else the one that made it.

    One that cannot be seen from here, in another pid namespace, counts as alive.
    """
    text = shown.content.strip()
    pid = int(text) if text.isdigit() and len(text) < 10 else maker
    return pid == 0 or os.path.exists(f"/proc/{pid}")


def _as_seen_here(lock: Lock, holder: LockInfo | None, body: bytes, etag: str) -> bytes:
    """A live lock of another machine, so that a swamp process here that tests pid and wall clock sees it alive."""
    if holder is None:
        return body
    looks_old = time.time_ns() - (timestamp_ns(holder.acquired_at) or 0) > holder.ttl_ms * 1_000_000
    seems_dead = not os.path.exists(f"/proc/{holder.pid}")
    if not (looks_old or seems_dead):
        return body
    acquired = timestamp(time.time_ns() - int(lock.unmoved_s(etag) * 1e9)) if looks_old else holder.acquired_at
    pid = os.getpid() if seems_dead else holder.pid
    changed = holder._replace(pid=pid, acquired_at=acquired)
    try:
        extra = {**msgspec.json.decode(body), **changed.as_json()}
    except (ValueError, TypeError, RecursionError):
        return encode_lock(changed)
    return msgspec.json.format(msgspec.json.encode(extra), indent=2)
