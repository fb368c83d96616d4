"""Datastores as a library: open one, list the types there are, add your own (``docs/adding-a-backend.md``).

>>> provider = create_provider("@swamp/s3-datastore", {"bucket": "ops-runtime"})
>>> service = provider.create_sync_service("/repo", "/home/me/.swamp/repos/1234")
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from swampfs.datastore.builtin import FILESYSTEM, GCS, S3
from swampfs.datastore.extensions import DatastoreTypes, load_types
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.stack import Datastore, open_datastore
from swampfs.provider import DatastoreProvider

__all__ = [
    "FILESYSTEM",
    "GCS",
    "S3",
    "Datastore",
    "DatastoreTypes",
    "ObjectStoreProvider",
    "create_provider",
    "load_types",
    "open_datastore",
]


def create_provider(
    type_name: str, config: Mapping[str, Any], *, repo_dir: str | Path | None = None
) -> DatastoreProvider:
    """A provider by type name. Raises DatastoreTypeError or SettingsError."""
    return load_types(repo_dir).create_provider(type_name, config)
