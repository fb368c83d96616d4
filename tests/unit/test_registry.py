"""Which mounts there are on this machine, as their records say."""

from __future__ import annotations

import os
import subprocess
import sys

from swampfs import registry
from swampfs.registry import Registration


def test_a_mount_is_forgotten_when_its_process_has_ended_be_it_that_nobody_asked_how(tmp_path):
    env = {"HOME": str(tmp_path), "SWAMP_HOME": str(tmp_path / "swamp")}
    with subprocess.Popen([sys.executable, "-c", ""]) as zombie, subprocess.Popen([sys.executable, "-c", ""]) as gone:
        os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
        gone.wait()
        for name, pid in (("zombie", zombie.pid), ("gone", gone.pid), ("alive", os.getpid())):
            mountpoint = str(tmp_path / name)
            registry.register(env, Registration(mountpoint, pid, "s3://b", str(tmp_path), f"{mountpoint}.sock"))
        registry.forget_dead(env)
        assert [left.mountpoint for left in registry.registrations(env)] == [str(tmp_path / "alive")]
