"""Locks through real mounts: what one machine holds, every other one sees."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import threading
import time
import uuid

import pytest
import trio

from swampfs.datastore import create_provider
from swampfs.provider import LockOptions
from swampfs.records import timestamp
from swampfs.testing.sample import sample_files
from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
LOCK = f"{MODEL}/.lock"
FILES = [(f"{MODEL}/n/1/raw", b"one"), (f"{MODEL}/n/1/metadata.yaml", b"{}"), (f"{MODEL}/n/latest", b"1")]


@pytest.fixture
def two(bucket, fleet):
    load_shards(bucket, FILES)
    machines = [fleet.machine(name, bucket.env) for name in "ab"]
    for machine in machines:
        machine.mount(bucket.url)
    yield machines
    for machine in machines:
        machine.umount()


@pytest.fixture
def library(bucket, monkeypatch):
    """The object-store client of this project, beside the mounts."""
    for name, value in bucket.env.items():
        monkeypatch.setenv(name, value)
    config = {
        "bucket": bucket.url.split("/")[2],
        "prefix": bucket.prefix,
        "endpoint": bucket.env["AWS_ENDPOINT_URL_S3"],
        "region": "us-east-1",
        "forcePathStyle": True,
    }
    return create_provider("@swamp/s3-datastore", config)


def record(nonce=None, *, host="elsewhere", pid=4242, age_s=0.0, ttl_ms=30_000):
    fields = {
        "holder": f"somebody@{host}",
        "hostname": host,
        "pid": pid,
        "acquiredAt": timestamp(time.time_ns() - int(age_s * 1e9)),
        "ttlMs": ttl_ms,
        "nonce": nonce or str(uuid.uuid4()),
    }
    return json.dumps(fields, indent=2).encode()


def take(path, body=b""):
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    if body:
        os.write(fd, body)
    os.close(fd)


def taken(path):
    """Whether it could be taken just now."""
    try:
        take(path)
    except FileExistsError:
        return False
    return True


def waiting(machine, seen):
    """Whether ``status`` shows a writer that waits; what it shows goes to ``seen``."""
    locks = [lock for lock in machine.status()["locks"] if lock["state"] == "waiting"]
    if locks:
        seen.append(locks)
    return bool(locks)


def test_a_lock_file_is_held_everywhere_from_its_creation_to_its_removal(two, bucket):
    a, b = two
    body = record(host=socket.gethostname(), pid=os.getpid())
    take(a.path / LOCK, body)
    assert bucket.get(LOCK) == body
    with pytest.raises(FileExistsError):
        take(b.path / LOCK)
    assert json.loads((b.path / LOCK).read_bytes()) == json.loads(body)
    with pytest.raises(OSError) as refused:
        (b.path / LOCK).write_text("mine now")
    assert refused.value.errno == errno.EBUSY
    (a.path / LOCK).unlink()
    assert not (b.path / LOCK).exists()
    take(b.path / LOCK)
    with pytest.raises(FileExistsError):
        take(a.path / LOCK)
    (b.path / LOCK).unlink()


def test_a_heartbeat_in_place_and_a_rename_over_renew_the_lock(two, bucket):
    a, _ = two
    nonce = str(uuid.uuid4())
    take(a.path / LOCK, record(nonce))
    beat = record(nonce, age_s=-1)
    (a.path / LOCK).write_bytes(beat)  # truncate and write, as swamp's heartbeat does
    assert bucket.get(LOCK) == beat
    assert (a.path / LOCK).read_bytes() == beat
    again = record(nonce, age_s=-2)
    temporary = a.path / MODEL / f".{uuid.uuid4()}.tmp"
    temporary.write_bytes(again)
    os.replace(temporary, a.path / LOCK)
    assert bucket.get(LOCK) == again
    assert not temporary.exists()
    (a.path / LOCK).unlink()
    assert LOCK not in bucket.keys()


def test_the_holder_of_a_lock_sees_the_latest_state_and_publishes_before_it_lets_go(two):
    a, b = two
    counter = f"{MODEL}/n/1/raw"
    (a.path / counter).read_bytes(), (b.path / counter).read_bytes()
    for turn in range(6):
        machine = two[turn % 2]
        take(machine.path / LOCK)
        new = machine.path / f"{MODEL}/n/made-{turn}"
        assert not new.exists()
        assert not turn or (machine.path / f"{MODEL}/n/made-{turn - 1}").read_text() == "x" * turn
        value = (machine.path / counter).read_bytes()
        assert value == (b"one" if not turn else b"%d" % turn)
        (machine.path / counter).write_bytes(b"%d" % (turn + 1))
        new.write_text("x" * (turn + 1))
        (machine.path / LOCK).unlink()


def test_a_file_held_open_across_locks_is_published_each_time(two):
    a, b = two
    counter = f"{MODEL}/n/1/raw"
    with open(a.path / counter, "r+b") as file:
        for turn in (b"1st", b"2nd"):
            take(a.path / LOCK)
            file.seek(0)
            file.write(turn)
            file.flush()
            (a.path / LOCK).unlink()
            take(b.path / LOCK)
            assert (b.path / counter).read_bytes() == turn
            (b.path / LOCK).unlink()


@pytest.mark.parametrize("key", [".datastore.lock", LOCK])
def test_a_lock_of_the_object_store_client_is_seen_through_the_mount_and_the_other_way_round(two, bucket, key, library):
    a, _ = two

    async def main():
        lock = library.create_lock("/d", LockOptions(lock_key=key, max_wait_ms=300, retry_interval_ms=50))
        await lock.acquire()
        assert json.loads((a.path / key).read_bytes())["nonce"] == (await lock.inspect()).nonce
        with pytest.raises(FileExistsError):
            take(a.path / key)
        await lock.release()
        assert not (a.path / key).exists()
        take(a.path / key, body := record())
        holder = await lock.inspect()
        assert holder.nonce == json.loads(body)["nonce"]
        assert not await lock.force_release(str(uuid.uuid4()))  # a stale nonce
        assert (a.path / key).exists()
        assert await lock.force_release(holder.nonce)
        await lock.acquire()
        with pytest.raises(OSError) as refused:
            (a.path / key).unlink()  # it is another's by now
        assert refused.value.errno == errno.EBUSY
        assert await lock.inspect() is not None
        await lock.release()

    trio.run(main)
    assert check_bucket(bucket)


def test_a_lock_of_another_machine_looks_alive_to_swamp_here_until_it_is_stale(two, bucket):
    """Swamp tests the process id on this host and the wall clock; both are wrong for another machine's lock."""
    a, _ = two
    dead = int(subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True).stdout)
    bucket.put(LOCK, record("n-1", pid=dead, age_s=1200))  # its clock is twenty minutes behind
    shown = json.loads((a.path / LOCK).read_bytes())
    assert os.path.exists(f"/proc/{shown['pid']}")
    assert shown["nonce"] == "n-1" and shown["holder"] == "somebody@elsewhere"
    assert time.time() - time.mktime(time.strptime(shown["acquiredAt"], "%Y-%m-%dT%H:%M:%S.%fZ")) + time.timezone < 30
    bucket.put(LOCK, record("n-2", pid=dead, age_s=-1200, ttl_ms=1000))  # from the future, and it does not move
    assert (a.path / LOCK).exists()
    wait_for(lambda: not (a.path / LOCK).exists(), "nobody keeps it alive: nobody has it")


def test_a_stale_lock_gives_way_to_a_new_one(two, bucket):
    a, _ = two
    bucket.put(LOCK, record(ttl_ms=700))
    with pytest.raises(FileExistsError):
        take(a.path / LOCK)
    wait_for(lambda: taken(a.path / LOCK), "the stale one gives way")
    assert json.loads(bucket.get(LOCK))["hostname"] == socket.gethostname()
    (a.path / LOCK).unlink()


def test_many_threads_of_two_machines_take_one_lock_one_at_a_time(two):
    inside, most = [], []

    def work(machine):
        for _ in range(5):
            while True:
                try:
                    take(machine.path / LOCK)
                    break
                except FileExistsError:
                    time.sleep(0.01)
            inside.append(machine)
            most.append(len(inside))
            time.sleep(0.005)
            inside.pop()
            (machine.path / LOCK).unlink()

    threads = [threading.Thread(target=work, args=(two[n % 2],)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 30


def test_a_writer_takes_the_model_lock_and_gives_it_back_after_the_push(two, bucket):
    a, b = two
    (a.path / MODEL / "n/1/raw").write_text("two")
    held = map(json.loads, (a.path / ".swampfs/locks").read_text().splitlines())  # at once: it is given back soon
    assert [lock["lock"] for lock in held if lock["state"] == "held"] == [LOCK]
    assert json.loads(bucket.get(LOCK))["hostname"] == socket.gethostname()
    assert not (a.path / LOCK).exists()  # our own users do not wait for us
    assert (b.path / LOCK).exists()
    wait_for(lambda: LOCK not in bucket.keys(), "the lock is given back")
    assert (b.path / MODEL / "n/1/raw").read_text() in ("one", "two")
    check_bucket(bucket)


def test_readers_never_take_a_lock(two, bucket):
    a, b = two
    before = bucket.keys()
    bucket.put(LOCK, record())
    bucket.put(".datastore.lock", record())
    subprocess.run(["grep", "-rc", "one", str(a.path)], stdout=subprocess.DEVNULL, timeout=10)
    assert (b.path / MODEL / "n/1/raw").read_bytes() == b"one"
    bucket.delete(LOCK)
    bucket.delete(".datastore.lock")
    assert bucket.keys() == before
    assert not [r for r in [*a.requests(), *b.requests()] if r["op"] == "put" and r["key"].endswith(".lock")]


def test_a_writer_waits_for_another_machine_and_goes_on_from_its_version(two):
    a, b = two
    raw = f"{MODEL}/n/1/raw"
    (a.path / raw).write_text("from A")
    with open(b.path / raw, "a") as file:  # waits until A has pushed
        file.write(", then B")
    b.flush()
    wait_for(lambda: (a.path / raw).read_text() == "from A, then B", "nothing is lost")
    assert a.status()["conflicts"] == b.status()["conflicts"] == 0


def test_a_writer_at_work_for_long_is_never_held_up_by_its_own_mount(two):
    a, b = two
    longest, until, number = 0.0, time.monotonic() + 9, 0  # a lock is closed to new writers after five seconds
    while time.monotonic() < until:
        began = time.monotonic()
        (a.path / MODEL / "n/1/raw").write_text(str(number))
        longest, number = max(longest, time.monotonic() - began), number + 1
    assert longest < 3, f"one of {number} writes took {longest:.1f} s"
    a.flush()
    wait_for(lambda: (b.path / MODEL / "n/1/raw").read_text() == str(number - 1), "the last one arrives")


def test_a_writer_that_waited_too_long_gets_ebusy_and_the_holder_is_named(bucket, fleet):
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "300ms", "--push-delay", "100ms", "--timeout", "2s"))
    a.mount(bucket.url)
    bucket.put(LOCK, record())
    seen = []
    watcher = threading.Thread(target=lambda: wait_for(lambda: waiting(a, seen), "status names the holder"))
    watcher.start()
    started = time.monotonic()
    with pytest.raises(OSError) as refused:
        (a.path / MODEL / "n/1/raw").write_text("no")
    assert refused.value.errno == errno.EBUSY
    assert time.monotonic() - started < 2 + 5, "its --timeout, and what a busy machine adds"
    watcher.join()
    assert [(lock["lock"], lock["state"], lock["by"]) for lock in seen[0]] == [(LOCK, "waiting", "somebody@elsewhere")]
    assert (a.path / MODEL / "n/1/raw").read_text() == "one"
    (a.path / "audit").mkdir()
    (a.path / "audit/x.jsonl").write_text("what has another lock goes on\n")
    a.umount()


def test_a_structural_command_elsewhere_holds_up_writers_of_models(bucket, fleet):
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "300ms", "--push-delay", "100ms", "--timeout", "2s"))
    a.mount(bucket.url)
    bucket.put(".datastore.lock", record())
    with pytest.raises(OSError) as refused:
        (a.path / MODEL / "n/1/raw").write_text("no")
    assert refused.value.errno == errno.EBUSY
    assert LOCK not in bucket.keys()  # it waits for model locks to go
    bucket.delete(".datastore.lock")
    (a.path / MODEL / "n/1/raw").write_text("yes")
    a.umount()


@pytest.mark.parametrize("how", ["environment", "the holder itself"])
def test_a_child_of_the_locks_holder_does_not_wait_for_it(bucket, fleet, how):
    """Lesson 33: the parent holds the model's lock and waits for the child, which writes through the mount."""
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "300ms", "--push-delay", "100ms", "--timeout", "5s"))
    a.mount(bucket.url)
    bucket.put(LOCK, record(host=socket.gethostname(), pid=os.getpid() if how != "environment" else 999_999))
    raw = a.path / MODEL / "n/1/raw"
    if how == "environment":
        env = {**os.environ, "SWAMP_LOCK_HOLDER_PID": "999999"}
        subprocess.run(["sh", "-c", f"echo child > {raw}"], env=env, check=True, timeout=20)
    else:
        raw.write_text("child\n")  # who waits here ends with EBUSY
    a.flush()  # under the parent's lock, which is still held
    assert check_bucket_but(bucket, LOCK)[f"{MODEL}/n/1/raw"] == b"child\n"
    bucket.delete(LOCK)
    a.umount()


def check_bucket_but(bucket, lock):
    body = bucket.get(lock)
    bucket.delete(lock)
    try:
        return check_bucket(bucket)
    finally:
        bucket.put(lock, body)


def test_swamps_global_lock_through_the_mount_lists_the_model_locks_of_others(two, bucket):
    """A structural command looks for model locks in the tree until there are none (spec §9.4)."""
    a, _ = two
    bucket.put(LOCK, record())
    take(a.path / ".datastore.lock", record())
    found = subprocess.run(
        ["find", str(a.path), "-name", "*.lock"], capture_output=True, text=True, check=True
    ).stdout.split()  # fmt: skip
    assert sorted(found) == sorted([str(a.path / ".datastore.lock"), str(a.path / LOCK)])
    bucket.delete(LOCK)
    wait_for(lambda: ".lock" not in os.listdir(a.path / MODEL), "the other's lock is gone from the listing")
    (a.path / "files").mkdir()
    (a.path / "files/x").write_text("under the global lock")
    (a.path / MODEL / "n/1/raw").write_text("a model, too")
    a.flush()  # with the user's lock, not against it
    (a.path / ".datastore.lock").unlink()
    assert check_bucket(bucket)["files/x"] == b"under the global lock"


def test_a_write_under_a_lock_that_was_lost_is_never_published_over_its_successors(two, bucket):
    a, b = two
    raw = f"{MODEL}/n/1/raw"
    take(a.path / LOCK, record(ttl_ms=1000))
    (a.path / raw).read_bytes()
    with pytest.raises(FileExistsError):
        take(b.path / LOCK)  # from here on B sees that it does not move: its holder is paused
    wait_for(lambda: taken(b.path / LOCK), "it has expired")
    (b.path / raw).write_text("successor")
    with pytest.raises(OSError):
        (a.path / LOCK).write_bytes(record())  # its heartbeat
    with pytest.raises(OSError):
        (a.path / LOCK).unlink()
    assert LOCK in bucket.keys()
    (b.path / LOCK).unlink()
    wait_for(lambda: (a.path / raw).read_text() == "successor", "the successor's version")


def test_a_directory_made_on_one_machine_cannot_be_made_on_another(two, bucket):
    a, b = two
    (a.path / MODEL / "n/2").mkdir()
    with pytest.raises(FileExistsError):
        (b.path / MODEL / "n/2").mkdir()
    assert (b.path / MODEL / "n/2").is_dir()
    (b.path / MODEL / "n/2").rmdir()
    wait_for(lambda: LOCK not in bucket.keys(), "B gave the lock back")
    (a.path / MODEL / "n/3").mkdir()
    assert not (a.path / MODEL / "n/2").exists()
    a.flush()
    assert "_control/swampfs/reserved/" + MODEL + ".json" in bucket.keys()
    (a.path / MODEL / "n/3/raw").write_text("filled")
    a.flush()
    assert not [key for key in bucket.keys() if key.startswith("_control/")]


def test_of_two_machines_that_create_one_name_exclusively_one_wins(two):
    winners = []

    def race(machine, number):
        try:
            fd = os.open(machine.path / f"files/n-{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return
        os.write(fd, machine.name.encode())
        os.close(fd)
        winners.append(number)

    two[0].path.joinpath("files").mkdir()
    two[0].flush()
    two[1].path.joinpath("files").mkdir(exist_ok=True)
    for number in range(5):
        threads = [threading.Thread(target=race, args=(machine, number)) for machine in two]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(winners) == list(range(5))


def test_many_samples_stay_quiet(two, bucket):
    """A copied tree takes the locks of its models, pushes, and leaves none behind."""
    a, _ = two
    for rel, body in sample_files(models=3):
        (a.path / rel).parent.mkdir(parents=True, exist_ok=True)
        (a.path / rel).write_bytes(body)
    a.flush()
    assert not [key for key in bucket.keys() if key.endswith(".lock")]
    check_bucket(bucket)


def test_the_lock_of_a_dead_maker_is_given_up_after_its_ttl(bucket, fleet):
    """Nobody renews it: here, too, it may be taken then."""
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "300ms", "--push-delay", "200ms", "--lock-ttl", "1s"))
    a.mount(bucket.url)
    subprocess.run(["sh", "-c", f"set -C; : > {a.path / LOCK}"], check=True)
    with pytest.raises(FileExistsError):
        take(a.path / LOCK)
    wait_for(lambda: taken(a.path / LOCK), "its maker is dead")
    first = bucket.get(LOCK)
    renewed = []
    wait_for(lambda: renewed or (bucket.get(LOCK) != first and renewed.append(bucket.get(LOCK))), "this maker lives")
    wait_for(lambda: bucket.get(LOCK) not in (first, renewed[0]), "it is renewed again and again")
    assert (a.path / LOCK).exists()
    (a.path / LOCK).unlink()
    a.umount()


def test_an_idle_file_that_was_made_and_is_still_open_keeps_no_other_writer_out(bucket, fleet):
    """``longjob > out.log &``: its lock cannot be handed on, but everybody here goes on writing under it."""
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "300ms", "--push-delay", "100ms", "--timeout", "5s"))
    a.mount(bucket.url)
    with open(a.path / MODEL / "out.txt", "w"):
        started = time.monotonic()
        while time.monotonic() - started < 7:
            (a.path / MODEL / "other.txt").write_text("x")  # who is kept out ends with EBUSY
            time.sleep(0.3)
    a.umount()


def test_two_renames_that_need_each_others_locks_both_succeed(two):
    a, b = two
    for machine, name in ((a, "x"), (b, "y")):
        (machine.path / f"files/{name}").mkdir(parents=True)
        (machine.path / f"files/{name}/own").write_text(machine.name)
        machine.flush()
    wait_for(lambda: (a.path / "files/y/own").exists() and (b.path / "files/x/own").exists(), "both are seen")
    (a.path / "files/x/f").write_text("a")
    (b.path / "files/y/f").write_text("b")
    failures = []

    def move(machine, source, target):
        try:
            os.rename(machine.path / source, machine.path / target)
        except OSError as error:
            failures.append(error)

    threads = [
        threading.Thread(target=move, args=(a, "files/x/f", "files/y/from-a")),
        threading.Thread(target=move, args=(b, "files/y/f", "files/x/from-b")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    a.flush()
    b.flush()
    wait_for(lambda: (b.path / "files/y/from-a").read_text() == "a", "and are published")
    assert (a.path / "files/x/from-b").read_text() == "b"


def test_a_directory_of_many_models_moves_by_one_lock_after_the_other(two):
    a, b = two
    for number in range(70):
        directory = a.path / f"data/many/m-{number}/n/1"
        directory.mkdir(parents=True)
        (directory / "raw").write_text(str(number))
    with pytest.raises(OSError) as refused:
        os.rename(a.path / "data/many", a.path / "data/moved")
    assert refused.value.errno == errno.EXDEV
    subprocess.run(["mv", str(a.path / "data/many"), str(a.path / "data/moved")], check=True, timeout=60)
    a.flush()
    wait_for(lambda: len(list((b.path / "data/moved").glob("*/n/1/raw"))) == 70, "the other machine sees it")
    wait_for(lambda: not (b.path / "data/many").exists(), "and that nothing is left where it was")


def test_a_moved_file_does_not_keep_the_kernel_from_hearing_of_changes(two):
    a, b = two
    for name in ("p", "q"):
        (a.path / f"files/{name}").mkdir(parents=True)
    (a.path / "files/p/x").write_text("x")
    (a.path / "files/q/f").write_text("old")
    os.rename(a.path / "files/p/x", a.path / "files/q/x")
    a.flush()
    wait_for(lambda: (b.path / "files/q/f").exists(), "it is seen")
    with open(a.path / "files/q/f") as held_open:
        (b.path / "files/q/f").write_text("new and longer")
        b.flush()
        wait_for(lambda: (a.path / "files/q/f").stat().st_size == len("new and longer"), "stat sees it", 5)
        assert held_open.read() == "old"


def test_a_user_of_the_global_lock_goes_on_writing_while_removals_wait(two, bucket):
    a, b = two
    (a.path / "files/p").mkdir(parents=True)
    (a.path / "files/p/seed").touch()
    a.flush()
    wait_for(lambda: (b.path / "files/p/seed").exists(), "it is there")
    with open(a.path / ".datastore.lock", "x") as lock:
        lock.write("mine")
    (a.path / "files/p/seed").unlink()
    number, enough = 0, time.monotonic() + 8  # longer than our own lock is held for one writer after another
    while time.monotonic() < enough:
        (a.path / f"files/p/new-{number}").touch()
        number += 1
        time.sleep(0.3)
    wait_for(lambda: (b.path / "files/p/new-0").exists(), "what is written is published")
    assert (b.path / "files/p/seed").exists(), "what is removed may be about to be replaced"
    (a.path / ".datastore.lock").unlink()
    wait_for(lambda: not (b.path / "files/p/seed").exists(), "with the lock, that is over")


def test_what_a_killed_holder_of_a_lock_file_left_half_done_is_published_when_its_lock_ends(bucket, fleet):
    load_shards(bucket, FILES)
    a = fleet.machine("a", bucket.env, options=("--refresh", "200ms", "--push-delay", "200ms", "--lock-ttl", "2s"))
    a.mount(bucket.url)
    script = f"set -C; echo x > {a.path / LOCK}; rm {a.path / MODEL}/n/1/raw; sleep 60"
    holder = subprocess.Popen(["bash", "-c", script], start_new_session=True)
    try:
        wait_for(lambda: not (a.path / MODEL / "n/1/raw").exists(), "it works under the lock")
        enough = time.monotonic() + 1
        while time.monotonic() < enough:
            assert f"{MODEL}/n/1/raw" in bucket.keys(), "the lock is held"
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.wait()
    wait_for(lambda: f"{MODEL}/n/1/raw" not in bucket.keys(), "the removal is published")
