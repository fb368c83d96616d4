"""What every command ends with: done, asked wrongly, nothing mounted, the datastore away, a lock held by another."""

from __future__ import annotations

import click
import pytest

from swampfs.cli.main import main
from swampfs.testing.sample import sample_files
from tests.datastores import load_shards
from tests.fuse.test_locks import record
from tests.fuse.test_namespaces import make_repo

AWAY = "http://127.0.0.1:1"
USAGE, SYSTEM, MOUNT, LOCKED = 1, 2, 32, 75
TO_A_MOUNT = [
    "status", "flush", "flush mnt/x", "umount mnt", "hydrate mnt/x", "evict mnt/x", "pin mnt/x", "unpin mnt/x",
    "info mnt/x", "explain mnt/x", "query", "latest model name", "compact", "conflicts list",
]  # fmt: skip
TO_A_DATASTORE = {
    "sync --pull": SYSTEM, "sync --push": SYSTEM, "lock status": SYSTEM, "lock release --force": SYSTEM,
    "lock run a/b -- true": SYSTEM, "namespace list": SYSTEM, "namespace set infra": SYSTEM, "gc -y": SYSTEM,
    "prune -y": SYSTEM, "delete a/b -y": SYSTEM, "migrate-index": SYSTEM, "doctor": USAGE, "mount mnt": MOUNT,
}  # fmt: skip
UNDER_THE_LOCK = ["sync --push", "gc -y", "prune -y", "delete aws/ec2/vpc/{model} -y", "migrate-index"]
MODEL = next(path for path, _ in sample_files() if path.startswith("data/aws")).split("/")[4]


def commands():
    """Every command there is, those of groups included."""

    def below(group, words):
        context = click.Context(group)
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            yield from (
                below(command, [*words, name]) if isinstance(command, click.Group) else [" ".join([*words, name])]
            )

    return list(below(main, []))


@pytest.fixture
def repo(bucket, fleet, home):
    """A repository with a datastore; commands run in it."""
    load_shards(bucket, sample_files())
    made = fleet.machine("shell", {**bucket.env, "SWAMP_LOCK_TIMEOUT_MS": "500"})
    directory = make_repo(home, bucket, "repo")
    (directory / "models/x").mkdir(parents=True)
    (directory / "models/x/x.yaml").write_text(f"id: {MODEL}\n")
    (directory / "mnt").mkdir()
    made.home = directory
    made.env["SWAMP_HOME"] = str(home / "swamp-home")
    return made


def ends(machine, command, code):
    done = machine.run(*command.split(), check=False)
    assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize("command", commands())
def test_an_option_that_no_command_has_is_a_usage_error(fleet, command):
    done = ends(fleet.machine("shell"), f"{command} --no-such-option", USAGE)
    assert done.stderr.startswith("Usage: ")


@pytest.mark.parametrize("command", TO_A_MOUNT)
def test_without_a_mount_a_command_says_so(fleet, command):
    done = ends(fleet.machine("shell"), command, USAGE)
    assert "mount" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", TO_A_DATASTORE)
def test_a_datastore_that_is_away_is_told_in_one_line(repo, command):
    repo.env["AWS_ENDPOINT_URL_S3"] = AWAY
    done = ends(repo, command, TO_A_DATASTORE[command])
    assert "got no answer" in done.stdout + done.stderr
    if command != "doctor":
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", UNDER_THE_LOCK)
def test_a_lock_that_others_hold_is_a_matter_of_trying_again(bucket, repo, command):
    bucket.put(".datastore.lock", record("somebody@elsewhere"))
    done = ends(repo, command.format(model=MODEL), LOCKED)
    assert "somebody@elsewhere" in done.stderr


def test_a_model_that_others_hold_is_a_matter_of_trying_again(bucket, repo):
    bucket.put(f"data/aws/ec2/vpc/{MODEL}/.lock", record("somebody@elsewhere"))
    assert "somebody@elsewhere" in ends(repo, f"lock run aws/ec2/vpc/{MODEL} -- true", LOCKED).stderr


@pytest.mark.parametrize("command", [command for command in TO_A_DATASTORE if not command.startswith("mount")])
def test_done_is_nought(repo, command):
    ends(repo, command.replace("a/b", f"aws/ec2/vpc/{MODEL}"), 0)


def test_every_command_is_in_one_of_these_lists():
    known = {*TO_A_MOUNT, *TO_A_DATASTORE}
    without = {"completion", "version", "conflicts resolve", "conflicts show", "namespace migrate", "namespace unset"}
    left = {
        command for command in commands() if not any(one == command or one.startswith(f"{command} ") for one in known)
    }
    assert left == without, "what needs more than a line is in a test of its own"
