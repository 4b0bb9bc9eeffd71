"""Tests of the structured logs."""

import json
import logging
import subprocess
import sys
from pathlib import Path

from common.errors import DataError
from common.logs import JsonLines, last_error

SECRET = "customer-4711"  # noqa: S105


def line_of(message: str, error: BaseException | None = None, **extra: object) -> dict[str, object]:
    """Return the line that a record becomes."""
    information = None if error is None else (type(error), error, error.__traceback__)
    logger = logging.getLogger("hansa.test")
    record = logger.makeRecord(
        logger.name, logging.ERROR, __file__, 1, message, (), information, extra=extra
    )
    found: dict[str, object] = json.loads(JsonLines("node").format(record))
    return found


class TestLines:
    """One JSON object a record."""

    def test_fields(self) -> None:
        """Time, level, component and message, and what was given beside them."""
        line = line_of("answered", run="r1", round=3, ms=1.5)
        assert line.pop("at").endswith("+00:00")  # type: ignore[attr-defined]
        assert line == {
            "level": "ERROR", "component": "node", "message": "answered",
            "run": "r1", "round": 3, "ms": 1.5,
        }  # fmt: skip

    def test_only_plain_values(self) -> None:
        """What is no number, text or truth is left out: it could be a table."""
        assert "rows" not in line_of("read", rows=[[SECRET]])

    def test_an_error_of_ours_is_told(self) -> None:
        """Its text holds no row, by the rule of `common.errors`."""
        line = line_of("it failed", DataError("table.csv: has no column 'age'"))
        assert line["reason"] == "table.csv: has no column 'age'"

    def test_no_text_of_another_error(self) -> None:
        """The kind and the place of a library's error are told, never its text."""
        try:
            int(SECRET)
        except ValueError as error:
            line = line_of("it failed", error)
        assert line["error"] == "ValueError"
        assert "test_no_text_of_another_error" in str(line["trace"])
        assert SECRET not in json.dumps(line)


class TestSetUp:
    """A process whose logs are set up."""

    def test_all_that_ends_a_process_is_a_line(self, tmp_path: Path) -> None:
        """Warnings and uncaught errors are lines, too, and no text of an error is in them."""
        code = (
            "import sys, pathlib, logging, warnings\n"
            "from common.logs import set_up\n"
            "set_up('node', pathlib.Path(sys.argv[1]))\n"
            "logging.getLogger('httpx').info('HTTP Request')\n"
            "logging.getLogger('hansa').info('here')\n"
            "warnings.warn('old')\n"
            "raise ValueError('customer-4711')\n"
        )
        log = tmp_path / "logs" / "node.jsonl"
        done = subprocess.run(
            [sys.executable, "-c", code, str(log)], capture_output=True, text=True, check=False
        )
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["level"] for line in lines] == ["INFO", "WARNING", "CRITICAL"]
        assert lines[-1]["error"] == "ValueError"
        assert SECRET not in log.read_text() + done.stderr
        assert log.stat().st_mode & 0o777 == 0o600


class TestLastError:
    """What a log says went wrong last."""

    def test_json(self, tmp_path: Path) -> None:
        """The last line of an error, with its reason."""
        log = tmp_path / "log"
        log.write_text(
            '{"level": "ERROR", "message": "old"}\n'
            '{"level": "CRITICAL", "message": "it ends", "reason": "no table"}\n'
            '{"level": "INFO", "message": "bye"}\n'
        )
        assert last_error(log) == "it ends: no table"

    def test_only_the_new(self, tmp_path: Path) -> None:
        """What was there before does not count."""
        log = tmp_path / "log"
        log.write_text('{"level": "ERROR", "message": "old"}\n')
        assert last_error(log, since=log.stat().st_size) == ""

    def test_plain_text(self, tmp_path: Path) -> None:
        """The last line of a program that does not log JSON."""
        log = tmp_path / "log"
        log.write_text("first\nlast\n\n")
        assert last_error(log) == "last"
        assert last_error(tmp_path / "none") == ""
