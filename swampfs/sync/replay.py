"""Making catalog, journal and files agree after a crash, before the mount serves (idempotent).

The journal is the truth about changes, the files are the truth about bytes, the catalog follows. What the journal
does not explain is kept and pushed, never dropped: doubt means the safe path (architecture rule 9).
"""

from __future__ import annotations

import logging

from swampfs.names import RelPath, is_scratch
from swampfs.records import DirtyPath, Kind, Node, Op, Residency
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import FILE_MODE, Catalog
from swampfs.state.journal import Journal
from swampfs.state.sidecar import Sidecar
from swampfs.sync.hydrate import hash_file

log = logging.getLogger(__name__)


def replay(catalog: Catalog, cache: CacheDir, journal: Journal, sidecar: Sidecar) -> int:
    """Redo what a dead process had begun; returns how many changes are still to be pushed.

    Run after the first poll of a rebuilt catalog, so that clean files have their entries.
    """
    for intent in journal.intents():
        cache.rename(intent.source, intent.target)
        _finish_rename(catalog, intent.source, intent.target)
        journal.settle(intent)
    for path in list(journal):
        record = journal.get(path)
        if record is not None:
            _redo(catalog, cache, journal, record)
    for path in catalog.dirty_files():
        _explain(catalog, cache, journal, path)
    if catalog.rebuilt:
        # Whether a file that differs from the index was changed here is for the journal to say; if that is gone too,
        # for the sidecar.
        _walk(catalog, cache, journal, changes_possible=journal.lost and sidecar.dirty)
    return len(journal)


def _finish_rename(catalog: Catalog, source: RelPath, target: RelPath) -> None:
    node = catalog.at(source)
    if node is None:
        return
    with catalog.transaction():
        over = catalog.at(target)
        if over is not None:
            catalog.remove(over)
        catalog.make_parents(target)
        catalog.move(node, target)
        catalog.unpublish(target)


def _redo(catalog: Catalog, cache: CacheDir, journal: Journal, record: DirtyPath) -> None:
    node = catalog.at(record.path)
    if record.op is Op.DELETE:
        if node is None or not node.is_dir:  # else the name is a directory's by now
            cache.remove(record.path)
            if node is not None and not node.is_special:  # or a pipe's
                catalog.remove(node, by_user=True)
    elif record.op is Op.WRITE:
        _redo_write(catalog, cache, journal, record, node)
    elif node is None:
        journal.forget(record.path)


def _redo_write(catalog: Catalog, cache: CacheDir, journal: Journal, record: DirtyPath, node: Node | None) -> None:
    if node is not None and node.target is not None:
        cache.write(record.path, node.target.encode())
        cache.retime(record.path, node.mtime_ns)
    stat = cache.stat(record.path)
    if stat is None and journal.was_deleted(record.path):
        # Removed, then about to be made again: the removal was acknowledged, the new file was not.
        journal.mark_delete(record.path, record.base, record.partition)
        if node is not None and not node.is_dir:
            catalog.remove(node)
        return
    if stat is None:
        # Announced, then never begun: an announcement alone changes nothing.
        journal.forget(record.path)
        if node is not None and node.residency is Residency.DIRTY:
            if record.base is None:
                catalog.remove(node)
            else:
                # Perhaps a conflict was being set aside: the partition knows what the remote has now.
                catalog.reset_to_remote(node, record.base, record.partition or "")
                catalog.read_again(record.partition or "")
        return
    with catalog.transaction():
        if node is None:
            cache.unshare(record.path)  # a link that was begun: the catalog knows of two files
            catalog.make_parents(record.path)
            node = catalog.add(record.path, Kind.FILE, mode=FILE_MODE)
            catalog.adopt_base(record.path, record.base, record.partition)
        catalog.set_content(node.ino, stat)


def _explain(catalog: Catalog, cache: CacheDir, journal: Journal, path: RelPath) -> None:
    """A dirty row without a record: scratch files have none; anything else is marked again."""
    if path in journal:
        return
    node, stat = catalog.at(path), cache.stat(path)
    assert node is not None
    if stat is None:
        catalog.reset_to_remote(node, node.base, node.partition or "")
        return
    catalog.set_content(node.ino, stat)
    if not is_scratch(path):
        journal.mark_write(path, node.base, node.partition)


def _walk(catalog: Catalog, cache: CacheDir, journal: Journal, *, changes_possible: bool) -> None:
    """The catalog was lost: find out which local files are what the index says. Infers no deletes.

    A file that is not is either a leftover of an older remote version or a change whose record is lost. The first is
    dropped (it can be fetched); the second is marked as new content, so that a remote version that differs makes it a
    conflict, whose bytes are kept, and never an overwrite.
    """
    log.info("the catalog was rebuilt: comparing local files with the index")
    for path in list(cache.walk()):
        cache.unshare(path)
        node = catalog.at(path)
        if path in journal or (node is not None and node.is_dir):
            continue
        if node is not None and _is_clean(node, cache, path):
            catalog.set_residency(node.ino, Residency.CLEAN)
        elif is_scratch(path):
            # Never journaled and in no index: this file is all there is of it.
            _redo(catalog, cache, journal, DirtyPath(path, Op.WRITE, 0, None, None))
        elif not changes_possible:
            cache.remove(path)
        else:
            journal.mark_write(path, None, None)
            record = journal.get(path)
            assert record is not None
            _redo(catalog, cache, journal, record)


def _is_clean(node: Node, cache: CacheDir, path: RelPath) -> bool:
    stat = cache.stat(path)
    if node.base is None or stat is None or stat.st_size != node.base.size:
        return False
    if node.base.sha256 is None:
        return stat.st_mtime_ns == node.mtime_ns  # hydration stamps files with their entry's time
    return hash_file(cache.path(path)) == node.base.sha256
