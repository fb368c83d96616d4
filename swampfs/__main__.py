"""``python -m swampfs`` — the same entry point as the console script."""

from __future__ import annotations

from swampfs.cli.main import main

if __name__ == "__main__":
    main()
