"""Whatever lies in a datastore or a configuration file: each parser takes it, or refuses it in the way it promises."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import trio
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from swampfs.backends.connection import Connection, read_answer, to_taker, whole_body
from swampfs.backends.s3 import parse_directories, parse_listing
from swampfs.errors import IndexCorruptError, IndexVersionError, NamespaceError, StoreError, SwampfsError
from swampfs.settings import duration_s, read_repo, resolve_source, size_bytes, tiers_of
from swampfs.sync.catalogs import _rows
from swampfs.sync.directories import _decode as decode_directories
from swampfs.sync.garbage import definition_id
from swampfs.sync.index import decode_entries, decode_json, decode_meta, decode_shard
from swampfs.sync.locks import decode_lock
from swampfs.sync.namespaces import decode_manifest
from swampfs.testing.memory import MemoryStore
from tests.datastores import load_shards
from tests.engine import Store, load, machine

NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.sampled_from([float("inf"), float("nan"), -0.0, 1e308])
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["..", "/", "\0", "\ud800", "a/b"])
)
FIELDS = st.sampled_from(
    ["version", "partitions", "commitSeq", "entries", "size", "sha256", "localMtime", "lastModified", "posix", "mode",
     "link", "ns", "holder", "hostname", "pid", "acquiredAt", "ttlMs", "nonce", "repoId", "directories", "attributes",
     "files/p/x", "audit/a", "datastore", "type", "config", "exclude", "id"]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(FIELDS, inner, max_size=6)),
    max_leaves=20,
)
DEEP = st.sampled_from(["[", '{"a":', '{"entries":['])
BODIES = st.one_of(
    st.binary(max_size=80),
    DEEP.map(lambda opening: opening.encode() * 20_000),
    VALUES.map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()[:-1]),
    VALUES.map(lambda value: b"\xff" + json.dumps(value).encode()),
)
MANY = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))


@MANY
@given(body=BODIES)
def test_no_index_document_is_more_than_an_error(body):
    for read in (decode_meta, decode_shard, decode_json):
        try:
            document = read(body, "it")
        except (IndexCorruptError, IndexVersionError):
            continue
        if isinstance(document, dict):
            try:
                entries, findings = decode_entries(document, "it", "p")
            except IndexCorruptError:
                continue
            assert all(entry.size >= 0 for entry in entries)
            assert all(finding.detail for finding in findings)


@MANY
@given(body=BODIES)
@example(body=b'{"holder":"h","hostname":"h","pid":1e400,"acquiredAt":"","ttlMs":1e400}')
def test_no_lock_manifest_or_record_is_more_than_unreadable(body):
    lock = decode_lock(body)
    assert lock is None or 1 <= lock.ttl_ms <= 24 * 3_600_000
    assert decode_manifest(body, "infra").namespace == "infra"
    _rows(body)
    decode_directories(body, "_control/swampfs/leases/files/p.lock")
    try:
        assert definition_id(body, "it")
    except NamespaceError as error:
        assert error.remedy


@MANY
@given(
    body=st.one_of(BODIES, st.text(alphabet="<>/ContentsKeySizeLastModified09TZ:-&;%", max_size=200).map(str.encode))
)
@example(body=b"<Contents><Key>a</Key></Contents>")
@example(body=b"<Contents><Key>a</Key><Size>x</Size><LastModified>y</LastModified></Contents>")
def test_no_listing_is_more_than_a_store_error(body):
    for parse in (parse_listing, lambda text: parse_directories(text, "p/")):
        try:
            parse(body)
        except StoreError as error:
            assert error.retryable


class Said(Connection):
    """Says that, and ends."""

    def __init__(self, text):
        self._text = io.BytesIO(text)
        self.reader = io.BufferedReader(self)
        self._is_drained, self._give_up_at = False, 0.0

    def readinto(self, buffer):
        return self._text.readinto(buffer)

    def close(self):
        return


def _fields(text):
    return text.encode() + b"\r\n\r\n"


@MANY
@given(
    head=st.one_of(st.binary(max_size=40), st.sampled_from([b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 999 \r\n"])),
    fields=st.one_of(st.binary(max_size=60), st.sampled_from(["Content-Length: -1", "Content-Length: 9"]).map(_fields)),
    body=st.binary(max_size=40),
)
@example(b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"-1\r\nabc")
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 999999999999999\r\n\r\n", b"abc")
@example(b"HTTP/1.1 200 OK\r\n", b"Content-Length: 999999\r\n\r\n", b"abc")
@example(b"HTTP/1.1 206 OK\r\n", b"Content-Range: bytes 5-7/9\r\n\r\n", b"abc")
@example(b"HTTP/1.1 206 OK\r\n", b"Content-Range: bytes 5-2/9\r\nContent-Length: 9\r\n\r\n", b"abc")
@example(b"HTTP/1.1 206 OK\r\n", b"Content-Range: bytes 5-7/9\r\nContent-Length: -9\r\n\r\n", b"abc")
def test_no_http_answer_is_more_than_unanswered(head, fields, body):
    taken = []
    for read in (whole_body, to_taker(5, lambda offset, piece: taken.append((offset, bytes(piece))))):
        try:
            answer = read_answer(Said(head + fields + body), read, bodiless=False)
        except (ValueError, OSError):
            continue  # what the wire takes for no answer
        assert len(answer.body) <= len(body) + len(fields)
    assert not taken or taken[0][0] == 5
    assert sum(len(piece) for _, piece in taken) <= len(body) + len(fields)


@MANY
@given(body=BODIES)
@example(body=b"a: &a [*a]\ndatastore: *a\n")
@example(body=b"datastore: " + b"[" * 20_000)
def test_no_repository_marker_is_more_than_a_settings_error(body, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "repo"
    directory.mkdir(exist_ok=True)
    (directory / ".swamp.yaml").write_bytes(body)
    try:
        tiers_of(read_repo(directory))
        resolve_source(str(directory), {}, directory)
    except SwampfsError as error:
        assert error.line()


@MANY
@given(text=st.one_of(st.text(max_size=30), st.text(alphabet="s3:/gfileoncdb.?#@%\\ ", max_size=30)))
def test_no_option_is_more_than_a_usage_error(text, tmp_path_factory):
    for read in (duration_s, size_bytes, lambda value: resolve_source(value, {}, tmp_path_factory.getbasetemp())):
        try:
            read(text)
        except SwampfsError as error:
            assert error.line()


@pytest.mark.parametrize("index", ["v1", "v2"])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(body=BODIES, which=st.sampled_from([".datastore-index.json", "_index/_meta.json", "_index/audit.json"]))
def test_a_mounted_machine_outlives_any_index(index, body, which, tmp_path_factory):
    store = MemoryStore()
    load(store, {"audit/a": b"first"}, index)

    async def main():
        async with machine(store, tmp_path_factory.mktemp("m")) as a:
            assert await a.read("audit/a") == b"first"
            store.put(which, body)
            with contextlib.suppress(SwampfsError):
                await a.pull()
            if "audit/a" in a.names():
                assert await a.read("audit/a") == b"first"
            store.delete(which)
            if index == "v2":
                load_shards(Store(store), [("audit/a", b"second")], seq=2)
            else:
                load(store, {"audit/a": b"second"}, index)
            await a.pull()
            assert await a.read("audit/a") == b"second", "it follows when the index is whole again"

    trio.run(main)
