"""The engine: cache directory ⇄ remote, for any backend. No FUSE here; importable as a library."""
