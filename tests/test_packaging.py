"""What is built and what is installed is all of it, and goes away again."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*words, **env):
    done = subprocess.run(words, env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_sdist_and_wheel_have_all_of_it(tmp_path):
    """The wheel is built from the sdist, so what that lacks it lacks, too."""
    run(sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT))
    (sdist,), (wheel,) = tmp_path.glob("*.tar.gz"), tmp_path.glob("*.whl")
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "swampfs").rglob("*.py")}
    names = set(zipfile.ZipFile(wheel).namelist())
    assert modules <= names
    assert {name.rpartition("/")[2] for name in names if "/share/man/" in name} == {
        path.name for path in (ROOT / "docs/man").iterdir()
    }
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "docs/operations.md", "scripts/quickstart", "tests/conftest.py"} <= inside


@pytest.fixture
def places(tmp_path):
    return {"PREFIX": str(tmp_path / "opt/swampfs"), "DESTDIR": str(tmp_path / "root")}


@pytest.mark.timeout(600)  # pyfuse3 is compiled, and everything it needs is fetched
def test_an_installation_for_the_whole_machine_mounts_and_is_removed_without_a_trace(tmp_path, places):
    run("scripts/install", **places)
    root = Path(places["DESTDIR"])
    swampfs = str(root / "usr/local/bin/swampfs")
    assert run(swampfs, "version").startswith("swampfs ")
    assert "complete" in (root / "etc/bash_completion.d/swampfs").read_text()
    assert (root / "usr/local/share/man/man1/swampfs.1").read_text().startswith(".TH")
    for name in ("store", "mnt"):
        (tmp_path / name).mkdir()
    url, mountpoint = f"file://{tmp_path}/store", str(tmp_path / "mnt")
    env = {"HOME": str(tmp_path), "SWAMP_HOME": str(tmp_path / "swamp"), "PYTHONPATH": ""}
    run(str(root / "sbin/mount.fuse.swampfs"), url, mountpoint, "-o", "push_delay=100ms", **env)
    try:
        (tmp_path / "mnt/files").mkdir()
        (tmp_path / "mnt/files/one").write_text("one")
    finally:
        run(swampfs, "umount", mountpoint, **env)
    assert (tmp_path / "store/files/one").read_text() == "one"
    run("scripts/install", "--remove", **places)
    assert not Path(places["PREFIX"]).exists()
    assert [path for path in root.rglob("*") if not path.is_dir()] == []


def test_what_somebody_else_put_there_is_neither_replaced_nor_removed(places):
    prefix = Path(places["PREFIX"])
    prefix.mkdir(parents=True)
    (prefix / "theirs").write_text("theirs")
    done = subprocess.run(["scripts/install"], env={**os.environ, **places}, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, f"{prefix} is there, and not ours" in done.stderr) == (1, True)
    run("scripts/install", "--remove", **places)
    assert (prefix / "theirs").exists()
