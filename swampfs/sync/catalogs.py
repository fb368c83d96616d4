"""Catalog exports of namespaces, and reading what belongs to another one (spec §1.9, §8.3–8.5)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from swampfs.errors import AbsentError, HostileNameError, SettingsError
from swampfs.names import Keyspace, check_namespace, rel_path
from swampfs.provider import ForeignCatalog
from swampfs.sync.remote import Remote

EXPORT = ".catalog-export.json"


def encode_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False, separators=(",", ":")).encode()


class Catalogs:
    """Exports of every namespace of a datastore."""

    def __init__(self, remote: Remote, keys: Keyspace) -> None:
        self._remote = remote
        self._keys = keys._replace(namespace="")

    def _key(self, namespace: str, rel: str) -> str:
        return self._keys.key(f"{namespace}/{rel}" if namespace else rel)

    async def write(self, namespace: str, body: bytes) -> None:
        if namespace:
            check_namespace(namespace)
        await self._remote.put(self._key(namespace, EXPORT), body)

    async def read(self, namespaces: Sequence[str]) -> list[ForeignCatalog]:
        """In the order asked for. A missing or malformed export is left out; a store that fails is an error."""
        found = []
        for namespace in namespaces:
            check_namespace(namespace)
            try:
                blob = await self._remote.get(self._key(namespace, EXPORT))
            except AbsentError:
                continue
            rows = _rows(blob.body if blob is not None else b"")
            if rows is not None:
                found.append(ForeignCatalog(namespace, rows))
        return found

    async def content(self, namespace: str, rel: str) -> bytes | None:
        """A file of another namespace; ``None`` if it does not exist. Nothing is written here.

        Raises HostileNameError for a path that leaves the namespace.
        """
        try:
            check_namespace(namespace)
            key = self._key(namespace, rel_path(rel))
        except (HostileNameError, SettingsError):
            raise HostileNameError(f"Path traversal rejected: {namespace}/{rel}") from None
        try:
            blob = await self._remote.get(key)
        except AbsentError:
            return None
        return blob.body if blob is not None else None


def _rows(body: bytes) -> list[Any] | None:
    try:
        rows = msgspec.json.decode(body)
    except (ValueError, RecursionError):
        return None
    return rows if isinstance(rows, list) else None
