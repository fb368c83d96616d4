"""``swampfs doctor --bundle``: what somebody who helps has to know, in one file, and nothing they must not know."""

from __future__ import annotations

import io
import json
import os
import platform
import re
import subprocess
import tarfile
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from swampfs import __version__, registry
from swampfs.errors import NotMountedError, SwampfsError

_LOG_BYTES = 1 << 20  # of each log, its end
_ANSWER_S = 5.0
_OURS = ("AWS_", "SWAMP", "GOOGLE_", "STORAGE_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
_TOLD = ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE")
_SECRET = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|(?<=://)[^/@\s]+@|(?i:(?<=authorization: )|(?<=bearer ))\S+")
_SHORTEST_SECRET = 8  # characters: shorter values are words


def write(path: Path, examination: Mapping[str, Any]) -> list[str]:
    """Make the file, mode 0600; returns the names of what is in it. Raises SwampfsError if it cannot be written."""
    hide = _Hide(os.environ)
    parts = {"doctor.json": _json(examination), "machine.json": _json(_machine())}
    parts["environment.json"] = _json(_environment(os.environ))
    for number, mount in enumerate(registry.registrations(os.environ), 1):
        parts |= {f"mount-{number}/{name}": text for name, text in _mount(mount).items()}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for name, text in parts.items():
                body = hide(text).encode("utf-8", "replace")
                info = tarfile.TarInfo(f"swampfs-support/{name}")
                info.size, info.mtime, info.mode = len(body), int(time.time()), 0o600
                archive.addfile(info, io.BytesIO(body))
    except OSError as error:
        raise SwampfsError(
            f"{path} cannot be written: {error.strerror}", remedy="name a file that is not there"
        ) from None
    return list(parts)


class _Hide:
    """Whatever is in the environment under a name that means a secret, and what looks like one."""

    def __init__(self, env: Mapping[str, str]) -> None:
        names = [name for name in env if re.search("SECRET|TOKEN|PASSWORD|ACCESS_KEY|CREDENTIAL", name)]
        self._values = [env[name] for name in names if len(env[name]) >= _SHORTEST_SECRET]

    def __call__(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, "(hidden)")
        return _SECRET.sub("(hidden)", text)


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"


def _machine() -> dict[str, Any]:
    wanted = ("pyfuse3", "trio", "boto3", "botocore", "google-cloud-storage", "msgspec", "click", "rich", "obstore")
    packages = {}
    for name in wanted:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "swampfs": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "fusermount3": _said("fusermount3", "-V"),
        "mounts": _said("findmnt", "-t", "fuse.swampfs"),
        "uid": os.geteuid(),
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip()


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """What is set; the values only of what is no secret."""
    found = {}
    for name in sorted(env):
        if name.startswith(_OURS) or name.upper() in _OURS:
            is_told = name in _TOLD or name.startswith("SWAMPFS_")
            found[name] = _without_user(env[name]) if is_told else "(set)"
    return found


def _without_user(url: str) -> str:
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _mount(mount: registry.Registration) -> dict[str, str]:
    try:
        status = _json(registry.request(mount, {"cmd": "status"}, _ANSWER_S))
    except NotMountedError as error:
        status = _json({"error": error.line()})
    parts = {"registration.json": _json(mount._asdict()), "status.json": status}
    log = Path(mount.state_dir) / "swampfs.log"
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _LOG_BYTES))
            parts["swampfs.log"] = file.read().decode("utf-8", "replace")
    except OSError as error:
        parts["swampfs.log"] = f"{log}: {error.strerror}\n"
    return parts
