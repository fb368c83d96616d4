"""Making catalog, journal and files agree after a crash, before the mount serves (idempotent).

The journal is the truth about changes, the files are the truth about bytes, the catalog follows. What the journal
does not explain is kept and pushed, never dropped: doubt means the safe path (architecture rule 9).
"""

from __future__ import annotations

import logging
import time

from swampfs.names import RelPath, is_scratch
from swampfs.records import DirtyPath, Kind, Node, Op, Residency, timestamp
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import FILE_MODE, Catalog
from swampfs.state.journal import Journal
from swampfs.state.sidecar import Sidecar
from swampfs.sync.hashing import hash_file

log = logging.getLogger(__name__)

_RECENT_NS = 15 * 60 * 1_000_000_000  # within which any system writes what it was given to its disk


def replay(catalog: Catalog, cache: CacheDir, journal: Journal, sidecar: Sidecar, *, machine_died: bool = False) -> int:
    """Redo what a dead process had begun; returns how many changes are still to be pushed.

    Run after the first poll of a rebuilt catalog, so that clean files have their entries. ``machine_died``: the page
    cache may have died with the process, so that content is not to be trusted for being there.
    """
    for intent in journal.intents():
        cache.rename(intent.source, intent.target)
        _finish_rename(catalog, intent.source, intent.target)
        journal.settle(intent)
    for path in list(journal):
        record = journal.get(path)
        if record is not None and not (machine_died and _set_torn_aside(catalog, cache, journal, record)):
            _redo(catalog, cache, journal, record)
    for path in catalog.dirty_files():
        node = catalog.at(path)
        assert node is not None
        unknown = machine_died and path not in journal and not is_scratch(path)
        found = DirtyPath(path, Op.WRITE, 0, node.base, node.partition)
        if not (unknown and _set_torn_aside(catalog, cache, journal, found)):
            _explain(catalog, cache, journal, path)
    if machine_died and not catalog.rebuilt:
        _sweep(catalog, cache, journal)
        _doubt_recent(catalog, cache)
    if catalog.rebuilt:
        # Whether a file that differs from the index was changed here is for the journal to say; if that is gone too,
        # for the sidecar.
        _walk(catalog, cache, journal, changes_possible=journal.lost and sidecar.dirty)
    return len(journal)


def _set_torn_aside(catalog: Catalog, cache: CacheDir, journal: Journal, record: DirtyPath) -> bool:
    """Content that a power cut may have cut short is kept as a conflict's is, and not published.

    It is whole if it was on the disk once since it was replaced; sizes and times reach the disk before bytes do.
    """
    stat, node = cache.stat(record.path), catalog.at(record.path)
    if record.op is not Op.WRITE or stat is None or journal.is_synced(record.path):
        return False
    if node is not None and node.target is not None:
        return False
    base = record.base
    if base is not None and stat.st_size == base.size and hash_file(cache.path(record.path)) == base.sha256:
        cache_is_base = True  # announced, and nothing of it reached the disk
    else:
        cache_is_base = False
        log.warning("%s was being written when this machine died: what is left of it is kept aside", record.path)
        report = {"path": record.path, "operation": "torn", "keptAt": timestamp(time.time_ns()), "remote": None}
        cache.set_conflict_aside(record.path, {**report, "base": base._asdict() if base else None})
    if journal.was_deleted(record.path):
        journal.mark_delete(record.path, base, record.partition)  # that was acknowledged before
        base = None
    else:
        journal.forget(record.path)
    if base is not None:
        catalog.read_again(record.partition or "")
        if node is not None:
            catalog.reset_to_remote(node, base, record.partition or "")
        if node is not None and cache_is_base:
            catalog.set_residency(node.ino, Residency.CLEAN)
    elif node is not None and not node.is_dir:
        catalog.remove(node)
    return True


def _sweep(catalog: Catalog, cache: CacheDir, journal: Journal) -> None:
    """Content of new files whose mark and row did not reach the disk: they were never acknowledged by an fsync.

    But for scratch files, which have no marks: what is there of them is all there is.
    """
    for path in list(cache.walk()):
        if path in journal or catalog.at(path) is not None:
            continue
        if is_scratch(path):
            _redo(catalog, cache, journal, DirtyPath(path, Op.WRITE, 0, None, None))
        else:
            cache.remove(path)


def _doubt_recent(catalog: Catalog, cache: CacheDir) -> None:
    """Clean content that came shortly before a power cut: its size and time may have reached the disk without it."""
    found = [(node, cache.stat(node.path)) for node in catalog.clean_files()]
    recent_ns = max((stat.st_ctime_ns for _, stat in found if stat is not None), default=0) - _RECENT_NS
    for node, stat in found:
        if stat is None or (stat.st_ctime_ns < recent_ns and stat.st_mtime_ns == node.mtime_ns):
            continue
        if node.base is None or node.base_sha256 is None or hash_file(cache.path(node.path)) != node.base_sha256:
            log.info("%s came shortly before this machine died, and not all of it: it will be fetched again", node.path)
            cache.remove(node.path)
            catalog.evicted(node.ino)


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
    if node is not None:
        _rewrite_link(cache, node)
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


def _rewrite_link(cache: CacheDir, node: Node) -> None:
    """The content of a symbolic link is what the catalog says."""
    if node.target is not None:
        cache.write(node.path, node.target.encode())
        cache.retime(node.path, node.mtime_ns)


def _explain(catalog: Catalog, cache: CacheDir, journal: Journal, path: RelPath) -> None:
    """A dirty row without a record: scratch files have none; anything else is marked again."""
    if path in journal:
        return
    node = catalog.at(path)
    assert node is not None
    _rewrite_link(cache, node)
    stat = cache.stat(path)
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
