"""Namespace manifests, and objects of one namespace that ended up inside another (spec §1.7, §8.6)."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import msgspec

from swampfs.errors import AbsentError, AccessDeniedError, NamespaceError, PreconditionError
from swampfs.names import NAMESPACE_MANIFEST, SYNCED_DIRECTORIES, Keyspace, check_namespace, is_namespace
from swampfs.provider import ABSENT, NamespaceManifest, matching
from swampfs.records import timestamp
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote

_AT_ONCE = 8


def encode_manifest(manifest: NamespaceManifest) -> bytes:
    """Pretty JSON without a trailing newline; directories and local mirrors add one (spec §1.7)."""
    fields = {
        "namespace": manifest.namespace,
        "repoId": manifest.repo_id,
        "registeredAt": manifest.registered_at,
    }
    return json.dumps(fields, indent=2, ensure_ascii=False).encode()


def decode_manifest(body: bytes, namespace: str) -> NamespaceManifest:
    """Tolerant of unknown fields; an unreadable manifest has no known owner."""
    try:
        raw: Any = msgspec.json.decode(body)
        owner = raw["repoId"]
        return NamespaceManifest(namespace, owner if isinstance(owner, str) else "", str(raw.get("registeredAt", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return NamespaceManifest(namespace, "", "")


class Namespaces:
    """The registry of one datastore: one manifest object per namespace."""

    def __init__(self, remote: Remote, keys: Keyspace, *, newline: bool) -> None:
        self._remote = remote
        self._keys = keys._replace(namespace="")
        self._newline = newline

    async def register(self, namespace: str, repo_id: str) -> NamespaceManifest:
        """First come, first served; the owner may register again.

        Raises NamespaceError naming the owner, SettingsError for a name that is no slug.
        """
        check_namespace(namespace)
        manifest = NamespaceManifest(namespace, repo_id, timestamp(time.time_ns()))
        body = encode_manifest(manifest) + (b"\n" if self._newline else b"")
        key = self._keys.key(f"{namespace}/{NAMESPACE_MANIFEST}")
        try:
            await self._remote.put(key, body, ABSENT)
        except PreconditionError:
            blob = await self._remote.get(key)
            assert blob is not None
            owner = decode_manifest(blob.body, namespace)
            if not owner.repo_id:
                raise NamespaceError(
                    f'Namespace "{namespace}" is registered, but {key} cannot be read',
                    remedy="see whose it is, and delete or repair that object",
                ) from None
            if owner.repo_id != repo_id:
                raise NamespaceError(
                    f'Namespace "{namespace}" is already registered by repo {owner.repo_id}',
                    remedy="choose another name, or set this repository's repoId to that one",
                ) from None
            await self._remote.put(key, body, matching(blob.info.etag))
        return manifest

    async def manifests(self) -> list[NamespaceManifest]:
        """Of all registered namespaces."""
        return [await self._manifest(name) for name in await self.list()]

    async def _manifest(self, name: str) -> NamespaceManifest:
        try:
            blob = await self._remote.get(self._keys.key(f"{name}/{NAMESPACE_MANIFEST}"))
        except AccessDeniedError:
            return NamespaceManifest(name, "", "")
        assert blob is not None
        return decode_manifest(blob.body, name)

    async def list(self) -> list[str]:
        """Valid slugs that have a manifest, ascending, or one that we may not read.

        One listing of the root, and a look at each that may be one.
        """
        names = [name for name in await self._remote.directories(self._keys.data("")) if is_namespace(name)]
        registered: set[str] = set()

        async def look(name: str) -> None:
            try:
                await self._remote.head(self._keys.key(f"{name}/{NAMESPACE_MANIFEST}"))
            except AbsentError:
                return
            except AccessDeniedError:
                pass
            registered.add(name)

        errors = await for_each(names, look, at_once=_AT_ONCE)
        if errors:
            raise errors[0]
        return sorted(registered)


async def foreign_objects(remote: Remote, keys: Keyspace) -> tuple[Counter[str], list[str]]:
    """Objects ``{ns}/{known}/…`` where ``known`` is a namespace: how many of each, and their keys."""
    solo = keys._replace(namespace="")
    listed = [info.key for info in await remote.list(solo.data(""))]
    rels = [key[len(solo.data("")) :] for key in listed]
    inside = f"{keys.namespace}/"
    known = set()
    for rel in rels:
        head, slash, rest = rel.removeprefix(inside).partition("/")
        if slash and rest == NAMESPACE_MANIFEST and head != keys.namespace:
            known.add(head)
    known -= SYNCED_DIRECTORIES  # whatever manifest may lie there: these are everybody's own data
    count: Counter[str] = Counter()
    found = []
    for rel in rels:
        if rel.startswith(inside):
            head, slash, _ = rel.removeprefix(inside).partition("/")
            if slash and head in known:
                count[head] += 1
                found.append(solo.data(rel))
    return count, found
