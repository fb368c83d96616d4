"""The bytes of the index: compact, raw non-ASCII, other writers' fields kept; and a decoder that trusts nothing."""

from __future__ import annotations

import json

import pytest

from swampfs.errors import IndexCorruptError, IndexVersionError
from swampfs.names import RelPath
from swampfs.records import IndexEntry, IndexMode, LockInfo, timestamp, timestamp_ns
from swampfs.sync.index import (
    Meta,
    decode_entries,
    decode_json,
    decode_meta,
    encode_document,
    encode_entry,
    encode_meta,
    new_shard,
)
from swampfs.sync.locks import decode_lock, encode_lock

ENTRY = IndexEntry(RelPath("audit/blå.jsonl"), 512, "2026-08-03T09:14:22.401Z", "2026-08-03T09:14:21.977Z", "a" * 64)


def test_entries_are_written_in_the_order_of_the_specification_without_nulls():
    assert list(encode_entry(ENTRY)) == ["key", "size", "lastModified", "localMtime", "sha256"]
    bare = encode_entry(ENTRY._replace(local_mtime=None, sha256=None))
    assert list(bare) == ["key", "size", "lastModified"]


def test_documents_are_compact_with_raw_non_ascii():
    body = encode_document(new_shard({ENTRY.path: encode_entry(ENTRY)}))
    assert body == json.dumps(json.loads(body), ensure_ascii=False, separators=(",", ":")).encode()
    assert "blå".encode() in body


def test_fields_of_other_writers_survive_a_rewrite_of_the_entry():
    old = {"key": "x", "size": 1, "sha256": "b" * 64, "mode": "0755", "localMtime": "old"}
    assert encode_entry(ENTRY._replace(local_mtime=None), old) == {
        **encode_entry(ENTRY._replace(local_mtime=None)),
        "mode": "0755",
    }


def test_meta_of_version_2_is_sorted_and_unique():
    meta = Meta(IndexMode.SHARDS, ("b", "_root", "a", "b"), 7)
    assert encode_meta(meta) == b'{"version":2,"partitions":["_root","a","b"],"commitSeq":7}'
    assert encode_meta(Meta(IndexMode.MONOLITH, ("b", "a"), 0)) == b'{"version":1,"partitions":["b","a"]}'


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b'{"version":3,"partitions":[]}', IndexVersionError),
        (b'{"version":true,"partitions":[]}', IndexVersionError),
        (b'{"version":2}', IndexVersionError),
        (b'{"version":2,"partitions":["a"]}', IndexCorruptError),
        (b'{"version":2,"partitions":["a"],"commitSeq":-1}', IndexCorruptError),
        (b'{"version":2,"partitions":["../a"],"commitSeq":1}', IndexCorruptError),
        (b"[]", IndexCorruptError),
        (b"\xff", IndexCorruptError),
        (b"", IndexCorruptError),
        (b"[" * 100_000, IndexCorruptError),
    ],
)
def test_a_bad_meta_is_an_error_and_never_read_as_absent(body, error):
    with pytest.raises(error):
        decode_meta(body, "_meta.json")


def test_bad_entries_become_findings_and_the_rest_is_used():
    raw = {
        "audit/ok": {"key": "audit/ok", "size": 1, "future": {"field": 1}},
        "audit/nan": {"size": float("nan")},
        "audit/negative": {"size": -1},
        "audit/text": {"size": "1"},
        "audit/true": {"size": True},
        "audit/huge": {"size": 2**70},
        "audit/hash": {"size": 1, "sha256": "A" * 64},
        "audit/list": [],
        "../up": {"size": 1},
        "audit/\udc80": {"size": 1},
    }
    document = decode_json(json.dumps({"version": 1, "entries": raw}).encode(), "shard")
    good, bad = decode_entries(document, "shard", "audit")
    assert [entry.path for entry in good] == ["audit/ok"]
    assert {finding.path for finding in bad} == set(raw) - {"audit/ok"}
    assert {finding.partition for finding in bad} == {"audit"}
    assert json.loads(encode_document(document))["entries"].keys() == raw.keys()


def test_timestamps_are_24_characters_truncated_to_milliseconds():
    assert timestamp(1_785_748_462_401_999_999) == "2026-08-03T09:14:22.401Z"
    assert timestamp_ns("2026-08-03T09:14:22.401Z") == 1_785_748_462_401_000_000
    assert timestamp(10**21).startswith("9999-12-31")
    assert len(timestamp(0)) == 24
    for text in ("", "yesterday", "2026-08-03T09:14:22", None, "0001-01-01T00:00:00.000Z"):
        assert timestamp_ns(text) is None


def test_locks_are_pretty_json_as_the_extensions_write_them():
    info = LockInfo("ana@build-7", "build-7", 48213, "2026-08-03T09:14:20.000Z", 30000, "0f0e")
    expected = """{
  "holder": "ana@build-7",
  "hostname": "build-7",
  "pid": 48213,
  "acquiredAt": "2026-08-03T09:14:20.000Z",
  "ttlMs": 30000,
  "nonce": "0f0e"
}"""
    assert encode_lock(info) == expected.encode()
    assert decode_lock(expected.encode()) == info
    for body in (b"", b"{", b"[]", b'{"holder":1}', b"\xff", b'{"ttlMs":"x"}'):
        assert decode_lock(body) is None
