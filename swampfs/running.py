"""A running mount as commands and signals reach it: what it says of itself, and what it can be asked to do."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import trio

from swampfs import __version__, metrics
from swampfs.artifacts.keeper import Keeper
from swampfs.artifacts.query import LARGEST
from swampfs.datastore import Datastore
from swampfs.errors import FileError, HostileNameError, PushPendingError, StateError, UsageError
from swampfs.foreign import ForeignNamespaces
from swampfs.fs.attributes import Owner
from swampfs.fs.cache_limit import CacheLimit
from swampfs.fs.events import Events
from swampfs.fs.keeping import Keeping
from swampfs.fs.links import MOST, TOPS, Listing, Source, listing
from swampfs.fs.old import target
from swampfs.fs.prefetch import Prefetch
from swampfs.fs.refresh import Refresh
from swampfs.fs.scrub import Scrub
from swampfs.fs.vfs import FileSystem
from swampfs.fs.views import NAME as VIEWS
from swampfs.fs.views import Views, document, lines, records
from swampfs.fs.writeback import Writeback
from swampfs.fs.xattrs import PREFIX, Xattrs
from swampfs.names import RelPath, lease_path, model_of, rel_path
from swampfs.settings import MountSettings
from swampfs.state.artifacts import Artifact
from swampfs.state.schema import compact, is_disk_full
from swampfs.sync.service import SyncService

_MOST_MODELS = 20
_LARGEST_REWRITTEN = 64 << 20  # bytes of the catalog: to rewrite more of it would hold the mount up for seconds
_COUNTED = 5000  # changes by model: more of them would hold the loop up


async def _nothing_collected(timeout_s: float) -> bool:
    """Without the writeback cache."""
    return True


@dataclass(slots=True)
class Mount:
    """The parts of a running mount that commands and signals reach."""

    settings: MountSettings
    datastore: Datastore
    sync: SyncService
    fs: FileSystem
    writeback: Writeback
    refresh: Refresh
    cache: CacheLimit
    scrub: Scrub
    keeping: Keeping
    prefetch: Prefetch
    about: Xattrs
    foreign: ForeignNamespaces | None
    artifacts: Keeper
    events: Events
    started_at: float = field(default_factory=time.monotonic)
    stop: trio.Event = field(default_factory=trio.Event)
    collect: Callable[[float], Awaitable[bool]] = _nothing_collected
    """Have the kernel bring what it has collected of files that are open; whether it did in so many seconds."""
    upcalls: Callable[[], dict[str, Any]] | None = None
    """Set where the kernel's requests are counted: with the fast lane."""

    def status(self) -> dict[str, Any]:
        """``status --json``; from memory and the local catalog only."""
        totals = self.sync.catalog.totals()
        pending = self.writeback.pending()
        watermark = self.sync.catalog.watermark()
        error = self._error()
        return {
            "pid": os.getpid(),
            "version": __version__,
            "mountpoint": str(self.settings.mountpoint),
            "source": self.settings.source.url,
            "namespace": self.settings.source.namespace or None,
            "stateDir": str(self.settings.state_dir),
            "readOnly": self.settings.read_only,
            "healthy": error is None,
            "backend": self.settings.source.backend.value,
            "index": {"mode": watermark.mode.value, "commitSeq": watermark.commit_seq},
            "latencyMs": self.datastore.trace.last_latency_ms,
            "requests": dict(self.datastore.trace.counts),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "upcalls": None if self.upcalls is None else self.upcalls(),
            "threadHops": self.datastore.remote.threads.hops,
            "files": totals["files"],
            "bytes": totals["bytes"],
            "hydrated": totals["clean"] + totals["dirty"],
            "dirty": len(pending),
            "pending": [self.shown(path) for path in pending[:100]],
            "pendingByModel": dict(Counter(map(_place, pending[:_COUNTED])).most_common(_MOST_MODELS)),
            "locks": self.sync.leases.as_json(),
            "lostLocks": self.sync.leases.lost,
            "offline": self._is_offline(),
            "conflicts": len(self.sync.cache.conflicts()),
            "findings": [
                finding._replace(path=self.shown(finding.path))._asdict()
                for finding in self.sync.catalog.findings()[:100]
            ],
            "openFiles": len(self.fs.files.handles),
            "cache": {"bytes": self.cache.used, "limit": self.cache.limit, "evicted": self.cache.evicted},
            "pinned": self.keeping.pins,
            "prefetch": self.prefetch.as_json(),
            "scrub": self.scrub.as_json(),
            "lastError": error,
            "refreshAgeMs": self.refresh.age_ms(),
            "visibilityMs": self.sync.visibility.as_json(),
            **({"namespaces": self.foreign.as_json()} if self.foreign is not None else {}),
            "uptimeS": round(time.monotonic() - self.started_at, 1),
        }

    def stats(self) -> dict[str, Any]:
        """What was done since the mount, in numbers."""
        status = self.status()
        counted = ("requests", "upcalls", "threadHops", "cache", "prefetch", "scrub", "visibilityMs", "uptimeS")
        return {**{name: status[name] for name in counted}, "artifacts": self.artifacts.as_json()}

    def standing(self) -> dict[str, Any]:
        """What of ``status`` makes an event when it becomes another."""
        error = self.refresh.last_error or self.writeback.last_error
        return {"offline": self._is_offline(), "lastError": error, "locks": self.sync.leases.as_json()}

    def _is_offline(self) -> bool:
        return self.sync.leases.reach.lost_since is not None or self._silent_s() is not None

    def _error(self) -> str | None:
        error, silent_s = self.refresh.last_error or self.writeback.last_error, self._silent_s()
        if error is None and silent_s is not None:
            return f"the datastore has not answered for {silent_s:.0f} s"
        return error

    def _silent_s(self) -> float | None:
        since = self.datastore.circuit.open_since
        return None if since is None else time.monotonic() - since

    def views(self, owner: Owner) -> Views:
        """``.swampfs/``: the same as ``status``, as files."""
        return Views(
            owner,
            {
                "status.json": lambda: document(self.status()),
                "stats.json": lambda: document(self.stats()),
                "metrics": lambda: metrics.render(self.status()),
                "pending": lambda: lines([self.shown(path) for path in self.writeback.pending()]),
                "locks": lambda: records(self.sync.leases.as_json()),
                "errors": lambda: lines(self._errors()),
            },
            events=self.events,
            tops=TOPS,
            links=self._links,
            old=partial(target, self.sync.catalog),
            private=self.settings.allow_other,
            sizes=not self.fs.files.handles.written_back,
        )

    async def _links(self, path: str) -> Listing | None:
        """What is in a directory of links."""
        own, shows_all = self.settings.source.namespace, self.foreign is not None

        def where(artifact: Artifact) -> str | None:
            if artifact.namespace != own and not shows_all:
                return None
            above = f"{artifact.namespace}/" if shows_all else ""
            return f"{above}{artifact.place}/{artifact.version}"

        def content(artifact: Artifact) -> bytes | None:
            path = RelPath(f"{artifact.place}/{artifact.version}/raw")
            if artifact.namespace != own:
                return None
            try:
                with open(self.sync.cache.open(path), "rb") as file:
                    return file.read() if os.fstat(file.fileno()).st_size <= LARGEST else None
            except OSError:
                return None

        source = Source(where, content, None if shows_all else own)
        try:
            found = await self.artifacts.ask(lambda artifacts: listing(artifacts, path, source))
            if found is not None and len(found) >= MOST:
                why = UsageError(f"only {MOST} links are shown of more", remedy="ask `swampfs query`")
                self.fs.failures.note_at(f"{VIEWS}/{path}", "readdir", errno.EOVERFLOW, why)
            return found
        except UsageError as error:
            self.fs.failures.note_at(f"{VIEWS}/{path}", "lookup", errno.EINVAL, error)
            raise FileError(errno.EINVAL, error.line()) from None

    def _errors(self) -> list[str]:
        """What is wrong now, then what failed lately, the latest last."""
        now = [text for text in (self.refresh.last_error, self.writeback.last_error) if text]
        return now + [one._replace(path=self.shown(one.path)).line() for one in self.fs.failures.recent()]

    def shown(self, path: str) -> str:
        """A path of the bound namespace, as this mount shows it."""
        return path if self.foreign is None else f"{self.settings.source.namespace}/{path}"

    def _own_paths(self, paths: Sequence[str] | None) -> list[RelPath] | None:
        """Of paths below the mount point, those of the bound namespace, as that names them; ``None`` = all."""
        if paths is None:
            return None
        checked = [rel_path(path) if path else RelPath("") for path in paths]
        if self.foreign is None:
            return checked
        own = self.settings.source.namespace
        return [
            RelPath(path.removeprefix(own).removeprefix("/"))
            for path in checked
            if path in ("", own) or path.startswith(f"{own}/")
        ]

    def _named(self, message: Mapping[str, Any]) -> list[RelPath]:
        """The paths of a command, each of which must be there. Raises UsageError."""
        named = self._own_paths(message["paths"]) or []
        if len(named) < len(message["paths"]):
            raise UsageError("that is in another namespace", remedy="name paths of the bound one")
        for path in named:
            if self.sync.catalog.at(path) is None:
                raise UsageError(f"{path} is not in the datastore")
        return named

    def info(self, path: RelPath) -> dict[str, Any]:
        """What is known of a file or directory of the datastore, from memory and the local catalog only."""
        node = self.sync.catalog.at(path)
        assert node is not None
        lock = lease_path(path)
        known = {name.removeprefix(PREFIX): value for name, value in self.about.of(node.ino).items()}
        holders = [one for one in self.sync.leases.as_json() if one["lock"] == lock]
        return {
            "path": self.shown(path),
            "kind": node.kind.name.lower(),
            **known,
            "size": node.size,
            "partition": node.partition,
            "remoteModifiedAt": node.base.last_modified if node.base is not None else None,
            "pinned": self.keeping.is_pinned(path),
            "lock": lock,
            "lockHolder": holders[0] if holders else None,
        }

    def explain(self, text: str) -> dict[str, Any]:
        """What failed there last, whether it is over, what may be in the way now. ``text`` may be no path at all."""
        failure = self.fs.failures.of(text)
        told = None if failure is None else {**failure.as_json(), "path": self.shown(text)}
        try:
            path = rel_path(text) if text else RelPath("")
        except HostileNameError as error:
            return {"path": self.shown(text), "failure": told, "impossible": error.line(), "isOver": False}
        node, lock = self.sync.catalog.at(path), lease_path(path)
        kept = [report["path"] for report in self.sync.cache.conflict_reports()]
        return {
            "path": self.shown(path),
            "info": self.info(path) if node is not None else None,
            "isLocal": node is None and bool(text) and self.fs.lookup_exists(path),
            "failure": told,
            "isOver": failure is not None and node is not None and failure.is_over(node),
            "unread": self.sync.hydrator.failures.get(path),
            "change": op.value if (op := self.sync.journal.op(path)) is not None else None,
            "isOpen": self.sync.is_open(path),
            "heldBack": self.writeback.is_held_back(path),
            "waitsForLock": lock if lock in self.writeback.waiting_for else None,
            "pushError": self.writeback.last_error,
            "refreshError": self.refresh.last_error,
            "offline": self._is_offline(),
            "readOnly": self.settings.read_only,
            "conflicts": kept.count(path),
            "findings": [found.detail for found in self.sync.catalog.findings() if found.path == path],
            "lock": lock,
            "lockHolders": [one for one in self.sync.leases.as_json() if one["lock"] == lock],
        }

    def commands(self) -> dict[str, Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]]:
        async def status(_: Mapping[str, Any]) -> dict[str, Any]:
            return self.status()

        async def flush(message: Mapping[str, Any]) -> dict[str, Any]:
            wanted = self._own_paths(message.get("paths"))
            # Read-only, what an earlier mount left in the journal waits for one that may push.
            if wanted != [] and not self.settings.read_only:
                until = trio.current_time() + float(message.get("timeout", 60.0))
                is_collected = await self.collect(until - trio.current_time())
                await self.writeback.flush(wanted, max(0.0, until - trio.current_time()))
                await self.sync.leases.give_back_idle()
                if not is_collected:
                    raise PushPendingError("the kernel has not written all it collected of files that are open")
            return {"pending": len(self.writeback.pending())}

        async def refresh(_: Mapping[str, Any]) -> dict[str, Any]:
            await self.refresh.once()
            if self.foreign is not None:
                await self.foreign.refresh()
            return {"refreshAgeMs": self.refresh.age_ms(), "lastError": self.refresh.last_error}

        async def conflicts(_: Mapping[str, Any]) -> dict[str, Any]:
            found = self.sync.cache.conflict_reports()
            return {"conflicts": [{**one, "path": self.shown(one["path"])} for one in found]}

        async def compacted(_: Mapping[str, Any]) -> dict[str, Any]:
            try:
                own = [compact(self.sync.catalog.db, _LARGEST_REWRITTEN), self.sync.journal.compact()]
                done = [*own, await self.artifacts.compact()]
            except Exception as error:
                if not is_disk_full(error):
                    raise
                raise StateError(
                    "the disk is too full to rewrite a database", remedy="free as much as it has"
                ) from None
            return {
                "walPagesTotal": sum(one.wal_pages for one in done),
                "walPagesCheckpointed": sum(one.checkpointed for one in done),
                "dbBytesReclaimed": sum(one.reclaimed for one in done),
                "vacuumSkipped": any(one.skipped for one in done),
            }

        async def drop_conflict(message: Mapping[str, Any]) -> dict[str, Any]:
            self.sync.cache.drop_conflict(str(message["id"]))
            return {"conflicts": len(self.sync.cache.conflicts())}

        return {
            "status": status,
            "compact": compacted,
            "flush": flush,
            "refresh": refresh,
            "conflicts": conflicts,
            "drop_conflict": drop_conflict,
            **self._commands_of_paths(),
        }

    def _commands_of_paths(self) -> dict[str, Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]]:
        async def hydrate(message: Mapping[str, Any]) -> dict[str, Any]:
            return await self.keeping.hydrate(self._named(message))

        async def evict(message: Mapping[str, Any]) -> dict[str, Any]:
            return self.keeping.evict(self._named(message))

        async def pin(message: Mapping[str, Any]) -> dict[str, Any]:
            return await self.keeping.pin(self._named(message))

        async def unpin(message: Mapping[str, Any]) -> dict[str, Any]:
            return self.keeping.unpin(self._named(message))

        async def info(message: Mapping[str, Any]) -> dict[str, Any]:
            (path,) = self._named(message)
            return self.info(path)

        async def explain(message: Mapping[str, Any]) -> dict[str, Any]:
            text, own = str(message["path"]), self.settings.source.namespace
            if self.foreign is not None:
                if text != own and not text.startswith(f"{own}/"):
                    raise UsageError("that is in another namespace", remedy="name a path of the bound one")
                text = text.removeprefix(own).removeprefix("/")
            return self.explain(text)

        async def artifacts(message: Mapping[str, Any]) -> dict[str, Any]:
            """Bring the artifact catalog up to date, of all names or of one, for a process that will read it."""
            if (name := message.get("name")) is not None and not message.get("anew"):
                known = await self.artifacts.bring_name(str(name))
            else:
                known = await self.artifacts.bring_up_to_date(anew=bool(message.get("anew")))
            namespace = self.settings.source.namespace
            return {"database": known.path, "namespace": namespace, "allNamespaces": self.foreign is not None}

        async def progress(_: Mapping[str, Any]) -> dict[str, Any]:
            pending, artifacts = len(self.writeback.pending()), self.artifacts.as_json()
            return {"hydrate": self.keeping.progress(), "pending": pending, "artifacts": artifacts}

        return {
            "artifacts": artifacts,
            "progress": progress,
            "hydrate": hydrate,
            "evict": evict,
            "pin": pin,
            "unpin": unpin,
            "info": info,
            "explain": explain,
        }


def _place(path: str) -> str:
    """What a change is counted under: its model, or the first directory of what belongs to none."""
    model = model_of(RelPath(path))
    return path.partition("/")[0] if model is None else str(model)
