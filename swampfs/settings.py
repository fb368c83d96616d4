"""Where a datastore is and how to mount it: flags, environment, ``.swamp.yaml`` and URLs → frozen data.

Order of precedence: flag, environment (``SWAMP_DATASTORE``, ``SWAMPFS_*``), file, default (``design/cli.md`` §1;
grammar in ``spec/swamp-data-model.md`` §1).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

from swampfs.errors import SettingsError
from swampfs.names import SYNCED_DIRECTORIES, check_namespace
from swampfs.schemas import PULL_CONCURRENCY, PUSH_CONCURRENCY, GcsConfig, S3Config, request_timeout_s, validate

MARKER = ".swamp.yaml"
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^}]*)\})")
_DURATION = re.compile(r"^(\d+(?:\.\d+)?)(ms|s|m|h)?$")
_SIZE = re.compile(r"^(\d{1,18}(?:\.\d{1,18})?)([KMGT]?)(?:i?B)?$", re.IGNORECASE)
_UNIT_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_UNIT_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


class Consistency(Enum):
    """When changes of others are seen (``design/cli.md`` §1)."""

    BOUNDED = "bounded"  # within a refresh interval
    CLOSE_TO_OPEN = "close-to-open"  # asked for at each open, published at each close


class Backend(Enum):
    S3 = "s3"
    GCS = "gcs"
    FILESYSTEM = "filesystem"


_TYPE_NAMES = {"@swamp/s3-datastore": Backend.S3, "s3": Backend.S3, "@swamp/gcs-datastore": Backend.GCS}
_KNOWN_UNSERVED = ("@keeb/mongodb-datastore",)


@dataclass(frozen=True, slots=True)
class Source:
    """One datastore: backend, location and bound namespace. Never holds a credential."""

    backend: Backend
    bucket: str = ""
    prefix: str = ""
    directory: str = ""
    namespace: str = ""
    region: str | None = None
    endpoint: str | None = None
    path_style: bool | None = None
    project: str | None = None
    pull_concurrency: int = PULL_CONCURRENCY
    push_concurrency: int = PUSH_CONCURRENCY
    request_timeout_s: float = 30.0

    @property
    def url(self) -> str:
        """Canonical form, safe to show: it becomes the mount's ``fsname``."""
        if self.backend is Backend.FILESYSTEM:
            return f"file://{self.directory}"
        scheme = "s3" if self.backend is Backend.S3 else "gs"
        return f"{scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")

    @property
    def datastore_id(self) -> str:
        """Name of this datastore's state directory: readable, and unique over location and namespace."""
        identity = f"{self.url}|{self.endpoint or ''}|{self.namespace}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
        readable = re.sub(r"[^A-Za-z0-9]+", "-", self.bucket or Path(self.directory).name).strip("-")[:32]
        return f"{readable or 'datastore'}-{digest}"


@dataclass(frozen=True, slots=True)
class Repo:
    """A swamp repository: its directory and the parts of ``.swamp.yaml`` that matter here."""

    directory: Path
    repo_id: str | None = None
    datastore: Mapping[str, Any] = field(default_factory=dict)
    models_dir: str = "models"

    @property
    def mountpoint(self) -> Path:
        return self.directory / ".swamp"


@dataclass(frozen=True, slots=True)
class TierPolicy:
    """Which top-level directories the configuration keeps on this machine (data model §1.4, rule 1–3)."""

    kept_local: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class MountSettings:
    """Everything a running mount needs to know. Durations in seconds, sizes in bytes."""

    source: Source
    mountpoint: Path
    state_dir: Path
    repo: Repo | None = None
    tiers: TierPolicy = TierPolicy()
    read_only: bool = False
    refresh_s: float = 2.0
    push_delay_s: float = 2.0
    timeout_s: float = 30.0
    queue_offline: bool = True
    lock_ttl_s: float = 30.0
    consistency: Consistency = Consistency.BOUNDED
    all_namespaces: bool = False
    cache_bytes: int = 10 << 30
    scrub_s: float = 24 * 3600.0
    uid: int = field(default_factory=os.getuid)
    gid: int = field(default_factory=os.getgid)
    umask: int = 0
    allow_other: bool = False
    allow_root: bool = False
    xattrs: bool = False
    fsync_remote: bool = False
    prefetch: bool = True
    fast_lane: bool = True
    passthrough: bool = True
    writeback_cache: bool = False
    kernel_options: frozenset[str] = frozenset()
    metrics_port: int | None = None
    trace_file: str | None = None


# --- words ------------------------------------------------------------------------------------------------


def duration_s(text: str) -> float:
    """``500ms``, ``2s``, ``1m``, ``1h`` or plain seconds."""
    match = _DURATION.match(text.strip())
    if not match:
        raise SettingsError(f"{text!r} is not a duration", remedy="write it like 500ms, 2s or 1m")
    return float(match[1]) * _UNIT_SECONDS[match[2]]


def size_bytes(text: str) -> int:
    """``500M``, ``10G``, ``1T`` (powers of 1024) or plain bytes."""
    match = _SIZE.match(text.strip())
    if not match:
        raise SettingsError(f"{text!r} is not a size", remedy="write it like 500M or 10G")
    return int(float(match[1]) * _UNIT_BYTES[match[2].upper()])


def user_data_dir(env: Mapping[str, str]) -> Path:
    """``$SWAMP_HOME``, else ``~/.swamp`` (data model §1.3)."""
    home = env.get("SWAMP_HOME")
    return Path(home) if home else Path(env.get("HOME") or Path.home()) / ".swamp"


def _expand(text: str, env: Mapping[str, str], base: Path, origin: str) -> str:
    """``~``, ``$VAR``, ``${VAR}`` and relative paths, as ``datastore.path`` defines them."""

    def value(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not env.get(name):
            raise SettingsError(f"{origin}: {text!r} uses ${name}, which is not set")
        return env[name]

    if text == "~" or text.startswith("~/"):
        text = (env.get("HOME") or str(Path.home())) + text[1:]
    if "\0" in text:
        raise SettingsError(f"{origin}: {text!r} cannot be a path")
    expanded = _VARIABLE.sub(value, text)
    return os.path.normpath(os.path.join(base, expanded))


# --- sources ----------------------------------------------------------------------------------------------


def source_of_url(url: str, env: Mapping[str, str] = MappingProxyType({})) -> Source:
    """``s3://bucket/prefix``, ``gs://bucket/prefix`` or ``file:///dir``. Raises SettingsError."""
    parts = urlsplit(url)
    if parts.scheme in ("s3", "gs"):
        if parts.username or parts.password or parts.query:
            raise SettingsError(
                "credentials and options do not belong in the URL",
                remedy="use the environment, a profile or an instance role",
            )
        config = {"bucket": parts.netloc, "prefix": unquote(parts.path[1:])}
        return s3_source(config, url, env) if parts.scheme == "s3" else gcs_source(config, url, env)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise SettingsError(f"{url} names a host", remedy="write file:///absolute/dir")
        return _directory_source(unquote(parts.path), url)
    if parts.scheme == "mongodb":
        raise SettingsError(f"{url}: this version serves s3://, gs:// and file:// datastores only")
    raise SettingsError(
        f"{url!r} is not a datastore",
        remedy="write s3://bucket/prefix, gs://bucket/prefix, file:///dir or a repo directory",
    )


def _directory_source(directory: str, origin: str) -> Source:
    if not os.path.isabs(directory):
        raise SettingsError(f"{origin}: {directory!r} is not an absolute directory")
    return Source(Backend.FILESYSTEM, directory=os.path.normpath(directory))


def s3_source(config: Mapping[str, Any], origin: str, env: Mapping[str, str] = MappingProxyType({})) -> Source:
    """From the configuration of ``@swamp/s3-datastore``. Raises SettingsError."""
    known: S3Config = validate(S3Config, _present(config), origin)
    return Source(
        Backend.S3,
        bucket=known.bucket,
        prefix=known.prefix,
        region=known.region,
        endpoint=known.endpoint,
        path_style=known.force_path_style,
        pull_concurrency=known.pull_concurrency,
        push_concurrency=known.push_concurrency,
        request_timeout_s=request_timeout_s(known.request_timeout_ms, env.get("SWAMP_S3_REQUEST_TIMEOUT_MS")),
    )


def gcs_source(config: Mapping[str, Any], origin: str, env: Mapping[str, str] = MappingProxyType({})) -> Source:
    """From the configuration of ``@swamp/gcs-datastore``. Raises SettingsError."""
    known: GcsConfig = validate(GcsConfig, _present(config), origin)
    return Source(
        Backend.GCS,
        bucket=known.bucket,
        prefix=known.prefix,
        endpoint=known.api_endpoint,
        project=known.project_id,
        pull_concurrency=known.pull_concurrency,
        push_concurrency=known.push_concurrency,
        request_timeout_s=request_timeout_s(known.request_timeout_ms, env.get("SWAMP_GCS_REQUEST_TIMEOUT_MS")),
    )


def _present(config: Mapping[str, Any]) -> dict[str, Any]:
    """An empty YAML value means the field is not given."""
    return {name: value for name, value in config.items() if value is not None}


def _source_of_type(kind: str, config: Mapping[str, Any], origin: str, env: Mapping[str, str]) -> Source:
    if kind in _KNOWN_UNSERVED:
        raise SettingsError(f"{origin}: datastore type {kind} is not served by this version")
    backend = _TYPE_NAMES.get(kind)
    if backend is None:
        raise SettingsError(f"{origin}: unknown datastore type {kind!r}")
    return s3_source(config, origin, env) if backend is Backend.S3 else gcs_source(config, origin, env)


def source_of_env(value: str, env: Mapping[str, str], base: Path) -> Source:
    """The ``SWAMP_DATASTORE`` grammar ``type:value``, or a URL."""
    origin = "SWAMP_DATASTORE"
    if "://" in value:
        return source_of_url(value, env)
    kind, colon, rest = value.partition(":")
    if not colon:
        raise SettingsError(f"{origin}={value!r} has no colon", remedy="write type:value, such as filesystem:/dir")
    if kind == "filesystem":
        return _directory_source(_expand(rest, env, base, origin), origin)
    if kind == "s3":
        bucket, _, prefix = rest.partition("/")
        return s3_source({"bucket": bucket, "prefix": prefix}, origin, env)
    try:
        config = json.loads(rest or "{}")
    except ValueError as error:
        raise SettingsError(f"{origin}: the configuration is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise SettingsError(f"{origin}: the configuration must be a JSON object")
    return _source_of_type(kind, config, origin, env)


def source_of_repo(repo: Repo, env: Mapping[str, str]) -> Source:
    """The datastore a repository's marker names; default is the directory ``.swamp`` itself."""
    origin = str(repo.directory / MARKER)
    block = repo.datastore
    kind = block.get("type", "filesystem")
    if kind == "filesystem":
        path = block.get("path")
        if block and not isinstance(path, str):
            raise SettingsError(f"{origin}: a filesystem datastore needs a path")
        source = _directory_source(_expand(path or ".swamp", env, repo.directory, origin), origin)
    elif kind == "s3":
        source = s3_source(block, origin, env)
    else:
        config = block.get("config", {})
        if not isinstance(config, dict):
            raise SettingsError(f"{origin}: datastore config must be a mapping")
        source = _source_of_type(str(kind), config, origin, env)
    namespace = block.get("namespace")
    return with_namespace(source, str(namespace)) if namespace else source


def with_namespace(source: Source, namespace: str) -> Source:
    return replace(source, namespace=check_namespace(namespace))


# --- repositories -----------------------------------------------------------------------------------------


def read_repo(directory: Path) -> Repo:
    """Read ``.swamp.yaml``. Raises SettingsError if it is missing or malformed."""
    marker = directory / MARKER
    try:
        document = yaml.safe_load(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{directory} is not a swamp repository: there is no {MARKER}",
            remedy="pass a source such as s3://bucket/prefix, or run in a repository",
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{marker} cannot be read: {reason}", remedy="correct the file") from None
    if not isinstance(document, dict):
        raise SettingsError(f"{marker} is not a mapping", remedy="correct the file")
    block = document.get("datastore", {})
    if not isinstance(block, dict):
        raise SettingsError(f"{marker}: datastore must be a mapping", remedy="correct the file")
    repo_id = document.get("repoId")
    models = document.get("modelsDir")
    return Repo(
        directory, repo_id if isinstance(repo_id, str) else None, block, models if isinstance(models, str) else "models"
    )


def find_repo(start: Path) -> Repo | None:
    """The repository at or above ``start``."""
    for directory in (start, *start.parents):
        if (directory / MARKER).exists():
            return read_repo(directory)
    return None


def tiers_of(repo: Repo | None) -> TierPolicy:
    """Synced directories that the repository's ``directories`` and ``exclude`` keep local."""
    if repo is None:
        return TierPolicy()
    origin = repo.directory / MARKER
    named, excluded = repo.datastore.get("directories"), repo.datastore.get("exclude") or []
    for value in (named or [], excluded):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise SettingsError(f"{origin}: directories and exclude must be lists of names")
    local = SYNCED_DIRECTORIES - set(named) if named is not None else frozenset()
    return TierPolicy(frozenset(local) | (SYNCED_DIRECTORIES & set(excluded)))


def resolve_source(argument: str | None, env: Mapping[str, str], cwd: Path) -> tuple[Source, Repo | None]:
    """SOURCE of the command line (URL, repository directory, or nothing) → datastore and repository."""
    if argument is not None and "\0" in argument:
        raise SettingsError(f"{argument!r} cannot be a path")
    if argument is not None and "://" in argument:
        return source_of_url(argument, env), None
    if argument is not None:
        repo = read_repo(Path(argument).absolute())
        return source_of_repo(repo, env), repo
    found = find_repo(cwd)
    from_env = env.get("SWAMP_DATASTORE")
    if from_env:
        return source_of_env(from_env, env, found.directory if found else cwd), found
    if found is None:
        raise SettingsError(
            f"no SOURCE, and {cwd} is not inside a swamp repository",
            remedy="pass a source such as s3://bucket/prefix or a repository directory",
        )
    return source_of_repo(found, env), found


def write_namespace(repo: Repo, namespace: str | None) -> None:
    """Set or remove ``datastore.namespace`` in the marker, keeping every other key (data model §8.2, rule 17).

    Raises SettingsError if the file cannot be read or written; then it is as it was.
    """
    marker = repo.directory / MARKER
    document = yaml.safe_load(marker.read_text(encoding="utf-8"))
    block = document.setdefault("datastore", {"type": "filesystem", "path": ".swamp"})
    block.pop("namespace", None)
    if namespace is not None:
        block["namespace"] = namespace
    temporary = marker.with_name(f".{uuid.uuid4()}.tmp")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            yaml.safe_dump(document, file, sort_keys=False, allow_unicode=True)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, os.stat(marker).st_mode & 0o7777)
        os.replace(temporary, marker)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise SettingsError(f"{marker} cannot be written: {error.strerror}") from None
