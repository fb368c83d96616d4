"""The datastore types that come with swampfs (spec §10.5)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from swampfs.backends.filesystem import FilesystemStore
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.provider import DatastoreType, ObjectStore
from swampfs.schemas import FilesystemConfig, GcsConfig, S3Config, validate
from swampfs.settings import Backend, Source, gcs_source, s3_source
from swampfs.state.sidecar import GCS_FINGERPRINT, S3_FINGERPRINT


def provider_of(source: Source) -> ObjectStoreProvider:
    """The provider of a resolved source."""
    if source.backend is Backend.FILESYSTEM:
        return ObjectStoreProvider(
            FilesystemStore(source.directory), FILESYSTEM.type, source.directory, is_directory=True
        )
    # Each SDK costs a quarter of a second to import, or more, that users of the others do without.
    if source.backend is Backend.S3:
        from swampfs.backends.s3 import S3Store

        return _of_bucket(S3Store(source, connections=source.pull_concurrency), source, S3.type, S3_FINGERPRINT)
    from swampfs.backends.gcs import GcsStore

    return _of_bucket(GcsStore(source, connections=source.pull_concurrency), source, GCS.type, GCS_FINGERPRINT)


def _s3(config: Mapping[str, Any]) -> ObjectStoreProvider:
    return provider_of(s3_source(config, S3.type, os.environ))


def _gcs(config: Mapping[str, Any]) -> ObjectStoreProvider:
    return provider_of(gcs_source(config, GCS.type, os.environ))


def _of_bucket(store: ObjectStore, source: Source, type_name: str, fingerprint_field: str) -> ObjectStoreProvider:
    return ObjectStoreProvider(
        store,
        type_name,
        source.bucket,
        prefix=source.prefix,
        fingerprint_field=fingerprint_field,
        pull_concurrency=source.pull_concurrency,
        push_concurrency=source.push_concurrency,
    )


def _filesystem(config: Mapping[str, Any]) -> ObjectStoreProvider:
    known: FilesystemConfig = validate(FilesystemConfig, dict(config), FILESYSTEM.type)
    path = os.path.abspath(os.path.expanduser(known.path))
    return ObjectStoreProvider(FilesystemStore(path), FILESYSTEM.type, path, is_directory=True)


S3 = DatastoreType(
    type="@swamp/s3-datastore",
    name="S3",
    description="A bucket of Amazon S3 or a compatible store that honours conditional writes",
    config_schema=S3Config,
    create_provider=_s3,
)
GCS = DatastoreType(
    type="@swamp/gcs-datastore",
    name="Google Cloud Storage",
    description="A bucket of Google Cloud Storage",
    config_schema=GcsConfig,
    create_provider=_gcs,
)
FILESYSTEM = DatastoreType(
    type="filesystem",
    name="Directory",
    description="A directory of this machine or of a network share",
    config_schema=FilesystemConfig,
    create_provider=_filesystem,
)
BUILTIN = (S3, GCS, FILESYSTEM)
