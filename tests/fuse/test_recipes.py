"""A stranger follows the README and the recipes: every command of a page, as it stands there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from swampfs import registry
from swampfs.testing.sample import sample_files
from tests.datastores import load_shards

ROOT = Path(__file__).resolve().parents[2]
BUCKET = "ops-runtime"
ELSEWHERE = ("scripts/", ".ci/")  # what sets itself up, and is run by CI
PROCESSES_END_S = 30


def recipes(page: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and commands of each section that has commands."""
    for section in re.split(r"(?m)^## ", (ROOT / page).read_text())[1:]:
        blocks = re.findall(r"(?ms)^```console\n(.*?)^```", section)
        commands = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
        wanted = [command for command in commands if not command.startswith(ELSEWHERE)]
        if wanted:
            yield section.partition("\n")[0], wanted


class Corner:
    """The bucket that the pages name."""

    def __init__(self, client):
        self.client = client

    def put(self, key, body):
        self.client.put_object(Bucket=BUCKET, Key=f"team/{key}", Body=body)


@pytest.fixture
def stranger(server, gcs, tmp_path):
    """Home and environment of somebody who has credentials, a bucket with a datastore in it, and a repository."""
    client = server.client()
    client.create_bucket(Bucket=BUCKET)
    with suppress(ValueError):
        gcs.make_bucket(BUCKET)
    failed = ("outputs/aws/ec2/vpc/sync/m-2026-03-14T09-26-53-589Z.yaml", b"status: failed\n")
    load_shards(Corner(client), [*sample_files(), failed])
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/.swamp.yaml").write_text(
        "swampVersion: '1'\nrepoId: 3b8f9f7e-0c55-4f2e-9c43-6c1e2a0f6d11\ndatastore:\n"
        f"  type: '@swamp/s3-datastore'\n  config: {{bucket: {BUCKET}, prefix: team}}\n"
    )
    (tmp_path / "work/.venv/bin").mkdir(parents=True)
    (tmp_path / "work/.venv/bin/activate").write_text(f'PATH="{Path(sys.executable).parent}:$PATH"\n')
    (tmp_path / "work/edit.sh").write_text("#!/bin/sh\necho edited\n")
    (tmp_path / "work/edit.sh").chmod(0o755)
    keep = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SWAMP"))}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**keep, **server.environment(), "HOME": str(tmp_path), "PATH": path, "STORAGE_EMULATOR_HOST": gcs.endpoint}
    yield tmp_path, env
    for left in registry.registrations(env):
        subprocess.run(["umount", "-l", left.mountpoint], capture_output=True)
        with suppress(ProcessLookupError):
            os.kill(left.pid, signal.SIGKILL)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=BUCKET, Key=item["Key"])
    client.delete_bucket(Bucket=BUCKET)


def follow(stranger, commands):
    home, env = stranger
    script = "set -eu -o pipefail\n" + "".join(f"echo '+' {line_of(one)}\n{one}\n" for one in commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=home / "work", env=env, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert not registry.registrations(env), "nothing stays mounted"
    return done.stdout


def line_of(command):
    """For the log, quoted."""
    return "'" + command.replace("'", "'\\''") + "'"


@pytest.mark.parametrize(
    ("page", "heading", "commands"),
    [
        pytest.param(page, heading, commands, id=f"{page}: {heading}")
        for page in ("README.md", "docs/recipes.md")
        for heading, commands in recipes(page)
    ],
)
def test_what_the_pages_say_can_be_done(stranger, page, heading, commands):
    follow(stranger, commands)


def test_the_pages_have_recipes_for_what_people_want():
    headings = {heading for heading, _ in recipes("docs/recipes.md")}
    assert len(headings) == 8
    assert {heading for heading, _ in recipes("README.md")} == {"Quick start", "Without a mount"}
