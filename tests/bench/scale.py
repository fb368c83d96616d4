"""``scripts/bench scale``: how mounts grow with what they mount, for the tiers of the data model (§9).

The datastore has an index and, but for what is read here, no objects: what is measured does not read any.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from swampfs.names import partition_key
from tests import seaweed

STAMP = "2026-08-03T09:14:22.401Z"
_SPACE = uuid.UUID("6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20")


class Tier(NamedTuple):
    models: int
    names: int
    versions: int


TIERS = {"S": Tier(50, 330, 1), "M": Tier(500, 5_000, 4), "L": Tier(2_000, 25_000, 5), "XL": Tier(5_000, 60_000, 8)}


def paths_of(tier: Tier, model: int) -> list[str]:
    """Each version has its content and its metadata, each name a marker."""
    top = f"data/docker/host/{uuid.uuid5(_SPACE, f'model {model}')}"
    found = []
    for name in range(model, tier.names, tier.models):
        found.append(f"{top}/item-{name}/latest")
        for version in range(1, tier.versions + 1):
            found += [f"{top}/item-{name}/{version}/raw", f"{top}/item-{name}/{version}/metadata.yaml"]
    return found


def shard(paths: list[str], size: int = 1234) -> bytes:
    entries = {}
    for path in paths:
        digest = hashlib.sha256(f"{path} {size}".encode()).hexdigest()
        entries[path] = {"key": path, "size": size, "lastModified": STAMP, "localMtime": STAMP, "sha256": digest}
    return json.dumps({"version": 1, "entries": entries}, separators=(",", ":")).encode()


class Store:
    """The index of one tier in a bucket."""

    def __init__(self, server: seaweed.Server, tier: Tier, name: str) -> None:
        self.client: Any = server.client()
        self.bucket = f"tier-{name.lower()}"
        self.tier = tier
        self.client.create_bucket(Bucket=self.bucket)
        shards: dict[str, list[str]] = {}
        for model in range(tier.models):
            for path in paths_of(tier, model):
                shards.setdefault(partition_key(path) or "_root", []).append(path)
        self.files = sum(map(len, shards.values()))
        self.shards = shards
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self._put(name, shard(shards[name])), shards))
        self._put_meta(1)

    def _put(self, name: str, body: bytes) -> None:
        self.client.put_object(Bucket=self.bucket, Key=f"p/_index/{name}.json", Body=body)

    def _put_meta(self, seq: int) -> None:
        meta = {"version": 2, "partitions": sorted(self.shards), "commitSeq": seq}
        self._put("_meta", json.dumps(meta, separators=(",", ":")).encode())

    def change_one(self) -> tuple[str, int]:
        """As another machine does: a shard, then meta. Returns a path, and what size it has from now on."""
        changed = paths_of(self.tier, self.tier.models // 2)[1]
        name = partition_key(changed) or "_root"
        self._put(name, shard(self.shards[name], 4321))
        self._put_meta(2)
        return changed, 4321


class Mount:
    """A swampfs on it."""

    def __init__(self, server: seaweed.Server, store: Store, home: Path) -> None:
        self.store = store
        self.home = home
        self.mnt = home / "mnt"
        self.mnt.mkdir(parents=True)
        self.env = {**os.environ, **server.environment(), "SWAMP_HOME": str(home / "swamp-home")}
        self.trace = home / "trace.jsonl"

    def swampfs(self, *arguments: str) -> str:
        command = [sys.executable, "-P", "-m", "swampfs", *arguments]
        return subprocess.run(command, env=self.env, check=True, capture_output=True, text=True).stdout

    def up(self) -> None:
        self.swampfs(
            "mount", f"s3://{self.store.bucket}/p", str(self.mnt), "--state-dir", str(self.home / "state"),
            "--refresh", "200ms", "--trace-file", str(self.trace),
        )  # fmt: skip
        os.listdir(self.mnt)

    def down(self) -> None:
        self.swampfs("umount", str(self.mnt))

    def give_up(self) -> None:
        """Whatever happened, nothing stays mounted."""
        subprocess.run(["umount", "-l", self.mnt], capture_output=True)

    def memory_mb(self) -> tuple[int, int]:
        """Resident now, and at the most."""
        pid = (self.home / "state/state/lock").read_text().strip()
        fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        return int(fields["VmRSS"].split()[0]) >> 10, int(fields["VmHWM"].split()[0]) >> 10

    def requests(self) -> int:
        lines = self.trace.read_text().splitlines()
        return sum(json.loads(line)["outcome"] != "unchanged" for line in lines)


def measure(server: seaweed.Server, name: str, scratch: Path, at_end: ExitStack) -> None:
    store = Store(server, TIERS[name], name)
    print(f"tier {name}: {store.files} files in {len(store.shards)} shards", flush=True)
    mount = Mount(server, store, scratch / name)

    at_end.callback(mount.give_up)

    def timed(what: str, fn: Callable[[], object]) -> None:
        if mount.trace.exists():
            os.truncate(mount.trace, 0)
        started = time.perf_counter()
        fn()
        elapsed, (now, most) = time.perf_counter() - started, mount.memory_mb()
        requests = mount.requests()
        print(f"  {what:34} {elapsed:8.2f} s {requests:6} requests   {now:5} MB, at most {most} MB", flush=True)

    def see_a_change() -> None:
        path, size = store.change_one()
        while (mount.mnt / path).stat().st_size != size:
            time.sleep(0.002)

    def push_one() -> None:
        (mount.mnt / paths_of(store.tier, 0)[1]).write_bytes(b"changed")
        mount.swampfs("flush", str(mount.mnt))

    def find() -> None:
        subprocess.run(["find", mount.mnt], check=True, stdout=subprocess.DEVNULL)

    timed("first mount, to the first ls", mount.up)
    timed("find", find)
    timed("find again", find)
    timed("one remote change is seen", see_a_change)
    timed("one change is pushed", push_one)
    mount.down()
    timed("mounted again, to the first ls", mount.up)
    mount.down()
    size = sum(path.stat().st_size for path in (mount.home / "state/state").glob("catalog.db*"))
    print(f"  {'catalog':34} {size / 1e6:8.1f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench scale")
    parser.add_argument("tiers", nargs="*", default=["S", "M", "L"], help=f"of {', '.join(TIERS)}")
    arguments = parser.parse_args()
    with ExitStack() as at_end:
        scratch = Path(tempfile.mkdtemp(prefix="swampfs-bench-"))
        at_end.callback(shutil.rmtree, scratch, ignore_errors=True)
        server = seaweed.start()
        at_end.callback(server.stop)
        for name in arguments.tiers:
            measure(server, name, scratch, at_end)


if __name__ == "__main__":
    main()
