"""Structured logs: one JSON object a line, for programs to search and people to read.

Every line has `at`, `level`, `component` and `message`; what else was given with
`extra={"run": ..., "round": ...}` is beside them. Nobody logs a value of a customer's row. What
is only known to the library that failed might hold one, so of an exception that is not Hansa's
own a line tells the kind and the place in the code, never its text.
"""

import json
import logging
import sys
import threading
import traceback
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from types import TracebackType
from typing import Any

from common.errors import HansaError

_TALKATIVE = ("httpx", "httpcore", "flwr", "grpc", "uvicorn.access", "alembic")
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {
    "message",
    "asctime",
    "taskName",
}
_SCALARS = (str, int, float, bool, type(None))
_TAIL_BYTES = 16_384


def set_up(component: str, path: Path | None = None, level: int | str = logging.INFO) -> None:
    """Send all of this process's logs as JSON lines to a file, or to standard error.

    Args:
        component: Which program this is, such as `node`.
        path: The file, made with mode 0600; None for standard error. It may be moved away while
            it is written (logrotate).
        level: The least that is logged.
    """
    handler: logging.Handler
    if path is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        handler = WatchedFileHandler(path, encoding="utf-8")
    handler.setFormatter(JsonLines(component))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level)
    for name in _TALKATIVE:  # they log every request, or colours
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)
        logger.propagate = True
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda args: _log_uncaught(
        args.exc_type, args.exc_value or args.exc_type(), args.exc_traceback
    )


class JsonLines(logging.Formatter):
    """Turns a record into one line of JSON.

    Args:
        component: Which program this is.
    """

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, Any] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "component": self._component,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD and isinstance(value, _SCALARS):
                line[name] = value
        if record.exc_info and record.exc_info[1] is not None:
            line |= _told(record.exc_info[1], record.exc_info[2])
        return json.dumps(line, ensure_ascii=False)


def _told(error: BaseException, trace: TracebackType | None) -> dict[str, Any]:
    """Return what may be said of an exception."""
    found: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, HansaError):
        found["reason"] = str(error)
    found["trace"] = [
        f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)
    ]
    return found


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("hansa").critical("this process ends", exc_info=(kind, error, trace))


def last_error(path: Path, since: int = 0) -> str:
    """Return what went wrong last, as a log file tells it; empty where it tells nothing.

    Args:
        path: The log.
        since: Only what was written after so many bytes.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < since:  # the file was replaced meanwhile
                since = 0
            file.seek(max(since, size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    last = ""
    for text in reversed([line for line in lines if line.strip()]):
        try:
            line = json.loads(text)
        except ValueError:
            last = last or text.strip()[:500]
            continue
        if isinstance(line, dict) and line.get("level") in {"ERROR", "CRITICAL"}:
            reason = line.get("reason", line.get("error", ""))
            return f"{line.get('message', '')}{f': {reason}' if reason else ''}"[:500]
    return last
