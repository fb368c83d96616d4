"""What ``gc``, ``prune`` and ``delete`` remove: plans made from the index and ``metadata.yaml``, then carried out.

A plan removes only what it can account for: a name whose metadata cannot be read is left alone and reported. Rules are
those of the data model, §3 (metadata) and §4 (gc, prune, delete).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import yaml

from swampfs.errors import AbsentError, NamespaceError
from swampfs.names import ModelRef, RelPath, model_of
from swampfs.records import IndexEntry, timestamp, timestamp_ns
from swampfs.sync.parallel import for_each
from swampfs.sync.surgery import Surgery

_DURATION = re.compile(r"^([1-9]\d*)(mo|y|h|m|d|w)$")
_DAYS = {"y": 365.0, "mo": 30.0, "w": 7.0, "d": 1.0, "h": 1 / 24, "m": 1 / 1440}
_AT_ONCE = 16


@dataclass(slots=True)
class DataName:
    """One data name of a model and everything stored under it."""

    model: ModelRef
    path: RelPath  # data/<type>/<model>/<name>
    versions: dict[int, list[IndexEntry]] = field(default_factory=dict)
    others: list[IndexEntry] = field(default_factory=list)  # latest, and whatever has no version

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    @property
    def highest(self) -> int:
        return max(self.versions)

    def files(self) -> list[IndexEntry]:
        return [*(entry for entries in self.versions.values() for entry in entries), *self.others]


class Expired(NamedTuple):
    data: DataName
    reason: str


@dataclass(slots=True)
class Plan:
    """What to remove, and which version each surviving name's ``latest`` must show."""

    deletes: list[IndexEntry] = field(default_factory=list)
    latest: dict[RelPath, int] = field(default_factory=dict)
    expired: list[Expired] = field(default_factory=list)
    versions: int = 0
    by_name: dict[RelPath, int] = field(default_factory=dict)  # versions removed of names that stay
    unreadable: list[RelPath] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.deletes)

    def remove_name(self, data: DataName, reason: str) -> None:
        self.expired.append(Expired(data, reason))
        self.versions += len(data.versions)
        self.deletes += data.files()

    def remove_versions(self, data: DataName, numbers: Collection[int]) -> None:
        """Some, never all: the highest that is left becomes the latest."""
        left = set(data.versions) - set(numbers)
        for number in numbers:
            self.deletes += data.versions[number]
        if numbers:
            self.versions += len(numbers)
            self.by_name[data.path] = len(numbers)
            self.latest[data.path] = max(left)


def data_names(entries: Mapping[RelPath, IndexEntry]) -> list[DataName]:
    """Names by their markers: a version is a numeric directory that holds a ``metadata.yaml`` (data model §2.4)."""
    found: dict[RelPath, DataName] = {}
    for path in entries:
        segments = path.split("/")
        model = model_of(path)
        if segments[-1] == "metadata.yaml" and segments[-2].isdigit() and segments[0] == "data" and model is not None:
            name = RelPath("/".join(segments[:-2]))
            found.setdefault(name, DataName(model, name)).versions.setdefault(int(segments[-2]), [])
    for path, entry in entries.items():
        directory = path.rpartition("/")[0]
        while directory and directory not in found:
            directory = directory.rpartition("/")[0]
        if not directory:
            continue
        data = found[RelPath(directory)]
        version = path[len(directory) + 1 :].partition("/")[0]
        number = int(version) if version.isdigit() else -1
        data.versions.get(number, data.others).append(entry)
    return sorted(found.values(), key=lambda data: data.path)


async def plan_gc(surgery: Surgery, now: datetime) -> Plan:
    """Expired names, and versions beyond each name's policy."""
    entries = await surgery.entries()
    plan = Plan()

    async def judge(data: DataName) -> None:
        newest = await _metadata(surgery, data, data.highest)
        if newest is None:
            plan.unreadable.append(data.path)
            return
        reason = _expiry(newest, entries, now)
        if reason is not None:
            plan.remove_name(data, reason)
        else:
            plan.remove_versions(data, await _beyond_policy(surgery, data, newest, now))

    errors = await for_each(data_names(entries), judge, at_once=_AT_ONCE, what="names looked at")
    if errors:
        raise errors[0]
    plan.expired.sort(key=lambda expired: expired.data.path)
    return plan


async def plan_prune(surgery: Surgery, live: Collection[str]) -> Plan:
    """Every name of models whose definition is gone. ``live`` are the ids of all definitions outside the datastore."""
    entries = await surgery.entries()
    ids = set(live)
    for path in entries:
        if path.startswith("auto-definitions/"):
            ids.add(definition_id(await surgery.content(path), path))
    plan = Plan()
    for data in data_names(entries):
        if data.model.id not in ids:
            plan.remove_name(data, "its model has no definition")
    return plan


async def plan_delete(surgery: Surgery, model: ModelRef, name: str | None, version: int | None) -> Plan:
    """One model's data, one name of it, or one version of that. Raises NamespaceError if there is none such."""
    names = [data for data in data_names(await surgery.entries()) if data.model == model and name in (None, data.name)]
    what = f"{model}{f' {name}' if name else ''}{f' version {version}' if version is not None else ''}"
    if not names or (version is not None and version not in names[0].versions):
        raise NamespaceError(f"there is no data of {what}", remedy="see `ls` in the mount for what there is")
    plan = Plan()
    for data in names:
        if version is None or set(data.versions) == {version}:
            plan.remove_name(data, "deleted")
        else:
            plan.remove_versions(data, [version])
    return plan


async def carry_out(surgery: Surgery, plan: Plan) -> None:
    """Markers first, so that none ever shows a version that is gone; then the index; then the objects."""
    puts = []
    for path, number in plan.latest.items():
        body = str(number).encode()
        marker = RelPath(f"{path}/latest")
        info = await surgery.remote.put(surgery.keys.data(marker), body)
        now = timestamp(int(datetime.now(UTC).timestamp() * 1e9))
        puts.append(IndexEntry(marker, len(body), info.last_modified or now, now, hashlib.sha256(body).hexdigest()))
    markers = {entry.path for entry in puts}
    await surgery.commit(puts, [entry.path for entry in plan.deletes if entry.path not in markers])


def definition_id(body: bytes, origin: str) -> str:
    """Of a model definition. Raises NamespaceError: without it nobody can say whose data is whose."""
    try:
        found = yaml.safe_load(body)["id"]
    except (yaml.YAMLError, KeyError, TypeError, UnicodeDecodeError, RecursionError):
        found = None
    if not isinstance(found, str) or not found:
        raise NamespaceError(f"{origin} is no definition with an id", remedy="mend or remove it; nothing was deleted")
    return found


async def _metadata(surgery: Surgery, data: DataName, version: int) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load(await surgery.content(RelPath(f"{data.path}/{version}/metadata.yaml")))
    except (AbsentError, yaml.YAMLError, UnicodeDecodeError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _expiry(metadata: Mapping[str, Any], entries: Mapping[RelPath, IndexEntry], now: datetime) -> str | None:
    """Why a name has outlived its lifetime; ``None`` if it has not. Tombstones have none."""
    lifetime = metadata.get("lifetime")
    if metadata.get("lifecycle") == "deleted":
        return None
    if lifetime in ("job", "workflow"):
        owner = metadata.get("ownerDefinition") or {}
        run, workflow = owner.get("workflowRunId"), owner.get("workflowId")
        if not run or not workflow:
            return None
        there = f"workflow-runs/{workflow}/workflow-run-{run}.yaml" in entries
        return None if there else f"its workflow run {run} is gone"
    age = _duration(lifetime)
    created = _created(metadata)
    if age is not None and created is not None and created + age < now:
        return f"older than its lifetime of {lifetime}"
    return None


async def _beyond_policy(surgery: Surgery, data: DataName, newest: Mapping[str, Any], now: datetime) -> list[int]:
    policy = newest.get("garbageCollection")
    numbers = sorted(data.versions)
    if isinstance(policy, int) and not isinstance(policy, bool) and policy >= 1:
        return numbers[:-policy]
    age = _duration(policy)
    if age is None:
        return []
    old = []
    for number in numbers[:-1]:
        metadata = await _metadata(surgery, data, number)
        created = _created(metadata) if metadata is not None else None
        if created is not None and created + age < now:
            old.append(number)
    return old


def _duration(text: object) -> timedelta | None:
    match = _DURATION.match(text) if isinstance(text, str) else None
    return timedelta(days=int(match[1]) * _DAYS[match[2]]) if match else None


def _created(metadata: Mapping[str, Any]) -> datetime | None:
    value = metadata.get("createdAt")
    if isinstance(value, datetime):
        return value if value.tzinfo is not None else value.replace(tzinfo=UTC)
    ns = timestamp_ns(value if isinstance(value, str) else None)
    return None if ns is None else datetime.fromtimestamp(ns / 1e9, UTC)
