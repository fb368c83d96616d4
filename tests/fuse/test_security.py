"""What docs/security.md promises: least privileges, TLS, places only their owner may look into, no secret anywhere."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest

from swampfs import registry
from swampfs.testing.sample import sample_files
from tests.conftest import Bucket
from tests.datastores import check_bucket, load_shards
from tests.harness import tree
from tests.seaweed import CORNER, LEAST_READER, LEAST_WRITER, SECRET_KEY
from tests.tls import make_certificate

NOBODY = 65534


@pytest.fixture
def corner(server, request):
    """Where those with the least privileges may work."""
    return Bucket(server, f"{CORNER}/{request.node.name[:40]}")


def may_only(bucket, access_key):
    return {**bucket.env, "AWS_ACCESS_KEY_ID": access_key}


# --- privileges ---------------------------------------------------------------------------------------------


def test_a_mount_needs_no_more_than_the_documented_privileges(corner, fleet):
    load_shards(corner, sample_files(models=1))
    a = fleet.machine("a", may_only(corner, LEAST_WRITER))
    a.mount(corner.url)
    raw = next(a.path.glob("data/**/item-0/1/raw"))
    raw.read_bytes()
    raw.write_bytes(b"changed")
    (a.path / "files").mkdir()
    (a.path / "files/new").write_bytes(b"new")
    os.rename(a.path / "files/new", a.path / "files/moved")
    gone = next(a.path.glob("data/**/item-1/1/raw"))
    gone.unlink()
    a.flush()
    left = tree(a.path)
    a.umount()
    assert set(check_bucket(corner)) == set(left)
    assert corner.get("files/moved") == b"new"


def test_reading_needs_no_privilege_to_write(corner, fleet):
    load_shards(corner, sample_files(models=1))
    a = fleet.machine("a", may_only(corner, LEAST_READER))
    a.mount(corner.url, "--read-only")
    assert len(tree(a.path)) == len(list(sample_files(models=1)))
    a.umount()


def test_without_the_privilege_to_write_a_mount_for_writing_says_so(corner, fleet):
    load_shards(corner, sample_files(models=1))
    done = fleet.machine("a", may_only(corner, LEAST_READER)).mount(corner.url, check=False)
    assert done.returncode == 32
    assert "403" in done.stderr and "policy" in done.stderr


def test_elsewhere_in_the_bucket_these_privileges_are_worth_nothing(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    done = fleet.machine("a", may_only(bucket, LEAST_WRITER)).mount(bucket.url, check=False)
    assert done.returncode == 32
    assert "403" in done.stderr


# --- TLS ----------------------------------------------------------------------------------------------------


class TlsFront:
    """The server behind TLS with a certificate nobody knows."""

    def __init__(self, endpoint, directory):
        self.certificate, key = make_certificate(directory)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self._context, self._store = context, endpoint.rpartition("/")[2].split(":")
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"https://localhost:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near):
        with contextlib.suppress(OSError), near:
            secure = self._context.wrap_socket(near, server_side=True)
            far = socket.create_connection((self._store[0], int(self._store[1])))
            with secure, far:
                other = threading.Thread(target=self._pump, args=(far, secure), daemon=True)
                other.start()
                self._pump(secure, far)
                other.join()

    def _pump(self, source, target):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    def close(self):
        self._listener.close()


@pytest.fixture
def front(server, tmp_path):
    front = TlsFront(server.endpoint, tmp_path)
    yield front
    front.close()


def test_a_certificate_nobody_vouches_for_is_refused(bucket, front, fleet):
    load_shards(bucket, sample_files(models=1))
    env = {**bucket.env, "AWS_ENDPOINT_URL_S3": front.url}
    done = fleet.machine("a", env).mount(bucket.url, check=False)
    assert done.returncode == 32
    assert "certificate" in done.stderr.lower()


def test_with_its_authority_named_a_certificate_is_good(bucket, front, fleet):
    load_shards(bucket, sample_files(models=1))
    env = {**bucket.env, "AWS_ENDPOINT_URL_S3": front.url, "AWS_CA_BUNDLE": str(front.certificate)}
    a = fleet.machine("a", env)
    a.mount(bucket.url)
    assert len(tree(a.path)) == len(list(sample_files(models=1)))
    (a.path / "files").mkdir()
    (a.path / "files/new").write_bytes(b"through TLS")
    a.umount()
    assert bucket.get("files/new") == b"through TLS"


def as_nobody(act):
    """In a process of another user: ``done``, or the kind of error."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = "done"
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            act()
        except BaseException as error:
            said = type(error).__name__
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        return pipe.read()


# --- places and secrets -------------------------------------------------------------------------------------


def test_no_other_user_reaches_state_socket_or_mount(bucket, fleet, home):
    load_shards(bucket, sample_files(models=1))
    for directory in (home, *home.parents[:3]):
        directory.chmod(directory.stat().st_mode | 0o055)  # so that it is not pytest's own directory that keeps out
    a = fleet.machine("a", bucket.env)
    a.mount(bucket.url)
    next(a.path.glob("data/**/item-0/1/raw")).read_bytes()
    found = registry.find(a.environment(), a.path)
    assert stat.S_IMODE(os.stat(found.socket).st_mode) == 0o600
    assert as_nobody(lambda: os.listdir(a.state_dir)) == "PermissionError"
    assert as_nobody(lambda: os.listdir(a.path)) == "PermissionError"
    assert as_nobody(lambda: socket.socket(socket.AF_UNIX).connect(found.socket)) == "PermissionError"
    assert as_nobody(lambda: os.listdir("/")) == "done"
    a.umount()


def test_the_secret_key_is_in_no_argument_log_table_trace_or_status(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    a = fleet.machine("a", bucket.env)
    a.mount(bucket.url, "--log-level", "debug")
    raw = next(a.path.glob("data/**/item-0/1/raw"))
    raw.write_bytes(b"changed")
    a.flush()
    os.kill(a.pid(), 10)  # SIGUSR1: its state, into the log
    process = Path(f"/proc/{a.pid()}")
    said = [a.run("status", "--json", str(a.path)).stdout, (a.path / ".swampfs/status.json").read_text()]
    said += [(process / "cmdline").read_text(), Path("/proc/self/mounts").read_text(errors="surrogateescape")]
    a.umount()
    said += [a.log(), a.trace_file.read_text()]
    wrong = {**bucket.env, "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"}
    b = fleet.machine("b", wrong)
    said.append(b.run("--debug", "mount", bucket.url, str(b.path), "--state-dir", str(b.state_dir), check=False).stderr)
    assert "Traceback" in said[-1] or "got no answer" in said[-1]
    for text in said:
        assert SECRET_KEY not in text
    kept = [path for path in a.state_dir.rglob("*") if path.is_file()]
    assert not [path for path in kept if SECRET_KEY.encode() in path.read_bytes()]
