"""Read the wanted columns of a CSV file as text, and say exactly where it is broken.

The header is checked before anything else is read; one pass over the bytes then finds what a
parser would hide or report vaguely: NUL bytes, text that is not UTF-8, a quote that is never
closed, and whether rows and lines can be told one from the other.
"""

import codecs
import csv
import io
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.csv as pa_csv

from clients.rows import Source, Wanted, choose, numbered_batches, refuse_empty, refuse_wide
from common.errors import DataError

MAX_HEADER_BYTES = 1 << 20
_SCANNED_BYTES = 1 << 20
_PARSED_BYTES = 1 << 24
_STREAMED_BYTES = 1 << 22  # Arrow reads up to 32 such blocks ahead


@dataclass(frozen=True)
class _Scan:
    """What one pass over the bytes tells: lines, and whether every row is one line."""

    lines: int
    plain: bool


def read_csv(path: Path, wanted: Wanted) -> Source:
    """Read the wanted columns of a comma-separated UTF-8 file; empty cells become null.

    Raises:
        DataError: The file is empty, is not UTF-8, is ragged, or lacks a column.
    """
    chosen, scan = _checked(path, wanted)
    with _told(path, chosen, scan):
        table = pa_csv.read_csv(path, **_options(chosen, [], _PARSED_BYTES))
    refuse_empty(table.num_rows, path.name)
    columns = {name: table[name] for name in chosen}
    return Source(path.name, columns, table.num_rows, lambda: _are_lines(scan, table.num_rows))


def csv_batches(path: Path, wanted: Wanted) -> Generator[Source, None, None]:
    """Read the wanted columns of a CSV file like `read_csv`, a batch of rows at a time.

    Raises:
        DataError: As `read_csv`, about a row when its batch is read; or a row is longer than
            4 MiB.
    """
    chosen, scan = _checked(path, wanted)

    def lines() -> bool:
        try:
            return _are_lines(scan, sum(len(table) for table in _tables(path, chosen[:1], scan)))
        except DataError:  # a ragged row further down: nobody can tell
            return False

    yield from numbered_batches(path.name, _tables(path, chosen, scan), lines)


def _checked(path: Path, wanted: Wanted) -> tuple[list[str], _Scan]:
    header = _header(path)
    refuse_wide(header, path.name)
    scan = _scan(path)
    return choose(header, wanted, path.name), scan


def _are_lines(scan: _Scan, rows: int) -> bool:
    """Tell whether every row is one line: blank lines and breaks in cells only ever add lines."""
    return scan.lines == rows + 1


def _header(path: Path) -> list[str]:
    with path.open("rb") as file:
        block = file.read(MAX_HEADER_BYTES + 1)
    if not block.strip():
        raise DataError(f"{path.name}: the file is empty; write column names and rows into it")
    too_long = f"{path.name}: the line of column names is longer than 1 MiB; is this a CSV file?"
    if len(block) > MAX_HEADER_BYTES and b"\n" not in block and b"\r" not in block:
        raise DataError(too_long)
    text = block.decode("utf-8-sig", errors="replace")
    try:
        return next((row for row in csv.reader(io.StringIO(text, newline="")) if row), [])
    except csv.Error:
        raise DataError(too_long) from None


def _scan(path: Path) -> _Scan:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = lines = quotes = 0
    plain, tail = True, b"\n"
    with path.open("rb") as file:
        while block := file.read(_SCANNED_BYTES):
            if (at := block.find(b"\0")) >= 0:
                line = lines + block.count(b"\n", 0, at) + 1
                raise DataError(
                    f"{path.name}: there is a NUL byte at byte {offset + at} (line {line}); "
                    "save the file as plain UTF-8 text"
                )
            try:
                pending = len(decoder.getstate()[0])
                decoder.decode(block)
            except UnicodeDecodeError as error:
                at = max(error.start - pending, 0)
                line = lines + block.count(b"\n", 0, at) + 1
                _refuse_encoding(path, offset - pending + error.start, line)
            around = tail + block
            quotes += block.count(b'"')
            plain = plain and not (quotes or b"\n\n" in around or b"\n\r\n" in around)
            lines += block.count(b"\n")
            offset += len(block)
            tail = around[-2:]
    if decoder.getstate()[0]:
        _refuse_encoding(path, offset - len(decoder.getstate()[0]), lines + 1)
    if quotes % 2:
        raise DataError(f"{path.name}: a quotation mark is never closed; close it or double it")
    return _Scan(lines + (not tail.endswith(b"\n")), plain)


def _refuse_encoding(path: Path, offset: int, line: int) -> NoReturn:
    raise DataError(
        f"{path.name}: the text is not UTF-8 at byte {offset} (line {line}); save the file as UTF-8"
    ) from None


def _tables(path: Path, chosen: list[str], scan: _Scan) -> Iterator[pa.Table]:
    with _told(path, chosen, scan), pa_csv.open_csv(path, **_options(chosen, [])) as reader:
        for batch in reader:
            yield pa.Table.from_batches([batch])


@contextmanager
def _told(path: Path, chosen: list[str], scan: _Scan) -> Iterator[None]:
    """Say which row a parser fails at."""
    try:
        yield
    except pa.ArrowInvalid:
        _refuse_ragged(path, chosen, scan)


def _refuse_ragged(path: Path, chosen: list[str], scan: _Scan) -> NoReturn:
    ragged: list[pa_csv.InvalidRow] = []
    try:
        # Only a single thread knows the number of the row.
        with pa_csv.open_csv(path, **_options(chosen, ragged, threads=False)) as reader:
            for _ in reader:
                pass
    except pa.ArrowInvalid:
        pass
    if not ragged:
        refuse_empty(scan.lines - 1, path.name)
        raise DataError(
            f"{path.name}: this is not a comma-separated table; check its quotation marks"
        ) from None
    broken = ragged[0]
    line = f" (line {broken.number})" if scan.plain else ""
    raise DataError(
        f"{path.name}: row {broken.number - 1}{line} has {broken.actual_columns} cells, "
        f"expected {broken.expected_columns} as in the line of column names"
    ) from None


def _options(
    chosen: list[str],
    ragged: list[pa_csv.InvalidRow],
    block: int = _STREAMED_BYTES,
    *,
    threads: bool = True,
) -> dict[str, Any]:
    def note(row: pa_csv.InvalidRow) -> str:
        ragged.append(row)
        return "error"

    return {
        "read_options": pa_csv.ReadOptions(use_threads=threads, block_size=block),
        "parse_options": pa_csv.ParseOptions(newlines_in_values=True, invalid_row_handler=note),
        "convert_options": pa_csv.ConvertOptions(
            include_columns=chosen,
            column_types={name: pa.string() for name in chosen},
            null_values=[""],
            strings_can_be_null=True,
        ),
    }
