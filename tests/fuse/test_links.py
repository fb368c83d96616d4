"""``.swampfs/by-model`` and its siblings: artifacts as symbolic links that shell tools follow."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.fuse.test_query import ID, SHORT, sampled, version, write
from tests.harness import wait_for

TOPS = {"by-model", "by-tag", "by-workflow", "latest", "query", "recent"}


@pytest.fixture
def machine(bucket, fleet):
    return sampled(bucket, fleet)


def tree(top):
    return {str(path.relative_to(top)): os.readlink(path) for path in top.rglob("*") if path.is_symlink()}


def test_links_lead_to_the_latest_versions(machine):
    views = machine.path / ".swampfs"
    assert set(os.listdir(views)) >= TOPS
    models = sorted(os.listdir(views / "by-model"))
    assert len(models) == 3
    link = views / "by-model" / models[0] / "item-1"
    assert os.path.samefile(link, link.resolve())
    assert sorted(os.listdir(link)) == ["metadata.yaml", "raw"]
    assert link.resolve().name == "2"
    raw = views / "latest" / models[0] / "item-1"
    assert raw.read_bytes() == (link / "raw").read_bytes()
    assert len(tree(views / "recent")) == 6
    assert sorted(os.listdir(views / "by-tag")) == ["modelName", "specName", "type"]
    assert len(tree(views / "by-tag/specName/item")) == 6
    assert tree(views / "by-workflow") == {}


def test_a_predicate_is_a_directory(machine):
    query = machine.path / ".swampfs/query"
    assert os.listdir(query) == []
    found = sorted(os.listdir(query / "name == 'item-0' && version == 1"))
    assert [name.partition(":")[2] for name in found] == ["item-0@1"] * 3
    assert len(os.listdir(query / "modelType == 'aws%2Fec2%2Fvpc'")) == 2
    assert os.listdir(query / "name == 'nothing'") == []
    (query / "name == 'item-0' && version == 1" / found[0] / "raw").read_bytes()
    here = os.listdir(query / "attributes.version == 1 && version == 1")
    assert len(here) == 1, "of content, what is on this machine"


def test_a_predicate_that_is_wrong_is_no_directory_and_why_is_told(machine):
    wrong = machine.path / ".swampfs/query/nam == 'x'"
    with pytest.raises(OSError) as caught:
        os.listdir(wrong)
    assert caught.value.errno == errno.EINVAL
    assert "unknown field nam" in (machine.path / ".swampfs/errors").read_text()
    with pytest.raises(OSError) as caught:
        os.listdir(machine.path / ".swampfs/query/[1, 2].all(a, a > 0)")
    assert caught.value.errno == errno.EINVAL
    assert len(os.listdir(machine.path / ".swampfs/query/version %25 2 == 0")) == 6


def test_links_follow_what_is_written_here_and_there(bucket, fleet, machine):
    other = fleet.machine("b", bucket.env, options=SHORT)
    other.mount(bucket.url)
    tags = {"env": "prod/eu", "odd": "."}
    owner = {"workflowName": "nightly", "workflowRunId": "run-1"}
    write(machine, version(1, "new", 1, b"one", tags=tags, owner=owner))
    latest = machine.path / ".swampfs/latest/probe-1/new"
    wait_for(latest.exists, "the new artifact")
    assert latest.read_bytes() == b"one"
    views = machine.path / ".swampfs"
    assert os.listdir(views / "by-tag/env/prod%2Feu") == ["probe-1:new@1"]
    assert os.listdir(views / "by-tag/odd") == ["%2E"]
    assert os.listdir(views / "by-workflow/nightly/run-1") == ["probe-1:new@1"]
    wait_for((other.path / ".swampfs/latest/probe-1/new").exists, "the other machine")
    write(other, version(1, "new", 2, b"two", tags=tags, owner=owner))
    wait_for(lambda: latest.read_bytes() == b"two", "the other machine's version")


def test_models_of_one_name_are_told_apart(machine):
    for model in (1, 2):
        files = list(version(model, "new", 1, b"%d" % model, tags={"modelName": "twin"}))
        write(machine, files)
    twins = machine.path / ".swampfs/latest/twin"
    wait_for(lambda: sorted(os.listdir(twins)) == ["new", "new~2"], "both")
    assert {(twins / name).read_bytes() for name in ("new", "new~2")} == {b"1", b"2"}


def test_nothing_can_be_made_or_removed_there_and_find_does_not_meet_them(machine):
    views = machine.path / ".swampfs"
    model = next((views / "by-model").iterdir())
    for act in (
        lambda: (model / "new").write_text("x"),
        lambda: (model / "new").mkdir(),
        lambda: (model / "item-0").unlink(),
        lambda: model.rmdir(),
        lambda: (model / "item-0").rename(model / "x"),
        lambda: os.chmod(model, 0o700),
        lambda: (views / "query").rmdir(),
        lambda: os.symlink("x", views / "recent/x"),
    ):
        with pytest.raises(OSError) as caught:
            act()
        assert caught.value.errno in (errno.EPERM, errno.EACCES, errno.ENOTDIR, errno.ENOENT, errno.ESTALE, errno.EROFS)
    found = subprocess.run(["find", machine.path, "-type", "l"], capture_output=True, text=True, check=True)
    assert found.stdout == ""
    walked = subprocess.run(["find", views, "-type", "l"], capture_output=True, text=True, check=True).stdout
    assert len(walked.splitlines()) == 6 * (1 + 1 + 1 + 3), "by-model, latest, recent, and one for each of three tags"
    assert subprocess.run(["grep", "-rc", "running", views / "latest"], capture_output=True).returncode == 1
    assert Path(model / "../../status.json").exists()


def test_names_that_are_not_there_are_not(machine):
    views = machine.path / ".swampfs"
    for name in (
        "by-model/none",
        "by-model/none/x",
        "latest/x",
        "by-tag/type/x",
        "recent/x",
        "by-nothing",
        "query/true/x",
    ):
        assert not (views / name).exists()


def test_where_there_are_more_links_than_a_directory_shows_is_told(fleet, tmp_path):
    (_, metadata), (_, raw), _ = version(1, "NAME", 1, b"{}")
    for number in range(10_001):
        directory = tmp_path / f"store/data/acme/probe/{ID}1/n-{number:05}/1"
        directory.mkdir(parents=True)
        (directory / "metadata.yaml").write_bytes(metadata.replace(b"NAME", b"n-%05d" % number))
        (directory / "raw").write_bytes(raw)
        (directory.parent / "latest").write_bytes(b"1")
    machine = fleet.machine("a", options=("--refresh", "1h"))
    machine.mount(f"file://{tmp_path}/store")
    views = machine.path / ".swampfs"
    assert len(os.listdir(views / "by-model/probe-1")) == 10_000
    assert "only 10000 links are shown of more — ask `swampfs query`" in (views / "errors").read_text()
