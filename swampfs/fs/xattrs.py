"""``user.swamp.*``: what swampfs knows of a file, for ``getfattr`` (``--xattrs``; ``design/cli.md`` §3).

They are answers, not storage: none can be set, and a name that has nothing to say is not there.
"""

from __future__ import annotations

from collections.abc import Callable

from swampfs.fs.attributes import LOCAL_BASE
from swampfs.fs.inodes import Inodes
from swampfs.names import is_publishable, model_of, version_of
from swampfs.records import Kind, Node, Residency
from swampfs.sync.service import SyncService

PREFIX = "user.swamp."


class Xattrs:
    """``push_error``: why the last push failed, while it does."""

    def __init__(self, sync: SyncService, inodes: Inodes, push_error: Callable[[], str | None]) -> None:
        self._sync = sync
        self._inodes = inodes
        self._push_error = push_error

    def of(self, ino: int) -> dict[str, str]:
        """Name → value, in memory and from the catalog only.

        ``state`` is ``remote`` (content only in the datastore), ``clean`` (here too), ``dirty`` (changed here, not
        published yet) or ``private`` (never published). ``sha256`` is of the published content: a dirty file has none.
        """
        ino = self._inodes.resolve(ino)
        if ino >= LOCAL_BASE:
            return {f"{PREFIX}state": "private"}
        node = self._sync.catalog.node(ino)
        if node is None or node.kind not in (Kind.FILE, Kind.DIRECTORY):
            return {}  # Linux lets nothing else have any
        found = self._of_place(node) | ({} if node.is_dir else self._of_content(node))
        return {PREFIX + name: value for name, value in found.items()}

    def _of_place(self, node: Node) -> dict[str, str]:
        place = f"{node.path}/" if node.is_dir else node.path
        model, version = model_of(place), version_of(place)
        return {name: str(value) for name, value in (("model", model), ("version", version)) if value is not None}

    def _of_content(self, node: Node) -> dict[str, str]:
        if not is_publishable(node.path):
            return {"state": "private"}
        if node.path in self._sync.journal or node.residency is Residency.DIRTY:
            found, error = {"state": "dirty"}, self._push_error()
        else:
            found = {"state": "remote" if node.residency is Residency.STUB else "clean"}
            error = self._sync.hydrator.failures.get(node.path)
            if node.base_sha256 is not None:
                found["sha256"] = node.base_sha256
        if error:
            found["error"] = error
        return found
