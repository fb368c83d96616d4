"""A mount is served on by an NFS server: NFS-Ganesha, with libnfs as its client (apt: nfs-ganesha-vfs libnfs-utils)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess

import pytest

from swampfs.testing.sample import sample_files
from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for
from tests.seaweed import free_ports

# Installing the server would start it on the tester's machine: who has it, runs this.
pytestmark = pytest.mark.skipif(
    not (shutil.which("ganesha.nfsd") and shutil.which("nfs-cat") and os.geteuid() == 0),
    reason="needs root, and Debian's nfs-ganesha-vfs and libnfs-utils",
)
CONFIG = """
NFS_CORE_PARAM {{ NFS_Port = {port}; Protocols = 4; Bind_addr = 127.0.0.1; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ RecoveryRoot = {home}; Graceless = true; Only_Numeric_Owners = true; }}
NFS_KRB5 {{ Active_krb5 = false; }}
EXPORT {{
    Export_Id = 7; Filesystem_id = 7.7; Path = {path}; Pseudo = /swamp; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; Attr_Expiration_Time = 0; FSAL {{ Name = VFS; }}
}}
"""


class Client:
    """Somebody who has no mount, only the server's address."""

    def __init__(self, server, port):
        self.server, self.port = server, port

    def url(self, path):
        return f"nfs://127.0.0.1/swamp/{path}?version=4&nfsport={self.port}"

    def run(self, *words):
        done = subprocess.run(words, capture_output=True, timeout=30)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def read(self, path):
        return self.run("nfs-cat", self.url(path))

    def names(self, path):
        return {line.split()[-1].decode() for line in self.run("nfs-ls", self.url(path)).splitlines()}

    def write(self, source, path):
        self.run("nfs-cp", str(source), self.url(path))


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine("a", bucket.env)
    machine.mount(bucket.url)
    return machine


@pytest.fixture
def client(machine, tmp_path):
    port = free_ports(1)[0]
    config = tmp_path / "ganesha.conf"
    config.write_text(CONFIG.format(port=port, home=tmp_path, path=machine.path))
    server = subprocess.Popen(
        ["ganesha.nfsd", "-F", "-f", config, "-L", tmp_path / "ganesha.log", "-p", tmp_path / "ganesha.pid"]
    )

    def answers():
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, "the server answers")
        yield Client(server, port)
    finally:
        server.terminate()
        server.wait(10)


def test_a_mount_is_exported_by_an_nfs_server(machine, client, bucket, tmp_path):
    raw = next(path for path in machine.path.rglob("raw"))
    model = os.path.relpath(raw.parent.parent, machine.path)
    assert client.names(model) == set(os.listdir(machine.path / model))
    assert os.stat(raw).st_blocks == 0, "listing fetched nothing"
    assert client.read(os.path.relpath(raw, machine.path)) == raw.read_bytes()
    raw.write_bytes(b"changed beside the server")
    assert client.read(os.path.relpath(raw, machine.path)) == b"changed beside the server"
    (tmp_path / "up").write_bytes(b"from a client" * 100)
    (machine.path / "files").mkdir()
    client.write(tmp_path / "up", "files/up")
    assert (machine.path / "files/up").read_bytes() == b"from a client" * 100
    client.server.terminate()  # it keeps files open for a while
    client.server.wait(10)
    machine.flush()
    assert check_bucket(bucket)["files/up"] == b"from a client" * 100
