"""``scripts/suite COMMAND…``: run somebody else's test suite on a mount, then look from a machine that knows nothing.

The command runs in a directory of a mounted S3 datastore (SeaweedFS, started here), which is its TMPDIR, too; how it is
mounted can be said as ever, by ``SWAMPFS_…`` in the environment. When it has ended, its tree is unmounted, the bucket
is read without our code, a fresh state directory mounts it, and every directory, file and link is compared: mode,
owner, time in nanoseconds, content. Suites themselves are not part of this repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from swampfs.names import is_scratch
from tests import seaweed
from tests.conftest import BUCKET, Bucket, Fleet
from tests.datastores import check_bucket

Seen = tuple[object, ...]


@contextmanager
def datastore() -> Iterator[tuple[Bucket, Fleet]]:
    """An empty one, and machines to mount it; nothing is left of either."""
    home = Path(tempfile.mkdtemp(prefix="swampfs-suite-"))
    home.chmod(0o755)  # suites try what other users may
    try:
        server = seaweed.start()
        try:
            server.client().create_bucket(Bucket=BUCKET)
            fleet = Fleet(home)
            try:
                yield Bucket(server, "suite"), fleet
            finally:
                fleet.close()
        finally:
            server.stop()
    finally:
        shutil.rmtree(home, ignore_errors=True)


def everything(root: Path) -> dict[str, Seen]:
    """What other machines are to see of a tree; scratch files, pipes, sockets and devices are of this machine."""
    found: dict[str, Seen] = {}
    for directory, names, files in os.walk(root):
        for path in (Path(directory, name) for name in ("", *names, *files)):
            seen = path.lstat()
            content: object = None
            if not stat.S_ISDIR(seen.st_mode) and is_scratch(path.name):
                continue
            if stat.S_ISLNK(seen.st_mode):
                content = (os.readlink(path), seen.st_mtime_ns)
            elif stat.S_ISREG(seen.st_mode):
                content = (seen.st_size, seen.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            elif not stat.S_ISDIR(seen.st_mode):
                continue
            found[str(path.relative_to(root))] = (oct(seen.st_mode), seen.st_uid, seen.st_gid, content)
    return found


def main(command: list[str]) -> int:
    if not command:
        click.echo("usage: scripts/suite COMMAND [ARGUMENT…]", err=True)
        return 1
    with datastore() as (bucket, fleet):
        asked = {key: value for key, value in os.environ.items() if key.startswith("SWAMPFS_")}
        here = fleet.machine("here", {**bucket.env, **asked}, options=())
        here.mount(bucket.url)
        place = here.path / "files/suite"
        place.mkdir(parents=True)
        code = subprocess.run(command, cwd=place, env={**os.environ, "TMPDIR": str(place)}, check=False).returncode
        left = everything(here.path)
        here.umount()
        check_bucket(bucket)
        there = fleet.machine("there", bucket.env, options=())
        there.mount(bucket.url)
        seen = everything(there.path)
        there.umount()
        differences = sorted(path for path in left.keys() | seen.keys() if left.get(path) != seen.get(path))
        complaints = fleet.complaints()
    for path in differences:
        click.echo(f"differs on a fresh machine: {path}: {left.get(path)} became {seen.get(path)}")
    for line in complaints:
        click.echo(f"in the log: {line}")
    click.echo(
        f"the command ended with {code}; {len(left)} names compared on a fresh machine, {len(differences)} differ"
    )
    return code or bool(differences or complaints)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
