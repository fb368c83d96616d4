"""What ``swampfs doctor`` finds on this machine: what mounting needs, and mounts that were left behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swampfs import registry
from swampfs.errors import MountError, NotMountedError
from swampfs.fuse import mountpoint as mountpoints
from swampfs.settings import user_data_dir
from swampfs.state.examine import StateReport, examine_state

_DEVICE = "/dev/fuse"
_CONFIGURATION = Path("/etc/fuse.conf")
_ANSWER_S = 5.0


def finding(check: str, message: str, *, passed: bool, repair: str = "") -> dict[str, Any]:
    """One line of an examination; ``repair`` is what ``--repair`` would do about it."""
    return {"check": check, "passed": passed, "message": message, **({"repair": repair} if repair else {})}


def examine() -> list[dict[str, Any]]:
    """What this machine can do, its mounts, and what mounts keep here."""
    dead = _dead()
    return [_fuse(), *_mounts(dead), *map(_left_behind, dead), *_states()]


def repair() -> list[str]:
    """Clear mounts whose process is gone; returns what was done."""
    cleared = []
    for mountpoint in _dead():
        try:
            mountpoints.clear_stale(mountpoint)
        except MountError:
            continue  # it is found again, and told
        cleared.append(f"cleared the mount a dead process left at {mountpoint}")
    registry.forget_dead(os.environ)
    return cleared


def _fuse() -> dict[str, Any]:
    try:
        mode = os.stat(_DEVICE).st_mode
    except FileNotFoundError:
        return finding("fuse", f"there is no {_DEVICE}: load the kernel's fuse module to mount", passed=False)
    helper = shutil.which("fusermount3")
    if helper is None:
        return finding("fuse", "fusermount3 is missing: install fuse3 to mount", passed=False)
    if importlib.util.find_spec("pyfuse3") is None:
        return finding("fuse", "pyfuse3 is missing: install swampfs[mount] to mount", passed=False)
    if os.geteuid() == 0:
        return finding("fuse", "this machine can mount", passed=True)
    if not os.stat(helper).st_mode & stat.S_ISUID:
        return finding("fuse", f"{helper} is not setuid: only root can mount (chmod u+s)", passed=False)
    if not mode & stat.S_IWOTH and not os.access(_DEVICE, os.R_OK | os.W_OK):
        return finding("fuse", f"{_DEVICE} is not yours to open: chmod 666, or join its group", passed=False)
    shares = "" if _may_share() else f"; --allow-other needs user_allow_other in {_CONFIGURATION}"
    return finding("fuse", f"this machine can mount{shares}", passed=True)


def _may_share() -> bool:
    try:
        lines = _CONFIGURATION.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _mounts(dead: Sequence[str]) -> list[dict[str, Any]]:
    """Those that are running, or should be."""
    found = []
    for mount in registry.registrations(os.environ):
        if mount.mountpoint in dead:
            continue
        try:
            status = registry.request(mount, {"cmd": "status"}, _ANSWER_S)
        except NotMountedError as error:
            found.append(finding("mount", error.line(), passed=False))
            continue
        problem = status.get("lastError")
        text = f"{mount.mountpoint}: {problem or 'healthy'}, {status.get('dirty')} change(s) to push"
        found.append(finding("mount", text, passed=problem is None))
    return found


def _left_behind(mountpoint: str) -> dict[str, Any]:
    return finding(
        "mount",
        f"{mountpoint}: left by a process that is gone; its changes are in its journal",
        passed=False,
        repair="clears it, so that it can be mounted again",
    )


def _states() -> list[dict[str, Any]]:
    """State directories, of mounts and left by mounts: one line each for those with something to say."""
    usual = user_data_dir(os.environ) / "swampfs"
    homes = {str(path.parent.parent) for path in usual.glob("*/state/journal.db")}
    homes |= {mount.state_dir for mount in registry.registrations(os.environ)}
    found = []
    for home in sorted({os.path.realpath(home) for home in homes}):
        try:
            found += _of_state(home, examine_state(home))
        except OSError as error:
            found.append(finding("state", f"{home} cannot be read: {error.strerror}", passed=False))
    if homes and not found:
        found.append(finding("state", f"{len(homes)} state director{'y' if len(homes) == 1 else 'ies'} in order",
                             passed=True))  # fmt: skip
    return found


def _of_state(home: str, report: StateReport) -> list[dict[str, Any]]:
    said = [f"{name} is damaged: the next mount sets it aside and goes on from the files" for name in report.damaged]
    said += [f"{what} — it cannot be examined" for what in report.unreadable]
    if report.pending:
        said.append(f"{report.pending} change(s) are not pushed, and nothing mounts it: mount it again")
    if report.lost:
        said.append(f"the content of {len(report.lost)} of them is gone, such as {report.lost[0]}")
    found = [finding("state", f"{home}: {text}", passed=False) for text in said]
    if report.conflicts:
        text = f"{home}: {report.conflicts} content(s) kept because another machine won: see `swampfs conflicts`"
        found.append(finding("state", text, passed=True))
    return found


def _dead() -> list[str]:
    """Mount points of ours that a dead process covers."""
    found = []
    for mount in registry.registrations(os.environ):
        try:
            if mountpoints.is_stale(mount.mountpoint):
                found.append(mount.mountpoint)
        except MountError:
            continue  # it is busy; among the mounts that answer it is told that it does not
    return found
