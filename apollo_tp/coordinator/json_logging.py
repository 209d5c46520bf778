"""The log of the trainer's processes, on standard error: lines of text on a terminal, otherwise a JSON object per line."""

from __future__ import annotations

import json
import logging
import sys

QUIET = ("uvicorn", "httpx", "httpcore")
"""Libraries that log each request, such as those for the page's latency figures every two seconds."""


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON: time (Unix seconds), level, logger, message, the rank if it is a trainer rank's,
    and, if there is one, the exception."""

    def __init__(self, rank: int | None = None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._rank is not None:
            line["rank"] = self._rank
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def set_up_logging(rank: int | None = None) -> None:
    """Log this process's records of level INFO and above, and those of ``QUIET`` of level WARNING and above. ``rank`` is
    that of a trainer rank; None for the coordinator."""
    handler = logging.StreamHandler()
    name = "coordinator" if rank is None else f"rank {rank}"
    text = logging.Formatter(f"%(asctime)s {name} %(levelname)s %(message)s")
    handler.setFormatter(text if sys.stderr is not None and sys.stderr.isatty() else JsonFormatter(rank))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in QUIET:
        logging.getLogger(library).setLevel(logging.WARNING)
