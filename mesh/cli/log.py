"""How daemons log: one line an event, for people, or one JSON object a line with the same fields each time."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from mesh.config import Settings


class _JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, text, and the facts of the event, if it has any."""

    def format(self, record: logging.LogRecord) -> str:
        facts: dict[str, Any] = getattr(record, "facts", {})
        error = {"traceback": self.formatException(record.exc_info)} if record.exc_info else {}
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        return json.dumps(
            {
                "time": moment.replace("+00:00", "Z"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "text": record.getMessage(),
                **facts,
                **error,
            }
        )


def set_up_logging(settings: Settings, *, quiet: bool, verbose: bool) -> None:
    """Log to stderr, one line an event."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S")
    handler.setFormatter(_JsonLines() if settings.log_format == "json" else text)
    root = logging.getLogger("mesh")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO)


def output_shown(settings: Settings, *, quiet: bool) -> Callable[[str, str, int, str], None] | None:
    """What is done with what functions print: shown with the input it belongs to, unless all is to be quiet."""
    if quiet:
        return None
    return _log_output if settings.log_format == "json" else _show_output


def _show_output(function: str, where: str, stream: int, text: str) -> None:
    out = sys.stdout if stream == 1 else sys.stderr
    out.writelines(f"{where} {function} | {line}\n" for line in text.splitlines())
    out.flush()


def _log_output(function: str, where: str, stream: int, text: str) -> None:
    for line in text.splitlines():
        facts = {
            "event": "output",
            "function": function,
            "from": where,
            "stream": "stdout" if stream == 1 else "stderr",
        }
        logging.getLogger("mesh.output").info("%s", line, extra={"facts": facts})
