"""What an :class:`~swampfs.provider.ObjectStore` must do, as a pytest class for any backend.

Subclass it, name it ``Test…``, and give it a fixture ``store`` that yields an empty store::

    class TestMyStore(ObjectStoreSuite):
        @pytest.fixture
        def store(self):
            return MyStore(...)
"""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from swampfs.errors import AbsentError, PreconditionError, StoreError
from swampfs.provider import ABSENT, ObjectStore, matching
from swampfs.records import timestamp_ns

_ODD_KEYS = ["a b/c+d%é", "x/&<>\"'/1", "q~-._(1)*!", "zz/🙂", "plus+/@x:y=,;", "deep/" + "n" * 200]


class ObjectStoreSuite:
    """Every obligation of the port."""

    def test_what_was_put_is_read_back_with_its_size_and_etag(self, store: ObjectStore) -> None:
        info = store.put("data/x", b"hello")
        blob = store.get("data/x")
        assert blob is not None
        assert (blob.body, blob.info.size, blob.info.etag) == (b"hello", 5, info.etag)
        head = store.head("data/x")
        assert (head.key, head.size, head.etag) == ("data/x", 5, info.etag)
        assert timestamp_ns(head.last_modified) is not None, "the store's time in wire form"

    def test_empty_and_odd_keys_and_bodies_survive(self, store: ObjectStore) -> None:
        for key in _ODD_KEYS:
            store.put(key, key.encode())
        store.put("empty", b"")
        for key in _ODD_KEYS:
            blob = store.get(key)
            assert blob is not None, key
            assert blob.body == key.encode(), key
        assert {info.key for info in store.list("")} == {*_ODD_KEYS, "empty"}
        assert store.head("empty").size == 0

    def test_a_file_can_be_put_and_downloaded(self, store: ObjectStore, tmp_path: Path) -> None:
        source, target = tmp_path / "source", tmp_path / "target"
        source.write_bytes(bytes(range(256)) * 40_000)
        info = store.put("big", str(source))
        assert info.size == source.stat().st_size
        target.write_bytes(b"old and longer than nothing")
        got = store.download("big", str(target))
        assert target.read_bytes() == source.read_bytes()
        assert (got.size, got.etag) == (info.size, info.etag)

    def test_a_part_is_read_without_the_rest_and_of_one_version_only(self, store: ObjectStore) -> None:
        body = bytes(range(256)) * 1000
        first = store.put("parts", body)
        for offset, size in ((0, 1), (1000, 70_000), (len(body) - 5, 5)):
            part = store.part("parts", offset, size, etag=first.etag)
            assert part.body == body[offset : offset + size]
            assert part.info.etag == first.etag
        part = store.part("parts", 0, 10)
        assert (part.body, part.info.size, part.info.etag) == (body[:10], len(body), first.etag)
        assert store.part("parts", len(body) - 5, 100).body == body[-5:], "what there is of it"
        store.put("parts", body[::-1])
        with pytest.raises(PreconditionError):
            store.part("parts", 0, 10, etag=first.etag)

    def test_a_part_is_given_away_as_it_comes(self, store: ObjectStore) -> None:
        body = bytes(range(256)) * 10_000
        etag = store.put("given", body).etag
        for offset, size in ((0, len(body)), (1000, 2_000_000), (len(body) - 5, 100)):
            came = bytearray()

            def take(at: int, piece: memoryview, *, offset: int = offset, came: bytearray = came) -> None:
                assert at == offset + len(came), "in order"
                came += piece

            part = store.part("given", offset, size, etag=etag, take=take)
            assert (bytes(came), part.body) == (body[offset : offset + size], b"")
            assert part.info.etag == etag

        def refuse(at: int, piece: memoryview) -> None:
            raise OSError(errno.ENOSPC, "full")

        with pytest.raises(OSError, match="full"):
            store.part("given", 0, 10, etag=etag, take=refuse)
        assert store.part("given", 0, 10, etag=etag).body == body[:10]

    def test_absence_is_a_definite_answer(self, store: ObjectStore, tmp_path: Path) -> None:
        for call in (
            lambda: store.get("none"),
            lambda: store.head("none"),
            lambda: store.part("none", 0, 1),
            lambda: store.download("none", str(tmp_path / "none")),
        ):
            with pytest.raises(AbsentError):
                call()
        assert list(store.list("none")) == []

    def test_an_unchanged_object_is_not_sent_again(self, store: ObjectStore) -> None:
        first = store.put("x", b"one")
        assert store.get("x", unless=first.etag) is None
        second = store.put("x", b"two")
        blob = store.get("x", unless=first.etag)
        assert blob is not None
        assert (blob.body, blob.info.etag) == (b"two", second.etag)

    def test_creating_twice_is_refused(self, store: ObjectStore) -> None:
        store.put("x", b"one", ABSENT)
        with pytest.raises(PreconditionError):
            store.put("x", b"two", ABSENT)
        blob = store.get("x")
        assert blob is not None
        assert blob.body == b"one"
        store.delete("x")
        store.put("x", b"three", ABSENT)

    def test_replacing_needs_the_version_that_was_named(self, store: ObjectStore) -> None:
        first = store.put("x", b"one")
        second = store.put("x", b"two", matching(first.etag))
        with pytest.raises((PreconditionError, AbsentError)):
            store.put("x", b"three", matching(first.etag))
        with pytest.raises((PreconditionError, AbsentError)):
            store.put("missing", b"x", matching(first.etag))
        blob = store.get("x")
        assert blob is not None
        assert (blob.body, blob.info.etag) == (b"two", second.etag)

    def test_deleting_needs_the_version_that_was_named(self, store: ObjectStore) -> None:
        first = store.put("x", b"one")
        second = store.put("x", b"two")
        with pytest.raises((PreconditionError, AbsentError)):
            store.delete("x", matching(first.etag))
        assert store.head("x").etag == second.etag
        store.delete("x", matching(second.etag))
        with pytest.raises((PreconditionError, AbsentError)):
            store.delete("x", matching(second.etag))

    def test_deleting_what_is_not_there_is_success(self, store: ObjectStore) -> None:
        store.delete("none")
        store.put("x", b"")
        store.delete("x")
        store.delete("x")
        with pytest.raises(AbsentError):
            store.head("x")

    def test_listings_are_complete_ordered_and_by_prefix(self, store: ObjectStore) -> None:
        keys = [f"many/{number:04}" for number in range(1_050)]
        for key in reversed(keys):
            store.put(key, b"")
        store.put("other", b"x")
        assert [info.key for info in store.list("many/")] == keys
        assert [info.key for info in store.list("many/000")] == keys[:10]
        infos = list(store.list("o"))
        assert [(info.key, info.size, info.etag) for info in infos] == [("other", 1, store.head("other").etag)]

    def test_directories_are_told_without_what_is_in_them(self, store: ObjectStore) -> None:
        for key in ("b/x", "a/deep/down", "a/2", "file", "a-/y", "a b&<c>/z"):
            store.put(key, b"")
        assert sorted(store.directories("")) == ["a", "a b&<c>", "a-", "b"]
        assert list(store.directories("a/")) == ["deep"]
        assert list(store.directories("none/")) == []

    def test_more_directories_than_fit_on_a_page_are_all_told(self, store: ObjectStore) -> None:
        names = [f"{number:04}" for number in range(1_010)]
        for name in names:
            store.put(f"wide/{name}/x", b"")
        assert list(store.directories("wide/")) == names

    def test_of_many_racing_creators_one_wins(self, store: ObjectStore) -> None:
        for number in range(5):
            outcomes: list[bool] = []
            barrier = threading.Barrier(8)

            def create(number: int, barrier: threading.Barrier, outcomes: list[bool]) -> None:
                barrier.wait()
                try:
                    store.put(f"race/{number}", threading.current_thread().name.encode(), ABSENT)
                    outcomes.append(True)
                except StoreError:
                    outcomes.append(False)

            threads = [threading.Thread(target=create, args=(number, barrier, outcomes)) for _ in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert outcomes.count(True) == 1, outcomes

    def test_it_can_say_whether_it_is_there(self, store: ObjectStore) -> None:
        store.verify()
        assert store.name
        assert store.label
