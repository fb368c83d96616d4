"""``scripts/bench mounts``: the work of a shell on a datastore, on swampfs and its peers, near and 20 ms away.

The datastore is reached over TLS, as in the field. Every row is measured on one file system after the other, and again,
so that what else happens on the machine meets all of them. Cold is a mount that knows nothing; warm is the second time.
"""

from __future__ import annotations

import argparse
import io
import json
import mmap
import os
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any

from swampfs.names import partition_key
from swampfs.records import timestamp
from tests import seaweed
from tests.bench import peers, report
from tests.bench.delay import delayed
from tests.datastores import load_shards
from tests.tls import make_certificate

DIRECTORIES, IN_EACH, SIZE = 100, 100, 4096
BIG = 256 << 20
NEW = 1000  # files written
BIG_NAME = "data/bench/large/big"
WRITTEN, VISIBLE = "write 1000 files of 4 KiB", "write 1000 files of 4 KiB, visible remotely"
_PATIENCE_S = 30.0  # for one measurement: who took longer is measured once
_BALLAST = 3 << 29
_REST_S = 1.0  # for what the first time began: verification, and the disk's own writing


def small_files() -> Iterator[tuple[str, bytes]]:
    for directory in range(DIRECTORIES):
        for number in range(IN_EACH):
            rel = f"data/bench/model-{directory:03}/f{number:03}"
            yield rel, (f"{rel} line\n" * (SIZE // 20))[:SIZE].ljust(SIZE).encode()


def big_file() -> bytes:
    return os.urandom(1 << 20) * (BIG >> 20)


class Bucket:
    """What :mod:`tests.datastores` asks of one."""

    def __init__(self, server: seaweed.Server, name: str, prefix: str = "") -> None:
        self.client: Any = server.client()
        self.name = name
        self.prefix = prefix
        with suppress(self.client.exceptions.BucketAlreadyExists, self.client.exceptions.BucketAlreadyOwnedByYou):
            self.client.create_bucket(Bucket=name)
        self._pool = ThreadPoolExecutor(8)
        self._puts: list[Any] = []

    def put(self, key: str, body: bytes) -> None:
        self._puts.append(self._pool.submit(self.client.put_object, Bucket=self.name, Key=self.prefix + key, Body=body))

    def settle(self) -> None:
        for put in self._puts:
            put.result()
        self._puts.clear()

    def find(self, key: str) -> bytes | None:
        with suppress(self.client.exceptions.NoSuchKey):
            found: bytes = self.client.get_object(Bucket=self.name, Key=self.prefix + key)["Body"].read()
            return found
        return None

    def keys(self, below: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.prefix + below)
        return [item["Key"] for page in pages for item in page.get("Contents", ())]


class Site:
    """The server, the data on it in three forms, and everybody's homes."""

    def __init__(self, server: seaweed.Server, scratch: Path, certificate: Path) -> None:
        self.server = server
        self.certificate = certificate
        self.scratch = scratch
        self.numbers = count(1)
        self.ours, self.plain = Bucket(server, "bench", "tree/"), Bucket(server, "plain")
        Bucket(server, "juice")
        files = [*small_files(), (BIG_NAME, big_file())]
        load_shards(self.ours, files, stamp=timestamp(time.time_ns() + 3600 * 10**9))  # after all of them are there
        for rel, body in files:
            self.plain.put(rel, body)
        self.ours.settle()
        self.plain.settle()
        self.native = scratch / "bindfs/native"
        for rel, body in files:
            path = self.native / rel
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        self.names = [rel for rel, _ in small_files()]
        self.archive = scratch / "new.tar"
        with tarfile.open(self.archive, "w") as archive:
            for number in range(NEW):
                info = tarfile.TarInfo(f"f{number:04}")
                info.size = SIZE
                archive.addfile(info, io.BytesIO(os.urandom(SIZE)))

    def juicefs(self, at_end: ExitStack) -> peers.Juicefs:
        """With the same files in it."""
        made = peers.Juicefs(self.server, self.server.endpoint, self.scratch / "juicefs", self.certificate)
        made.start()
        at_end.callback(made.stop)
        made.format()
        with made.mounted(cold=True) as mnt:
            subprocess.run(["cp", "-r", f"{self.native}/.", mnt], check=True)
        return made


def run(command: str, cwd: Path) -> float:
    """Seconds it takes, up to the most."""
    with subprocess.Popen(command, shell=True, cwd=cwd, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        started = time.perf_counter()
        end = threading.Timer(report.LONGEST_S, os.killpg, (process.pid, signal.SIGKILL))
        end.start()
        code = process.wait()  # with a timeout it would look every 50 ms
        took_s = time.perf_counter() - started
        end.cancel()
        if code and took_s < report.LONGEST_S:
            raise subprocess.CalledProcessError(code, command)
        return min(took_s, report.LONGEST_S)


def memory_at_hand() -> None:
    """A virtual machine asks its host for memory that nobody used of late, and waits longer than what is measured."""
    with ExitStack() as at_end:
        for advice in (mmap.MADV_NOHUGEPAGE, mmap.MADV_HUGEPAGE):  # small pieces, and large ones
            ballast = mmap.mmap(-1, _BALLAST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            at_end.callback(ballast.close)
            ballast.madvise(advice)
            for offset in range(0, _BALLAST, mmap.PAGESIZE):
                ballast[offset] = 1


class Measurement:
    """Rows over a set of file systems at one distance."""

    def __init__(self, site: Site, systems: list[peers.Peer], title: str, wanted: str) -> None:
        self.site = site
        self.systems = systems
        self.report = report.Report(title)
        self.wanted = wanted.split(",")

    def wants(self, name: str) -> bool:
        return any(wanted in name for wanted in self.wanted)

    def row(self, name: str, measure: Callable[[peers.Peer], float]) -> None:
        if not self.wants(name):
            return
        for system in self._left(name):
            self.report.add(name, system.name, measure(system))

    def _left(self, row: str) -> list[peers.Peer]:
        return [system for system in self.systems if self.report.longest(row, system.name) < _PATIENCE_S]

    def cold(self, command: str) -> Callable[[peers.Peer], float]:
        def measure(system: peers.Peer) -> float:
            with system.mounted(cold=True) as mnt:
                memory_at_hand()
                return run(command, mnt)

        return measure

    def warm(self, command: str, before: str) -> Callable[[peers.Peer], float]:
        def measure(system: peers.Peer) -> float:
            with system.mounted(cold=True) as mnt:
                run(before, mnt)
                run(command, mnt)
                time.sleep(_REST_S)
                return run(command, mnt)

        return measure

    def write(self, system: peers.Peer) -> tuple[float, float]:
        """Seconds until a tar is unpacked, and until the datastore has all of it."""
        target = f"data/bench/new-{next(self.site.numbers):03}/output/1"  # a version, as swamp's models write them
        with system.mounted(cold=True) as mnt:
            (mnt / target).mkdir(parents=True)
            memory_at_hand()
            started = time.perf_counter()
            run(f"tar xf {self.site.archive} -C {target}", mnt)
            written = time.perf_counter() - started
            visible = written
            while self.remote_files(system, target) < NEW and visible < report.LONGEST_S:
                time.sleep(0.02)
                visible = time.perf_counter() - started
            shutil.rmtree(mnt / target)
        return written, visible

    def remote_files(self, system: peers.Peer, target: str) -> int:
        if isinstance(system, peers.Swampfs):
            shard = self.site.ours.find(f"_index/{partition_key(f'{target}/f')}.json")
            return len(json.loads(shard)["entries"]) if shard else 0
        if isinstance(system, peers.Juicefs):
            return NEW  # a file that is closed is uploaded, and its metadata is on this machine
        return len(self.site.plain.keys(f"{target}/f"))

    def writes(self) -> None:
        if not self.wants(VISIBLE):
            return
        for system in self._left(VISIBLE):
            written, visible = self.write(system)
            self.report.add(WRITTEN, system.name, written)
            self.report.add(VISIBLE, system.name, visible)

    def far(self) -> None:
        """One round over what is bound by the distance."""
        for bucket in (self.site.ours, self.site.plain):
            bucket.find(BIG_NAME)  # the first to ask would otherwise wait for the server's disk
        listed = self.site.scratch / "list"
        listed.write_text("\n".join(islice(self.site.names, 1000)))
        twenty = " ".join(f"data/bench/model-{number:03}" for number in range(20))
        self.row("cold find, 10 000 files", self.cold("find . -type f"))
        self.row("cold cat of 1000 files, one after the other", self.cold(f"xargs -a {listed} cat"))
        self.row("cold grep -r of 2000 files", self.cold(f"grep -r 'no such line' {twenty} || true"))
        self.row("cold head -c 100 of 256 MiB", self.cold(f"head -c 100 {BIG_NAME}"))
        self.row("cold read of 256 MiB", self.cold(f"cat {BIG_NAME} > /dev/null"))
        self.writes()

    def near(self) -> None:
        """One round over what is bound by the file system itself."""
        everything = "grep -r 'no such line' data/bench --exclude-dir=large || true"
        self.row("warm find, 10 000 files", self.warm("find . -type f", "true"))
        self.row("warm ls -lR", self.warm("ls -lR .", "true"))
        self.row("warm grep -r of 10 000 files", self.warm(everything, everything))
        self.row("warm read of 256 MiB", self.warm(f"dd if={BIG_NAME} of=/dev/null bs=1M status=none", "true"))
        self.row(
            "write 64 MiB by 4 KiB", self.cold("dd if=/dev/zero of=data/bench/large/new bs=4k count=16384 status=none")
        )


class Native(peers.Peer):
    """The local disk."""

    name = "native"

    def command(self) -> list[str]:
        return ["true"]

    def mount(self) -> None:
        self.mnt = self.home / "native"

    def umount(self) -> None:
        (self.mnt / "data/bench/large/new").unlink(missing_ok=True)

    def forget(self) -> None:
        return


def systems_of(site: Site, endpoint: str, wanted: list[str]) -> list[peers.Peer]:
    found: list[peers.Peer] = []
    for kind in peers.ALL:
        if kind.name in wanted and kind is not peers.Juicefs:
            found.append(kind(site.server, endpoint, site.scratch / kind.name, site.certificate))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench mounts")
    parser.add_argument("--rtt", type=float, action="append", help="milliseconds; may be repeated (0 and 20)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name has one of these in it, separated by commas")
    parser.add_argument("--peers", default="rclone,juicefs,s3fs")
    parser.add_argument("--output", type=Path, help="where to write NAME.json and NAME.svg")
    arguments = parser.parse_args()
    wanted = ["swampfs", *filter(None, arguments.peers.split(","))]
    reports = []
    with ExitStack() as at_end:
        scratch = Path(tempfile.mkdtemp(prefix="swampfs-bench-"))
        at_end.callback(shutil.rmtree, scratch, ignore_errors=True)
        certificate = make_certificate(scratch)
        server = seaweed.start(certificate)
        at_end.callback(server.stop)
        site = Site(server, scratch, certificate[0])
        juicefs = site.juicefs(at_end) if "juicefs" in wanted else None
        for rtt_ms in arguments.rtt or [20.0, 0.0]:
            with ExitStack() as far:
                port = far.enter_context(delayed(server.secure_port, rtt_ms / 1000))
                endpoint = f"https://127.0.0.1:{port}"
                systems = systems_of(site, endpoint, wanted)
                if juicefs is not None:
                    juicefs.move(endpoint, far.enter_context(delayed(juicefs.redis_port, rtt_ms / 1000)))
                    systems.append(juicefs)
                measurement = Measurement(site, systems, f"{rtt_ms:g} ms away", arguments.only)
                for number in range(arguments.repeat):
                    print(f"{rtt_ms:g} ms away, round {number + 1}", flush=True)
                    measurement.far()
                if not rtt_ms:
                    at_hand = [
                        kind(server, endpoint, scratch / "bindfs", site.certificate) for kind in (Native, peers.Bindfs)
                    ]
                    collecting = peers.Collecting(server, endpoint, scratch / "collecting", site.certificate)
                    measurement.systems = [*systems, collecting, *at_hand]
                    for _ in range(arguments.repeat):
                        measurement.near()
                reports.append(measurement.report)
                if arguments.output:
                    report.write(reports, peers.versions(wanted), arguments.output)
    for found in reports:
        print(f"\n{found.table()}")


if __name__ == "__main__":
    main()
