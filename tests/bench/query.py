"""``scripts/bench query``: predicates over 275 000 artifacts, against a look at every one of them.

The catalog alone, without a mount: 55 000 names of five versions. The full scan evaluates the same predicate with the
same library on each row, as a catalog without SQL would.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from swampfs.artifacts.predicate import Predicate
from swampfs.artifacts.query import Record, nothing, search
from tests.artifacts import artifacts, database

PREDICATES = (
    'modelName == "model-777"',
    'modelName == "model-777" && name == "name-3" && version > 2',
    'tags.env == "lab" && size > 90000',
    'tags.run == "77"',
    'workflowRunId == "run-17" && specName == "vpc"',
    "size > 99990 && version > 0",
    'createdAt >= "2026-06-28" && modelName.startsWith("model-10")',
    'streaming && dataType == "report" && size < 200',
    'modelName in ["model-1", "model-2", "model-3"] || name == "nothing"',
    'specName == "host" && !(tags.env == "prod") && size > 50000 && modelName.contains("99")',
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench query")
    parser.add_argument("--names", type=int, default=55_000)
    parser.add_argument("--versions", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="swampfs-bench-") as home:
        started = time.perf_counter()
        known = database(Path(home) / "artifacts.db", list(artifacts(arguments.names, arguments.versions)))
        size = (Path(home) / "artifacts.db").stat().st_size >> 20
        print(f"{known.count()} artifacts in {time.perf_counter() - started:.1f} s, {size} MiB")
        everything: list[float] = []
        for text in PREDICATES:
            predicate = Predicate(text)
            taken = []
            for _ in range(arguments.repeat):
                started = time.perf_counter()
                found = sum(1 for _ in search(known, predicate))
                taken.append((time.perf_counter() - started) * 1000)
            started = time.perf_counter()
            where = "is_latest = 1" if predicate.latest_only else "1"
            same = sum(predicate.holds(Record(one, nothing)) for one in known.select(where, ()))
            scan = (time.perf_counter() - started) * 1000
            assert same == found, text
            everything += taken
            p95 = statistics.quantiles(taken, n=20)[-1]
            print(f"{p95:8.2f} ms p95 {scan / p95:8.0f} x faster than a full scan {found:6} found  {text}")
        print(f"{statistics.quantiles(everything, n=20)[-1]:8.2f} ms p95 of all of them")
        known.close()


if __name__ == "__main__":
    main()
