"""Figures of several file systems side by side: as a table, as JSON, and as a chart."""

from __future__ import annotations

import json
import platform
import statistics
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

OURS = "swampfs"
LONGEST_S = 180.0
"""Who takes longer is not waited for."""
YARDSTICKS = ("native", "bindfs", "writeback")  # not peers: no datastore behind them, or ourselves
_COLOURS = {
    OURS: "#1f6f5c",
    "writeback": "#5fb49c",
    "rclone": "#b4632d",
    "juicefs": "#8c4a8f",
    "s3fs": "#7a7a7a",
    "native": "#333",
    "bindfs": "#999",
}


def _seconds(found: float) -> str:
    return f"over {LONGEST_S:.0f} s" if found >= LONGEST_S else f"{found:.2f} s"


class Report:
    """Seconds by row, by file system; the best peer is 1."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.rows: dict[str, dict[str, list[float]]] = {}

    def add(self, row: str, name: str, seconds: float) -> None:
        self.rows.setdefault(row, {}).setdefault(name, []).append(seconds)
        print(f"  {row:44} {name:9} {seconds:9.3f} s", flush=True)

    def longest(self, row: str, name: str) -> float:
        """So far; 0 if there is none yet."""
        return max(self.rows.get(row, {}).get(name, ()), default=0.0)

    def medians(self, row: str) -> dict[str, float]:
        return {name: statistics.median(found) for name, found in self.rows[row].items()}

    def ratio(self, row: str) -> float | None:
        """How many times as fast as the best peer we are."""
        found = self.medians(row)
        peers = [seconds for name, seconds in found.items() if name not in (OURS, *YARDSTICKS)]
        return min(peers) / found[OURS] if peers and OURS in found else None

    def table(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        lines = [f"| {self.title} | {' | '.join(names)} | ours to the best peer |", "|---" * (len(names) + 2) + "|"]
        for row in self.rows:
            found = self.medians(row)
            ratio = self.ratio(row)
            cells = [_seconds(found[name]) if name in found else "" for name in names]
            lines.append(f"| {row} | {' | '.join(cells)} | {f'{ratio:.1f} ×' if ratio else ''} |")
        return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpus = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": f"{len(cpus)} × {cpus[0] if cpus else platform.machine()}",
        "memory": f"{memory_kib >> 20} GiB",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def write(reports: list[Report], versions: dict[str, str], target: Path) -> None:
    """``target``.json with every figure, ``target``.svg with the medians."""
    document = {
        "machine": machine(),
        "versions": versions,
        "seconds": {report.title: report.rows for report in reports},
        "ratios": {report.title: {row: report.ratio(row) for row in report.rows} for report in reports},
    }
    target.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    target.with_suffix(".svg").write_text(_chart(reports))


def _chart(reports: list[Report]) -> str:
    """Bars of medians, each row scaled to its slowest."""
    y, parts = 10, []
    for report in reports:
        parts.append(f'<text x="10" y="{y + 14}" font-weight="bold">{escape(report.title)}</text>')
        y += 26
        for row in report.rows:
            found = report.medians(row)
            slowest = max(found.values()) or 1.0
            parts.append(f'<text x="10" y="{y + 11}">{escape(row)}</text>')
            for name, seconds in found.items():
                width = max(1.0, 420 * seconds / slowest)
                colour = _COLOURS.get(name, "#444")
                parts.append(f'<rect x="330" y="{y}" width="{width:.1f}" height="12" fill="{colour}"/>')
                parts.append(
                    f'<text x="{336 + width:.0f}" y="{y + 10}" font-size="10">{name} {_seconds(seconds)}</text>'
                )
                y += 14
            y += 6
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="900" height="{y + 10}"'
        f' font-family="sans-serif" font-size="12">\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )
