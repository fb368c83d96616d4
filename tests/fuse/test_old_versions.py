"""``NAME@3`` and ``raw@-1``: old versions for who has a name at hand and no wish to count."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.datastores import load_shards
from tests.fuse.test_query import ID, SHORT, version, write

NAME = f"data/acme/probe/{ID}1/vpc"


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, [file for number in (1, 2, 3, 10) for file in version(1, "vpc", number, b"%d" % number)])
    made = fleet.machine("a", bucket.env, options=SHORT)
    made.mount(bucket.url)
    return made


def test_versions_are_found_by_number_and_by_counting_back(machine):
    name = machine.path / NAME
    assert (name.parent / "vpc@3/raw").read_bytes() == b"3"
    assert (name.parent / "vpc@-1/raw").read_bytes() == b"3", "the one before the latest"
    assert (name.parent / "vpc@-3/metadata.yaml").read_bytes() == (name / "1/metadata.yaml").read_bytes()
    assert (name / "10/raw@-1").read_bytes() == b"3"
    assert (name / "10/raw@-2").read_bytes() == b"2"
    assert (name / "2/raw@-1").read_bytes() == b"1"
    assert (name / "2/raw@10").read_bytes() == b"10"
    assert os.readlink(name / "10/raw@-1") == "../3/raw"
    done = subprocess.run(["diff", "raw@-1", "raw"], cwd=name / "10", capture_output=True, text=True)
    assert done.stdout == "1c1\n< 3\n\\ No newline at end of file\n---\n> 10\n\\ No newline at end of file\n"


def test_what_names_no_version_is_not_there(machine):
    name = machine.path / NAME
    for path in (
        "vpc@4",
        "vpc@0",
        "vpc@-4",
        "vpc@",
        "vpc@x",
        "vpc@03",
        "other@1",
        "@1",
        "vpc/1/raw@-1",
        "vpc/1/none@2",
    ):
        assert not os.path.lexists(name.parent / path), path
    assert sorted(os.listdir(name.parent)) == ["vpc"]
    assert sorted(os.listdir(name / "3")) == ["metadata.yaml", "raw"]


def test_a_real_name_wins_and_can_be_made(machine):
    above = (machine.path / NAME).parent
    write(machine, version(1, "odd@7", 1, b"real"))
    assert (above / "odd@7/1/raw").read_bytes() == b"real"
    assert (above / "odd@7@1/raw").read_bytes() == b"real"
    (above / "vpc@99").mkdir()
    assert os.listdir(above / "vpc@99") == []


def test_new_versions_count_at_once(machine):
    above = (machine.path / NAME).parent
    assert (above / "vpc@-1/raw").read_bytes() == b"3"
    write(machine, version(1, "vpc", 11, b"11"))
    assert (above / "vpc@-1/raw").read_bytes() == b"10"
