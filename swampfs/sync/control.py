"""Control-plane records: small bodies beside the data that bypass index and cache (spec §1.10)."""

from __future__ import annotations

from swampfs.errors import AbsentError, HostileNameError, PreconditionError
from swampfs.names import Keyspace
from swampfs.provider import ABSENT
from swampfs.sync.remote import Remote

_TOP = "_control/"


class ControlRecords:
    """:class:`~swampfs.provider.ControlPlaneStore` of one namespace: one consistent prefix from its making on."""

    def __init__(self, remote: Remote, keys: Keyspace) -> None:
        self._remote = remote
        self._keys = keys

    def _key(self, key: str) -> str:
        if key.startswith("/") or ".." in key.split("/") or "\0" in key:
            raise HostileNameError(f"{key!r} cannot be the key of a control record")
        return self._keys.data(_TOP + key)

    async def put(self, key: str, body: bytes) -> None:
        await self._remote.put(self._key(key), body)

    async def get(self, key: str) -> bytes | None:
        try:
            blob = await self._remote.get(self._key(key))
        except AbsentError:
            return None
        return blob.body if blob is not None else None

    async def delete(self, key: str) -> None:
        await self._remote.delete(self._key(key))

    async def list(self, prefix: str) -> list[str]:
        root = self._keys.data(_TOP)
        return [info.key[len(root) :] for info in await self._remote.list(self._key(prefix))]

    async def put_if_absent(self, key: str, body: bytes) -> bool:
        """A retried attempt may be refused for its own earlier success: then the record holds our bytes (§10.1)."""
        try:
            await self._remote.put(self._key(key), body, ABSENT)
        except PreconditionError as error:
            return error.retried and await self.get(key) == body
        return True
