"""The kit can fail: every obligation of the store port, broken one at a time, is noticed."""

from __future__ import annotations

import inspect
import itertools
from pathlib import Path

import pytest
import trio

from swampfs.datastore import FILESYSTEM, GCS, S3, ObjectStoreProvider
from swampfs.errors import AbsentError, StoreError
from swampfs.provider import ABSENT, ALWAYS, Blob, DatastoreHealthResult, SyncCapabilities
from swampfs.testing.conformance import (
    DatastoreSuite,
    assert_datastore_export_conformance,
    assert_lock_conformance,
    assert_sync_service_conformance,
    assert_verifier_conformance,
)
from swampfs.testing.memory import MemoryStore
from swampfs.testing.stores import ObjectStoreSuite


class IgnoresAbsent(MemoryStore):
    def put(self, key, body, when=ALWAYS):
        return super().put(key, body, ALWAYS if when.absent else when)


class IgnoresEtagOnPut(MemoryStore):
    def put(self, key, body, when=ALWAYS):
        return super().put(key, body, ALWAYS if when.etag else when)


class CreatesWithAnEtag(MemoryStore):
    def put(self, key, body, when=ALWAYS):
        return super().put(key, body, when if key in self.objects else ABSENT if when.absent else ALWAYS)


class IgnoresEtagOnDelete(MemoryStore):
    def delete(self, key, when=ALWAYS):
        super().delete(key)


class DeletesNothing(MemoryStore):
    def delete(self, key, when=ALWAYS):
        self._demand(key, when)


class MissesMissingOnDelete(MemoryStore):
    def delete(self, key, when=ALWAYS):
        self._found(key)
        super().delete(key, when)


class ForgetsUnless(MemoryStore):
    def get(self, key, *, unless=""):
        return super().get(key)


class AlwaysUnchanged(MemoryStore):
    def get(self, key, *, unless=""):
        return None if unless else super().get(key)


class TruncatesBodies(MemoryStore):
    def get(self, key, *, unless=""):
        blob = super().get(key, unless=unless)
        return blob and Blob(blob.body[:4], blob.info)


class TruncatesDownloads(MemoryStore):
    def download(self, key, target):
        info = super().download(key, target)
        Path(target).write_bytes(Path(target).read_bytes()[:1000])
        return info


class AppendsDownloads(MemoryStore):
    def download(self, key, target):
        old = Path(target).read_bytes() if Path(target).exists() else b""
        info = super().download(key, target)
        Path(target).write_bytes(old + Path(target).read_bytes())
        return info


class PartsOfAnyVersion(MemoryStore):
    def part(self, key, offset, size, *, etag="", take=None):
        return super().part(key, offset, size, take=take)


class PartsAreTheWhole(MemoryStore):
    def part(self, key, offset, size, *, etag="", take=None):
        return super().part(key, 0, 1 << 30, etag=etag, take=take)


class PartsAreNotGiven(MemoryStore):
    def part(self, key, offset, size, *, etag="", take=None):
        return super().part(key, offset, size, etag=etag)


class PartsAreGivenFromZero(MemoryStore):
    def part(self, key, offset, size, *, etag="", take=None):
        return super().part(key, offset, size, etag=etag).given(0, take)


class InventsAbsent(MemoryStore):
    def get(self, key, *, unless=""):
        try:
            return super().get(key, unless=unless)
        except AbsentError:
            return Blob(b"", self.put(key, b""))


class CallsAbsenceAnError(MemoryStore):
    def head(self, key):
        try:
            return super().head(key)
        except AbsentError as error:
            raise StoreError(str(error)) from None


class WrongSize(MemoryStore):
    def head(self, key):
        return super().head(key)._replace(size=1)


class WrongEtag(MemoryStore):
    def head(self, key):
        return super().head(key)._replace(etag="constant")


class NoTimes(MemoryStore):
    def head(self, key):
        return super().head(key)._replace(last_modified="yesterday")


class FirstPageOnly(MemoryStore):
    def list(self, prefix):
        return itertools.islice(super().list(prefix), 1000)


class UnorderedListing(MemoryStore):
    def list(self, prefix):
        return iter(sorted(super().list(prefix), key=lambda info: info.key, reverse=True))


class IgnoresPrefix(MemoryStore):
    def list(self, prefix):
        return super().list("")


class ListsWithoutEtags(MemoryStore):
    def list(self, prefix):
        return (info._replace(etag="") for info in super().list(prefix))


class ForgetsPaths(MemoryStore):
    def put(self, key, body, when=ALWAYS):
        return super().put(key, body.encode() if isinstance(body, str) else body, when)


class NormalisesKeys(MemoryStore):
    def put(self, key, body, when=ALWAYS):
        return super().put(key.replace(" ", "_"), body, when)


class NeverThere(MemoryStore):
    def verify(self):
        raise StoreError("nothing here")


class RacesOnCreate(MemoryStore):
    """Looks first, and writes after a while."""

    def put(self, key, body, when=ALWAYS):
        import time

        self._demand(key, when)
        time.sleep(0.02 if key.startswith("race/") else 0)
        return super().put(key, body)


MUTANTS = [
    IgnoresAbsent, IgnoresEtagOnPut, CreatesWithAnEtag, IgnoresEtagOnDelete, DeletesNothing, MissesMissingOnDelete,
    ForgetsUnless, AlwaysUnchanged, TruncatesBodies, TruncatesDownloads, AppendsDownloads, PartsOfAnyVersion,
    PartsAreTheWhole, PartsAreNotGiven, PartsAreGivenFromZero, InventsAbsent, CallsAbsenceAnError, WrongSize, WrongEtag,
    NoTimes, FirstPageOnly, UnorderedListing, IgnoresPrefix, ListsWithoutEtags, ForgetsPaths, NormalisesKeys,
    NeverThere, RacesOnCreate,
]  # fmt: skip


def failures(make_store, tmp_path: Path) -> list[str]:
    """Names of the suite's tests that a store fails."""
    found = []
    for name, test in inspect.getmembers(ObjectStoreSuite, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        more = {"tmp_path": place} if "tmp_path" in inspect.signature(test).parameters else {}
        try:
            test(ObjectStoreSuite(), store=make_store(), **more)
        except (AssertionError, StoreError, pytest.fail.Exception):
            found.append(name)
    return found


def test_the_store_in_memory_fails_nothing(tmp_path):
    assert failures(MemoryStore, tmp_path) == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_breaking_one_obligation_of_the_store_is_noticed(mutant, tmp_path):
    assert failures(mutant, tmp_path) != []


# --- whole datastores --------------------------------------------------------------------------------------


def suite_failures(make_service, tmp_path: Path, *names: str) -> list[str]:
    found = []
    for name in names:
        store = MemoryStore()

        class Mutated(ObjectStoreProvider):
            def create_sync_service(self, repo_dir, cache_path):
                return make_service(super().create_sync_service(repo_dir, cache_path))

        suite = DatastoreSuite()
        make = lambda store=store, kind=Mutated: kind(store, "@swampfs/memory", "memory")  # noqa: E731
        machines = DatastoreSuite.machines.__wrapped__(suite, make, tmp_path / name)
        given = {"machines": machines, "make_provider": make, "tmp_path": tmp_path}
        test = getattr(suite, name)
        try:
            test(**{key: given[key] for key in inspect.signature(test).parameters})
        except (AssertionError, StoreError, pytest.fail.Exception):
            found.append(name)
    return found


def _mutant(call: str, replacement):
    def mutate(service):
        real = getattr(service, call)

        async def instead(*args, **options):
            return await replacement(real, *args, **options)

        setattr(service, call, instead)
        return service

    return mutate


async def _nothing(real, *args, **options):
    return 0


async def _full(real, *args, **options):
    options.pop("metadata_only", None)
    return await real(*args, **options)


async def _unscoped(real, *args, **options):
    options.pop("context", None)
    return await real(*args, **options)


async def _true(real, *args, **options):
    return True


@pytest.mark.parametrize(
    ("call", "replacement", "test"),
    [
        ("mark_dirty", _nothing, "test_a_marked_path_that_is_gone_is_deleted_there"),
        ("push_changed", _nothing, "test_what_one_publishes_the_other_gets"),
        ("pull_changed", _nothing, "test_content_of_the_same_size_is_not_missed"),
        ("pull_changed", _full, "test_a_lazy_pull_leaves_content_out_and_absence_means_nothing"),
        ("pull_changed", _unscoped, "test_a_scoped_pull_brings_a_model_whole_and_nothing_else"),
        ("hydrate_file", _true, "test_hydrating_is_atomic_and_truthful"),
        ("commit_push", _nothing, "test_two_writers_both_keep_their_files"),
        ("export_catalog", _nothing, "test_catalogs_of_others_can_be_read"),
    ],
)
def test_breaking_one_obligation_of_the_service_is_noticed(call, replacement, test, tmp_path):
    assert suite_failures(lambda service: service, tmp_path / "sound", test) == []
    assert suite_failures(_mutant(call, replacement), tmp_path / "mutant", test) == [test]


def test_a_lock_that_is_none_is_noticed():
    class Fake:
        async def acquire(self): ...

        async def release(self): ...

        async def with_lock(self, fn):
            return await fn()

        async def inspect(self):
            return None

        async def force_release(self, nonce):
            return True

    with pytest.raises(AssertionError, match="not seen"):
        trio.run(assert_lock_conformance, Fake)


def test_a_verifier_that_says_nothing_is_noticed():
    class Fake:
        async def verify(self):
            return DatastoreHealthResult(True, "", 0.0, "x")

    with pytest.raises(AssertionError, match="no message"):
        trio.run(assert_verifier_conformance, Fake())


def test_a_service_without_a_call_or_with_odd_capabilities_is_noticed(tmp_path):
    service = ObjectStoreProvider(MemoryStore(), "@swampfs/memory", "m").create_sync_service("/", str(tmp_path))
    trio.run(lambda: assert_sync_service_conformance(service, expect_scoped_sync=True, expect_lazy_hydration=True))
    with pytest.raises(AssertionError):
        trio.run(lambda: assert_sync_service_conformance(service, expect_scoped_sync=False))
    service.capabilities = lambda: SyncCapabilities(scoped_sync="yes")
    with pytest.raises(AssertionError, match="'yes'"):
        trio.run(assert_sync_service_conformance, service)
    service.hydrate_file = None
    with pytest.raises(AssertionError, match="hydrate_file"):
        trio.run(assert_sync_service_conformance, service)


def test_the_built_in_types_have_the_documented_configuration(monkeypatch):
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    assert S3.config_schema(bucket="bucket").model_dump(by_alias=True) == {
        "bucket": "bucket", "prefix": "", "region": None, "endpoint": None, "forcePathStyle": None,
        "pullConcurrency": 50, "pushConcurrency": 25, "requestTimeoutMs": 30000,
    }  # fmt: skip
    full = {"bucket": "bucket", "prefix": "a/", "endpoint": "http://127.0.0.1:9", "forcePathStyle": True,
            "region": "eu-west-1", "pullConcurrency": 1, "pushConcurrency": 1000, "requestTimeoutMs": 1000}  # fmt: skip
    bad = [{}, {"bucket": "X"}, {"bucket": "bucket", "pullConcurrency": 0},
           {"bucket": "bucket", "pushConcurrency": 1001}, {"bucket": "bucket", "requestTimeoutMs": 999},
           {"bucket": "bucket", "endpoint": "ftp://x"},
           {"bucket": "bucket", "forcePathStyle": "yes"}, {"bucket": "under_score"}]  # fmt: skip
    for kind, good in ((S3, full), (GCS, {"bucket": "under_score", "apiEndpoint": "http://127.0.0.1:9"})):
        kind = kind._replace(type="@acme/" + kind.type.split("/")[1])  # noqa: PLW2901 — the reserved collective is ours
        assert_datastore_export_conformance(
            kind, valid_configs=[good], invalid_configs=bad if kind.config_schema is S3.config_schema else bad[:4]
        )
    for name in ("goog-bucket", "my-google-bucket"):
        with pytest.raises(ValueError, match="bucket name"):
            GCS.config_schema(bucket=name)
    with pytest.raises(ValueError, match="path"):
        FILESYSTEM.config_schema(path="")
