"""What content is known by (spec §2)."""

from __future__ import annotations

import hashlib


def hash_file(path: str) -> str:
    """SHA-256 of a file, lowercase hex."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
