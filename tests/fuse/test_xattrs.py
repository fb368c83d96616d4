"""``--xattrs``: what swampfs knows of a file, as extended attributes."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess

import pytest

from tests.datastores import load_shards
from tests.harness import wait_for

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
RAW = f"{MODEL}/n/3/raw"


@pytest.fixture
def datastore(bucket):
    load_shards(bucket, [(RAW, b"content"), (f"{MODEL}/n/3/metadata.yaml", b"{}"), ("audit/day", b"gone")])
    return bucket


def xattrs(path):
    return {name.removeprefix("user.swamp."): os.getxattr(path, name).decode() for name in os.listxattr(path)}


def test_extended_attributes_tell_state_hash_version_and_model(datastore, fleet):
    a = fleet.machine("a", datastore.env, options=("--xattrs", "--push-delay", "1h"))
    a.mount(datastore.url)
    known = {"version": "3", "model": MODEL.removeprefix("data/"), "sha256": hashlib.sha256(b"content").hexdigest()}
    assert xattrs(a.path / RAW) == {"state": "remote", **known}
    assert os.stat(a.path / RAW).st_blocks == 0, "asking fetches nothing"
    (a.path / RAW).read_bytes()
    assert xattrs(a.path / RAW) == {"state": "clean", **known}
    (a.path / RAW).write_bytes(b"changed")
    assert xattrs(a.path / RAW) == {"state": "dirty", "version": "3", "model": known["model"]}
    a.flush()
    assert xattrs(a.path / RAW) == {"state": "clean", **known, "sha256": hashlib.sha256(b"changed").hexdigest()}
    assert xattrs(a.path / MODEL / "n/3") == {"version": "3", "model": known["model"]}
    assert xattrs(a.path / "audit") == {}
    (a.path / "audit/.#scratch").touch()
    (a.path / "secrets").mkdir()
    for private in ("audit/.#scratch", "secrets"):
        assert xattrs(a.path / private) == {"state": "private"}


def test_why_a_file_could_not_be_read_stands_in_its_error_attribute(datastore, fleet):
    datastore.put("audit/day", b"other")
    a = fleet.machine("a", datastore.env, options=("--xattrs", "--timeout", "3s"))
    a.mount(datastore.url)
    with pytest.raises(OSError, match="Input/output error"):
        (a.path / "audit/day").read_bytes()
    assert "its index says 4" in xattrs(a.path / "audit/day")["error"]
    datastore.put("audit/day", b"gone")
    assert (a.path / "audit/day").read_bytes() == b"gone"
    assert "error" not in xattrs(a.path / "audit/day")


def test_extended_attributes_cannot_be_set_and_copies_go_without_them(datastore, fleet, tmp_path):
    a = fleet.machine("a", datastore.env, options=("--xattrs",))
    a.mount(datastore.url)
    refused = {"user.swamp.state": errno.EPERM, "user.other": errno.EOPNOTSUPP, "trusted.x": errno.EOPNOTSUPP}
    for name, number in refused.items():
        with pytest.raises(OSError) as caught:
            os.setxattr(a.path / RAW, name, b"1")
        assert caught.value.errno == number, name
    with pytest.raises(OSError) as caught:
        os.getxattr(a.path / RAW, "user.other")
    assert caught.value.errno == errno.ENODATA
    (tmp_path / "with").write_text("content")
    os.setxattr(tmp_path / "with", "user.other", b"1")
    subprocess.run(["cp", "-a", tmp_path / "with", a.path / "audit/copy"], check=True)
    assert (a.path / "audit/copy").read_text() == "content"


def test_without_being_asked_for_there_are_no_extended_attributes(datastore, fleet):
    a = fleet.machine("a", datastore.env)
    a.mount(datastore.url)
    for ask in (lambda: os.getxattr(a.path / RAW, "user.swamp.state"), lambda: os.listxattr(a.path / RAW)):
        with pytest.raises(OSError) as caught:
            ask()
        assert caught.value.errno == errno.EOPNOTSUPP


def test_every_namespace_answers_extended_attributes(bucket, fleet):
    for name in ("mine", "other"):
        bucket.put(f"{name}/.namespace.json", b'{"namespace":"%s"}' % name.encode())
        bucket.put(f"{name}/audit/day", b"content")
    a = fleet.machine("a", bucket.env, options=("--xattrs", "--all-namespaces", "--namespace", "mine"))
    a.mount(bucket.url)
    wait_for(lambda: sorted(os.listdir(a.path)) == ["mine", "other"], "both are there")
    assert xattrs(a.path) == xattrs(a.path / "mine") == xattrs(a.path / "other") == {}
    for name in ("mine", "other"):
        assert xattrs(a.path / name / "audit/day") == {"state": "remote"}
