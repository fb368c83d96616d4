"""Keeping the artifact catalog in step with the tree: what changed is read, everything else is left alone.

Nothing is read before somebody asks. The first time every ``metadata.yaml`` is, from this machine's cache or the
datastore, without bringing it into the cache; what it said is kept across mounts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar

import trio

from swampfs.artifacts import metadata
from swampfs.errors import AbsentError, SwampfsError
from swampfs.records import IndexEntry, Node, Residency
from swampfs.state.artifacts import Artifacts, Document
from swampfs.state.documents import Documents
from swampfs.state.schema import Compacted, compact, is_damaged, is_local_fault
from swampfs.sync.catalogs import Catalogs
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.parallel import for_each
from swampfs.sync.parts import Parts
from swampfs.threads import Lane

log = logging.getLogger(__name__)

T = TypeVar("T")

_MARKER = "latest"
_NAMES_AT_ONCE = 200
_READ_AT_ONCE = 16
_FOREIGN_S = 30.0  # between two looks at what other namespaces say of themselves
_LONGEST_MARKER = 20


class _Changes(NamedTuple):
    """Of some names: versions whose metadata is to be read, and versions that are gone."""

    to_read: list[tuple[str, str]]  # directory and fingerprint
    gone: set[str]


class _Note(NamedTuple):
    """What is to be noted of one name."""

    name: str
    documents: Sequence[Document]
    gone: Sequence[str]
    latest: int | None
    marker: str
    is_empty: bool


class Keeper:
    """Of one mount's bound namespace, and of what the others export."""

    def __init__(self, parts: Parts, path: str) -> None:
        """``path`` is the database's."""
        self._parts = parts
        self._path = path
        self._namespace = parts.keys.namespace
        self._foreign_at = -float("inf")
        self._documents = Documents(parts.catalog, (metadata.NAME, _MARKER))
        self._artifacts: Artifacts | None = None
        self._names: set[str] = set()  # to be looked at
        self._must_compare = True  # with all of the tree: nothing is known of what changed since
        self._lock = trio.Lock()
        self.done = 0
        self.to_do = 0
        """Names that were looked at, of those that had to be, the last time."""

    async def bring_up_to_date(self, *, anew: bool = False) -> Artifacts:
        """The catalog, which knows of all that the tree has now. ``anew``: whatever it says is not believed.

        Its connection is used in :attr:`Lane.ARTIFACTS` only; other processes open the file for themselves.
        Raises StoreError if metadata cannot be read; what could be is kept.
        """
        async with self._lock, self._in_words():
            try:
                return await self._bring_up_to_date(anew=anew)
            except Exception as error:
                if not is_damaged(error):
                    raise
                log.info("the artifact catalog is damaged and made anew: %s", error)
                return await self._bring_up_to_date(anew=True)

    async def bring_name(self, name: str) -> Artifacts:
        """As above, sure of one data name only: a question for that need not wait for all the others."""
        async with self._lock, self._in_words():
            artifacts = await self._opened(anew=False)
            self._note_touched()
            wanted = {path for path in self._documents.called(name) if metadata.path_of(f"{path}/1") is not None}
            known = await self._parts.remote.threads.read(Lane.ARTIFACTS, artifacts.places, self._namespace, name)
            gone = {path for path in self._names if path.endswith(f"/{name}")}
            await self._look(artifacts, wanted.union(known, gone))
            return artifacts

    async def ask(self, question: Callable[[Artifacts], T]) -> T:
        """Ask the catalog, brought up to date. Raises as :meth:`bring_up_to_date`."""
        async with self._in_words():
            artifacts = await self.bring_up_to_date()
            try:
                return await self._parts.remote.threads.read(Lane.ARTIFACTS, question, artifacts)
            except Exception as error:
                if not is_damaged(error):
                    raise
            artifacts = await self.bring_up_to_date(anew=True)
            return await self._parts.remote.threads.read(Lane.ARTIFACTS, question, artifacts)

    async def compact(self) -> Compacted:
        """Give back the room of what was forgotten."""
        async with self._lock, self._in_words():
            artifacts = await self._opened(anew=False)
            return await self._parts.remote.threads.write(Lane.ARTIFACTS, compact, artifacts.db)

    def as_json(self) -> dict[str, int]:
        """How far it is."""
        return {"done": self.done, "total": self.to_do}

    def close(self) -> None:
        if self._artifacts is not None:
            self._artifacts.close()

    @asynccontextmanager
    async def _in_words(self) -> AsyncIterator[None]:
        """What this machine's disk or somebody else's program does to the catalog is told, and no bug."""
        try:
            yield
        except Exception as error:
            if not is_local_fault(error):
                raise
            raise SwampfsError(
                f"the artifact catalog {self._path} cannot be kept: {error}",
                remedy="make room, or wait for who uses it, and ask again",
            ) from None

    # --- parts --------------------------------------------------------------------------------------------

    async def _bring_up_to_date(self, *, anew: bool) -> Artifacts:
        artifacts = await self._opened(anew=anew)
        self._note_touched()
        if self._must_compare:
            await self._compare(artifacts)
        await self._look(artifacts, set(self._names))
        await self._follow_others(artifacts)
        return artifacts

    def _note_touched(self) -> None:
        self._documents.watch()
        self._names |= {name for path in self._documents.touched() if (name := _name_of(path))}

    async def _opened(self, *, anew: bool) -> Artifacts:
        known = self._artifacts

        def open_it() -> Artifacts:
            artifacts = known or Artifacts(self._path)
            if anew or artifacts.is_lost():
                artifacts.make_anew()
                self._must_compare = True
            return artifacts

        self._artifacts = await self._parts.remote.threads.write(Lane.ARTIFACTS, open_it)
        return self._artifacts

    async def _compare(self, artifacts: Artifacts) -> None:
        """All of the tree with all that is known, as after a mount."""
        threads = self._parts.remote.threads
        known = await threads.read(Lane.ARTIFACTS, artifacts.fingerprints, self._namespace)
        markers = await threads.read(Lane.ARTIFACTS, artifacts.markers, self._namespace)
        for found in self._documents.all(metadata.NAME):
            for path, fingerprint in found:
                directory = path[: -len(metadata.NAME) - 1]
                if known.pop(directory, None) != fingerprint and metadata.path_of(directory) is not None:
                    self._names.add(directory.rpartition("/")[0])
            await trio.lowlevel.checkpoint()
        self._names |= {path.rpartition("/")[0] for path in known}
        for found in self._documents.all(_MARKER):
            for path, fingerprint in found:
                place = path[: -len(_MARKER) - 1]
                if markers.pop(place, fingerprint) != fingerprint:
                    self._names.add(place)
            await trio.lowlevel.checkpoint()
        self._names |= {place for place, fingerprint in markers.items() if fingerprint}
        self._must_compare = False

    async def _look(self, artifacts: Artifacts, names: set[str]) -> None:
        """Read what changed of some names. Those that could not be stay to be looked at."""
        self.done, self.to_do = 0, len(names)
        self._names |= names
        threads = self._parts.remote.threads
        for batch in _slices(sorted(names), _NAMES_AT_ONCE):
            known = await threads.read(Lane.ARTIFACTS, artifacts.versions, self._namespace, batch)
            self._names.difference_update(batch)  # a change from now on is another one
            try:
                changes = self._changes(known)
                documents = await self._read(changes.to_read)
                notes = [self._note_of(name, known[name], documents.get(name, []), changes) for name in batch]
                await threads.write(Lane.ARTIFACTS, self._write, artifacts, notes)
            except BaseException:
                self._names.update(batch)
                raise
            self.done += len(batch)

    def _note_of(self, name: str, known: Iterable[str], documents: Sequence[Document], changes: _Changes) -> _Note:
        latest, marker = self._marker(name, known, documents)
        gone = [path for path in known if path in changes.gone]
        return _Note(name, documents, gone, latest, marker, is_empty=not documents and len(gone) == len(list(known)))

    def _write(self, artifacts: Artifacts, notes: Iterable[_Note]) -> None:
        with artifacts.transaction():
            for name, documents, gone, latest, marker, is_empty in notes:
                if is_empty:
                    artifacts.forget(self._namespace, name)
                else:
                    artifacts.put(self._namespace, name, documents, gone=gone, latest=latest, marker=marker)

    def _changes(self, known: dict[str, dict[str, str]]) -> _Changes:
        to_read: list[tuple[str, str]] = []
        gone: set[str] = set()
        for name, versions in known.items():
            left = dict(versions)
            for path, fingerprint in self._documents.below(name, metadata.NAME):
                directory = path[: -len(metadata.NAME) - 1]
                if metadata.path_of(directory) is not None and left.pop(directory, None) != fingerprint:
                    to_read.append((directory, fingerprint))
            gone.update(left)
        return _Changes(to_read, gone)

    async def _read(self, wanted: Sequence[tuple[str, str]]) -> dict[str, list[Document]]:
        """By name, in the order of their versions, which is that of their insertion. Raises StoreError."""
        read: list[Document] = []

        async def one(what: tuple[str, str]) -> None:
            node = self._parts.catalog.at(f"{what[0]}/{metadata.NAME}")
            if node is not None:  # removed meanwhile: that is another change
                read.append(await self._parts.remote.threads.read(Lane.SCAN, self._document, node, *what))

        errors = await for_each(wanted, one, at_once=_READ_AT_ONCE)
        if errors:
            raise errors[0]
        found: dict[str, list[Document]] = {}
        for document in sorted(read, key=lambda one: int(one.path.rpartition("/")[2])):
            found.setdefault(document.path.rpartition("/")[0], []).append(document)
        return found

    def _document(self, node: Node, path: str, fingerprint: str) -> Document:
        """Raises StoreError if the datastore does not answer. In a thread."""
        if node.residency is not Residency.STUB:
            try:
                return metadata.parse(path, Path(self._parts.cache.path(node.path)).read_bytes(), fingerprint)
            except OSError as error:
                return Document(path, "", None, f"not readable here: {error.strerror}")
        entry = node.base
        try:
            blob = None if entry is None else self._parts.remote.store.get(self._parts.keys.data(node.path))
        except AbsentError:
            blob = None
        if entry is None or blob is None:
            return Document(path, "", None, "its object is gone from the datastore")
        if not _is_whole(entry, blob.body):
            return Document(path, "", None, "the datastore holds other bytes than its index says")
        return metadata.parse(path, blob.body, fingerprint)

    def _marker(self, name: str, known: Iterable[str], documents: Iterable[Document]) -> tuple[int | None, str]:
        """The version that ``latest`` names, if it can be told without asking the datastore, and its fingerprint."""
        node = self._parts.catalog.at(f"{name}/{_MARKER}")
        if node is None or node.is_dir:
            return None, ""
        fingerprint = self._documents.fingerprint(node.path)
        if node.target is not None:
            return _number(node.target.rstrip("/")), fingerprint
        if node.size > _LONGEST_MARKER:
            return None, fingerprint
        if node.residency is not Residency.STUB:
            try:
                return _number(Path(self._parts.cache.path(node.path)).read_text("ascii", "replace")), fingerprint
            except OSError:
                return None, fingerprint
        paths = (*known, *(one.path for one in documents))
        versions = {path.rpartition("/")[2] for path in paths if path.rpartition("/")[0] == name}
        hashes = {sha256(version.encode()).hexdigest(): int(version) for version in versions}
        return hashes.get(node.base_sha256 or ""), fingerprint

    async def _follow_others(self, artifacts: Artifacts) -> None:
        """What other namespaces export of theirs. One that cannot be asked keeps what it said last."""
        if not self._namespace or time.monotonic() - self._foreign_at < _FOREIGN_S:
            return
        self._foreign_at = time.monotonic()
        parts = self._parts
        try:
            names = await Namespaces(parts.remote, parts.keys, newline=False).list()
            exports = await Catalogs(parts.remote, parts.keys).read([name for name in names if name != self._namespace])
        except SwampfsError as error:
            log.info("catalogs of other namespaces could not be read: %s", error.line())
            return
        threads = parts.remote.threads
        for name in await threads.read(Lane.ARTIFACTS, artifacts.namespaces) - {self._namespace, *names}:
            await threads.write(Lane.ARTIFACTS, artifacts.import_rows, name, ())
        for name, rows in exports:
            found = [one for row in rows if (one := metadata.of_export(name, row)) is not None]
            await threads.write(Lane.ARTIFACTS, artifacts.import_rows, name, found)


def _is_whole(entry: IndexEntry, body: bytes) -> bool:
    return len(body) == entry.size and entry.sha256 in (None, sha256(body).hexdigest())


def _name_of(path: str) -> str:
    """Directory of the name that a touched file tells something of; ``""`` if it can be none's."""
    above, _, name = path.rpartition("/")
    if name == _MARKER:
        return above if metadata.path_of(f"{above}/1") is not None else ""
    return above.rpartition("/")[0] if metadata.path_of(above) is not None else ""


def _number(text: str) -> int | None:
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < _LONGEST_MARKER else None


def _slices(values: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (values[start : start + size] for start in range(0, len(values), size))
