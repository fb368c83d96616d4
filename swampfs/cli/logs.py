"""How a mount's log is written: lines for people, or a JSON object per line for what collects them."""

from __future__ import annotations

import json
import logging
import sys

from swampfs.records import timestamp

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JsonLines(logging.Formatter):
    """``time`` (UTC), ``level``, ``logger``, ``message``, ``pid`` and, of a failure, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": timestamp(int(record.created * 1e9)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "pid": record.process,
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def begin(level: str, style: str) -> None:
    """Log to standard error, ``style`` is ``text`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if style == "json" else logging.Formatter(_TEXT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("botocore").setLevel(logging.WARNING)
