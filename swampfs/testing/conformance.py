"""The conformance kit: is a third-party datastore what swamp's contract says (spec §10.8)?

Four assertions check the shape and the basic promises of single objects. :class:`DatastoreSuite` goes deeper: two
caches of one datastore as two machines, through restarts, lost work and races. All raise AssertionError with what is
wrong. They are plain functions and pytest classes; a trio loop is started where one is needed.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from swampfs.datastore.extensions import check_export
from swampfs.errors import LockTimeoutError, NamespaceError, SettingsError, SwampfsError
from swampfs.names import ModelRef
from swampfs.provider import (
    DatastoreHealthResult,
    DatastoreProvider,
    DatastoreSyncService,
    DatastoreVerifier,
    DistributedLock,
    LockOptions,
    SyncCapabilities,
    SyncContext,
)

T = TypeVar("T")

_SERVICE_CALLS = [
    "capabilities",
    "pull_changed",
    "push_changed",
    "mark_dirty",
    "hydrate_file",
    "prepare_push",
    "commit_push",
    "preview_push",
    "export_catalog",
    "pull_foreign_catalogs",
    "fetch_foreign_content",
    "migrate_monolith_to_shards",
    "repair_namespace_contamination",
    "control_plane_store",
]
_PROVIDER_CALLS = [
    "create_lock",
    "create_verifier",
    "create_sync_service",
    "resolve_datastore_path",
    "resolve_cache_path",
    "register_namespace",
    "list_namespaces",
]
_MODEL = ModelRef("test/kind", "m-1")
_NAME = f"data/{_MODEL.type}/{_MODEL.id}/state"


def assert_datastore_export_conformance(
    export: object,
    *,
    valid_configs: Sequence[Mapping[str, Any]] = (),
    invalid_configs: Sequence[Mapping[str, Any]] = (),
) -> None:
    """The exported object has its fields, and its schema accepts and refuses what it should. No network."""
    checked = check_export(export)
    for config in valid_configs:
        checked.config_schema.model_validate(config)
        provider = checked.create_provider(config)
        _assert_calls(provider, _PROVIDER_CALLS, "the provider")
        lock = provider.create_lock("/datastore", LockOptions())
        _assert_calls(lock, ["acquire", "release", "with_lock", "inspect", "force_release"], "the lock")
        _assert_calls(provider.create_verifier(), ["verify"], "the verifier")
    for config in invalid_configs:
        try:
            checked.create_provider(config)
        except (SettingsError, ValueError):
            continue
        raise AssertionError(f"the invalid configuration {dict(config)} was accepted")


async def assert_lock_conformance(make_lock: Callable[[], DistributedLock]) -> None:
    """``make_lock`` makes a lock of one key, each time another holder's. Nobody holds it at the beginning."""
    lock = make_lock()
    assert await lock.inspect() is None, "nobody has acquired it yet"
    await lock.acquire()
    info = await make_lock().inspect()
    assert info is not None, "a held lock is not seen"
    assert info.holder, "the holder has no name"
    assert info.pid > 0, "the holder has no pid"
    assert info.acquired_at.endswith("Z"), "acquiredAt is not a UTC time"
    assert info.ttl_ms > 0, "there is no TTL"
    assert isinstance(info.nonce, str) and info.nonce, "there is no nonce"
    assert await make_lock().force_release("not-the-nonce") is False, "released with a wrong nonce"
    assert await make_lock().inspect() == info, "a wrong nonce changed the lock"
    await lock.release()
    assert await make_lock().inspect() is None, "released, and still held"
    await lock.release()  # harmless
    assert await lock.with_lock(partial(_answer, 42)) == 42, "with_lock does not return what its function returned"
    try:
        await lock.with_lock(_fail)
    except _ProbeError:
        assert await make_lock().inspect() is None, "with_lock keeps the lock when its function fails"
    else:
        raise AssertionError("with_lock swallows the failure of its function")
    await lock.acquire()
    held = await make_lock().inspect()
    assert held is not None
    assert held.nonce is not None
    assert held.nonce != info.nonce, "two acquisitions have the same nonce"
    assert await make_lock().force_release(held.nonce) is True, "the right nonce does not release"
    assert await make_lock().force_release(held.nonce) is False, "what is not held was released"
    assert await make_lock().inspect() is None
    successor = make_lock()
    await successor.acquire()
    await lock.release()
    assert await make_lock().inspect() is not None, "releasing a lost lock removed the successor's"
    await successor.release()


async def assert_verifier_conformance(verifier: DatastoreVerifier, *, expect_healthy: bool | None = None) -> None:
    """It answers, whatever the state of the datastore, and never raises."""
    result = await verifier.verify()
    assert isinstance(result, DatastoreHealthResult)
    assert isinstance(result.healthy, bool)
    assert result.message, "there is no message"
    assert result.latency_ms >= 0
    assert result.datastore_type, "it does not say which type it is"
    if expect_healthy is not None:
        assert result.healthy is expect_healthy, result.message


async def assert_sync_service_conformance(
    service: DatastoreSyncService,
    *,
    expect_scoped_sync: bool | None = None,
    expect_lazy_hydration: bool | None = None,
) -> None:
    """Its calls exist, its capabilities are flags, and on an empty cache and datastore nothing is to be done."""
    _assert_calls(service, _SERVICE_CALLS, "the sync service")
    found = service.capabilities()
    assert isinstance(found, SyncCapabilities)
    for name, flag in zip(found._fields, found, strict=True):
        assert isinstance(flag, bool), f"the capability {name} is {flag!r}"
    if expect_scoped_sync is not None:
        assert found.scoped_sync is expect_scoped_sync
    if expect_lazy_hydration is not None:
        assert found.lazy_hydration is expect_lazy_hydration
    assert await service.pull_changed() in (0, None)
    assert await service.push_changed() in (0, None)


class _ProbeError(Exception):
    pass


async def _fail() -> None:
    raise _ProbeError


async def _answer(value: T) -> T:
    return value


def _assert_calls(found: object, names: Sequence[str], what: str) -> None:
    missing = [name for name in names if not callable(getattr(found, name, None))]
    assert not missing, f"{what} has no {', '.join(missing)}"


class Machine:
    """One cache of the datastore under test, with a service that can be started anew like a new process."""

    def __init__(self, provider: DatastoreProvider, directory: Path) -> None:
        self._provider = provider
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.service = provider.create_sync_service(str(directory.parent), str(directory))

    def restart(self) -> None:
        self.service = self._provider.create_sync_service(str(self.directory.parent), str(self.directory))

    def do(self, call: str, *args: Any, **options: Any) -> Any:
        """One call of the contract, on a loop of its own."""
        return trio.run(partial(getattr(self.service, call), *args, **options))

    def write(self, rel: str, body: bytes) -> None:
        """As swamp does: mark first, then write."""
        self.do("mark_dirty", rel_path=rel)
        path = self.directory / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)

    def delete(self, rel: str) -> None:
        self.do("mark_dirty", rel_path=rel)
        path = self.directory / rel
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def read(self, rel: str) -> bytes | None:
        path = self.directory / rel
        return path.read_bytes() if path.is_file() else None

    def files(self) -> set[str]:
        """Content files, without the sync layer's own."""
        found = (path.relative_to(self.directory) for path in self.directory.rglob("*") if path.is_file())
        return {str(path) for path in found if path.parts[0] != "_index" and not path.name.startswith(".datastore-")}


class DatastoreSuite:
    """Obligations of a whole datastore. Subclass it as ``Test…`` with a fixture ``make_provider``.

    The fixture gives a function; each call makes a provider of the same, initially empty, datastore.
    """

    @pytest.fixture
    def machines(self, make_provider: Callable[[], DatastoreProvider], tmp_path: Path) -> tuple[Machine, Machine]:
        return Machine(make_provider(), tmp_path / "one"), Machine(make_provider(), tmp_path / "two")

    def _published(self, machine: Machine) -> None:
        machine.do("mark_dirty", rel_path=_NAME)
        for rel, body in ((f"{_NAME}/1/raw", b"one"), (f"{_NAME}/1/metadata.yaml", b"v: 1"), (f"{_NAME}/latest", b"1")):
            path = machine.directory / rel
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        assert machine.do("push_changed") == 3

    def test_the_parts_conform(self, make_provider: Callable[[], DatastoreProvider], tmp_path: Path) -> None:
        provider = make_provider()
        service = provider.create_sync_service(str(tmp_path), str(tmp_path / "cache"))
        trio.run(assert_sync_service_conformance, service)
        trio.run(assert_verifier_conformance, provider.create_verifier())
        options = LockOptions(lock_key="data/test/kind/m-1/.lock")
        trio.run(assert_lock_conformance, lambda: make_provider().create_lock(str(tmp_path), options))

    def test_a_second_holder_waits_and_is_told_whom_for(self, make_provider: Callable[[], DatastoreProvider]) -> None:
        async def contend() -> None:
            first = make_provider().create_lock("/d")
            second = make_provider().create_lock("/d", LockOptions(max_wait_ms=300, retry_interval_ms=50))
            await first.acquire()
            with pytest.raises(LockTimeoutError) as refusal:
                await second.acquire()
            info = await first.inspect()
            assert info is not None
            assert info.holder in str(refusal.value)
            await first.release()
            await second.acquire()
            await second.release()

        trio.run(contend)

    def test_what_one_publishes_the_other_gets(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        assert two.do("pull_changed") == 3
        assert two.files() == {f"{_NAME}/1/raw", f"{_NAME}/1/metadata.yaml", f"{_NAME}/latest"}
        assert two.read(f"{_NAME}/1/raw") == b"one"
        assert (two.do("pull_changed"), two.do("push_changed"), one.do("push_changed")) == (0, 0, 0)

    def test_content_of_the_same_size_is_not_missed(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        one.write(f"{_NAME}/latest", b"2")
        assert one.do("push_changed") == 1
        assert two.do("pull_changed") == 1
        assert two.read(f"{_NAME}/latest") == b"2"

    def test_marks_and_work_survive_a_restart(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        one.write(f"{_NAME}/1/raw", b"one")
        one.restart()
        assert one.do("push_changed") == 1
        one.restart()
        assert one.do("push_changed") == 0
        two.restart()
        assert two.do("pull_changed") == 1

    def test_a_mark_comes_before_the_file_and_asks_for_nothing(self, machines: tuple[Machine, Machine]) -> None:
        one, _ = machines
        one.do("mark_dirty", rel_path=f"{_NAME}/never/raw")
        one.do("mark_dirty", rel_path=f"{_NAME}/never/raw")
        assert not (one.directory / "data").exists()
        assert one.do("push_changed") == 0

    def test_a_marked_path_that_is_gone_is_deleted_there(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        one.delete(f"{_NAME}/1")
        assert one.do("push_changed") == 2
        two.do("pull_changed")
        assert two.files() == {f"{_NAME}/latest"}
        assert two.do("push_changed") == 0
        one.do("pull_changed")
        assert one.files() == {f"{_NAME}/latest"}, "what was deleted came back"

    def test_absence_without_a_mark_deletes_nothing(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        shutil.rmtree(one.directory / _NAME / "1")
        one.do("mark_dirty")
        one.do("push_changed")
        assert two.do("pull_changed") == 3

    def test_a_lazy_pull_leaves_content_out_and_absence_means_nothing(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        assert two.do("pull_changed", metadata_only=True) == 2
        assert two.read(f"{_NAME}/1/raw") is None
        two.restart()
        two.write(f"{_NAME}/latest", b"7")
        assert two.do("push_changed") == 1
        two.restart()
        assert two.do("pull_changed") == 1, "a full pull after a lazy one brings the content"
        assert two.read(f"{_NAME}/1/raw") == b"one"

    def test_hydrating_is_atomic_and_truthful(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed", metadata_only=True)
        assert two.do("hydrate_file", f"{_NAME}/1/raw") is True
        assert two.read(f"{_NAME}/1/raw") == b"one"
        assert two.do("hydrate_file", f"{_NAME}/9/raw") is False
        assert not (two.directory / _NAME / "9" / "raw").exists()
        with pytest.raises(SwampfsError):
            two.do("hydrate_file", "../outside")

    def test_a_pull_never_overwrites_unpushed_work(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        two.write(f"{_NAME}/1/raw", b"mine")
        two.write(f"{_NAME}/2/raw", b"new")
        one.write(f"{_NAME}/1/metadata.yaml", b"v: 1, again")
        one.do("push_changed")
        two.restart()
        two.do("pull_changed")
        assert (two.read(f"{_NAME}/1/raw"), two.read(f"{_NAME}/2/raw")) == (b"mine", b"new")
        assert two.do("push_changed") == 2
        one.do("pull_changed")
        assert one.read(f"{_NAME}/2/raw") == b"new"

    def test_two_writers_both_keep_their_files(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        one.write(f"{_NAME}/2/raw", b"from one")
        two.write(f"{_NAME}/3/raw", b"from two")
        first, second = one.do("prepare_push"), two.do("prepare_push")
        assert (two.do("commit_push", second), one.do("commit_push", first)) == (1, 1)
        for machine in machines:
            machine.do("pull_changed")
            assert machine.read(f"{_NAME}/2/raw") == b"from one"
            assert machine.read(f"{_NAME}/3/raw") == b"from two"

    def test_preparing_publishes_nothing(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        one.write(f"{_NAME}/2/raw", b"two")
        preview = one.do("preview_push")
        assert (preview.total, preview.new, preview.changed, preview.deleted) == (1, 1, 0, 0)
        if not one.service.capabilities().two_phase_sync:
            # There, preparing is publishing; what else a preview promises was shown above.
            pytest.skip("a datastore whose objects are their own index")
        manifest = one.do("prepare_push")
        assert (manifest.pushed, manifest.deleted) == (1, 0)
        assert two.do("pull_changed") == 0
        assert one.do("commit_push", manifest) == 1
        assert two.do("pull_changed") == 1
        assert one.do("push_changed") == 0

    def test_a_scoped_pull_brings_a_model_whole_and_nothing_else(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        one.write("data/test/kind/m-2/state/1/raw", b"other")
        one.do("push_changed")
        assert two.do("pull_changed", context=SyncContext((_MODEL,))) == 3
        assert two.read(f"{_NAME}/latest") == b"1"
        assert two.do("pull_changed") == 1

    def test_shards_carry_on_where_the_monolith_ends(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        self._published(one)
        two.do("pull_changed")
        if one.service.capabilities().two_phase_sync:
            shards = one.do("migrate_monolith_to_shards")
            assert (shards.version, list(shards.partitions)) == (2, sorted(shards.partitions))
        one.write(f"{_NAME}/2/raw", b"two")
        assert one.do("push_changed") == 1
        assert two.do("pull_changed") == 1

    def test_namespaces_do_not_see_each_other(
        self, make_provider: Callable[[], DatastoreProvider], machines: tuple[Machine, Machine]
    ) -> None:
        one, two = machines
        provider = make_provider()
        trio.run(provider.register_namespace, "infra", "repo-1")
        trio.run(provider.register_namespace, "infra", "repo-1")
        with pytest.raises(NamespaceError, match="repo-1"):
            trio.run(provider.register_namespace, "infra", "repo-2")
        assert trio.run(provider.list_namespaces) == ["infra"]
        one.write(f"infra/{_NAME}/latest", b"1")
        assert one.do("push_changed", namespace="infra") == 1
        assert two.do("pull_changed", namespace="security") == 0
        with pytest.raises(NamespaceError):
            two.do("pull_changed", namespace="infra")
        two.restart()
        assert two.do("pull_changed", namespace="infra") == 1
        assert two.read(f"infra/{_NAME}/latest") == b"1"
        assert two.do("fetch_foreign_content", "infra", f"{_NAME}/latest") == b"1"

    def test_control_records(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines

        async def use() -> None:
            mine, theirs = one.service.control_plane_store(), two.service.control_plane_store()
            assert await mine.get("a/x") is None
            await mine.put("a/x", b"1")
            assert await theirs.get("a/x") == b"1"
            assert await theirs.put_if_absent("a/x", b"2") is False
            assert await theirs.put_if_absent("a/y", b"2") is True
            assert sorted(await mine.list("a/")) == ["a/x", "a/y"]
            await mine.delete("a/x")
            await mine.delete("a/x")
            assert await theirs.put_if_absent("a/x", b"3") is True

        trio.run(use)
        assert two.do("pull_changed") == 0, "records are not files"

    def test_catalogs_of_others_can_be_read(self, machines: tuple[Machine, Machine]) -> None:
        one, two = machines
        rows = [{"relPath": f"{_NAME}/1/raw", "size": 3, "lastModified": "2026-08-03T09:14:22.401Z"}]
        one.do("export_catalog", "infra", rows)
        found = two.do("pull_foreign_catalogs", ["none", "infra"])
        assert [(catalog.namespace, catalog.rows) for catalog in found] == [("infra", rows)]
