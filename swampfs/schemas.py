"""Configuration of the built-in datastores, as ``.swamp.yaml`` has it: camelCase outside, snake_case inside.

Fields, ranges and defaults are those of spec §10.5. Unknown fields are ignored: ``SWAMP_DATASTORE`` carries swamp's own
``hydrationStrategy`` in the same JSON, and ``setup`` leaves ``namespace`` there.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from swampfs.errors import SettingsError

PULL_CONCURRENCY = 50
PUSH_CONCURRENCY = 25
REQUEST_TIMEOUT_MS = 30_000
TIMEOUT_RANGE_MS = (1_000, 600_000)

_S3_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.\-]{1,61}[a-z0-9]$")
_GCS_BUCKET = re.compile(r"^[a-z0-9][a-z0-9._\-]{1,61}[a-z0-9]$")
_URL = re.compile(r"^https?://[^/\s]+")


def _s3_bucket(name: str) -> str:
    if not _S3_BUCKET.match(name):
        raise ValueError(f"{name!r} is not a bucket name")
    return name


def _gcs_bucket(name: str) -> str:
    if not _GCS_BUCKET.match(name) or name.startswith("goog") or "google" in name:
        raise ValueError(f"{name!r} is not a bucket name")
    return name


def _url(text: str) -> str:
    if not _URL.match(text):
        raise ValueError(f"{text!r} is not an http or https URL")
    return text


class _Config(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, alias_generator=to_camel, populate_by_name=True)


class _ObjectStoreConfig(_Config):
    prefix: str = ""
    pull_concurrency: int = Field(PULL_CONCURRENCY, ge=1, le=1000, description="downloads at once")
    push_concurrency: int = Field(PUSH_CONCURRENCY, ge=1, le=1000, description="uploads at once")
    request_timeout_ms: int = Field(REQUEST_TIMEOUT_MS, ge=TIMEOUT_RANGE_MS[0], le=TIMEOUT_RANGE_MS[1])


class S3Config(_ObjectStoreConfig):
    """``@swamp/s3-datastore``."""

    bucket: Annotated[str, AfterValidator(_s3_bucket)]
    region: str | None = None
    endpoint: Annotated[str, AfterValidator(_url)] | None = None
    force_path_style: bool | None = None


class GcsConfig(_ObjectStoreConfig):
    """``@swamp/gcs-datastore``. ``projectId`` appears nowhere on the wire."""

    bucket: Annotated[str, AfterValidator(_gcs_bucket)]
    project_id: str | None = None
    api_endpoint: Annotated[str, AfterValidator(_url)] | None = None


class FilesystemConfig(_Config):
    """``filesystem``."""

    path: str = Field(min_length=1)


def validate(schema: type[BaseModel], config: Any, origin: str) -> Any:
    """An instance of the schema. Raises SettingsError naming each bad field."""
    try:
        return schema.model_validate(config)
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(map(str, fault['loc'])) or 'the configuration'}: {fault['msg'].removeprefix('Value error, ')}"
            for fault in error.errors()
        )
        raise SettingsError(f"{origin}: {faults}") from None


def request_timeout_s(configured_ms: int, override: str | None) -> float:
    """The environment wins over the configuration; what is not a number in range is ignored (spec §10.3)."""
    low, high = TIMEOUT_RANGE_MS
    if override is not None and override.isascii() and override.isdigit() and low <= int(override) <= high:
        return int(override) / 1000
    return configured_ms / 1000
