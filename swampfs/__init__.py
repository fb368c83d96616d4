"""swampfs — a swamp datastore as a file system, and the sync engine beneath it."""

from __future__ import annotations

__version__ = "0.1.0"
