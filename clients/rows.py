"""Named Arrow columns of a merchant's rows, whatever they were read from.

What is refused is refused by source, row and column: messages name columns by the names that
the contract and `merchant.toml` use, and never repeat a cell.
"""

import difflib
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pandas as pd
import pyarrow as pa

from common.errors import DataError

MAX_COLUMNS = 10_000
BATCH_ROWS = 1 << 17


@dataclass(frozen=True)
class Wanted:
    """Names of the columns to read; `optional` ones may be absent."""

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """Columns of R rows, and how to tell a person where a row is.

    Attributes:
        name: What messages call the source, usually the file's name.
        columns: The wanted columns that exist.
        rows: R.
        lines: Finds out whether row r (from 1) is exactly line r + 1 of the file.
        start: How many rows of the whole lie before these.
    """

    name: str
    columns: Mapping[str, pa.ChunkedArray]
    rows: int
    lines: Callable[[], bool] = lambda: False
    start: int = 0

    def refuse(self, row: int, column: str, problem: str) -> NoReturn:
        """Raise a DataError about one cell.

        Args:
            row: Position in the columns, from 0.
            column: Name of the column.
            problem: What is wrong and what to do, without the cell's value.
        """
        number = self.start + row + 1
        line = f" (line {number + 1})" if self.lines() else ""
        raise DataError(f"{self.name}: row {number}{line}, column '{column}': {problem}") from None


def numbered_batches(
    name: str, tables: Iterable[pa.Table], lines: Callable[[], bool] = lambda: False
) -> Generator[Source, None, None]:
    """Cut tables that follow one another into batches of at most `BATCH_ROWS` rows.

    Raises:
        DataError: They have no rows.
    """
    start = 0
    for table in tables:
        for offset in range(0, table.num_rows, BATCH_ROWS):
            part = table.slice(offset, BATCH_ROWS)
            columns = {column: part[column] for column in part.column_names}
            yield Source(name, columns, part.num_rows, lines, start)
            start += part.num_rows
    refuse_empty(start, name)


def frame_source(frame: pd.DataFrame, name: str, wanted: Wanted) -> Source:
    """Take the wanted columns of a frame in memory.

    Raises:
        DataError: The frame has no rows, or lacks a column.
    """
    header = [str(column) for column in frame.columns]
    chosen = choose(header, wanted, name)
    refuse_empty(len(frame), name)
    cells = dict(zip(header, (series for _, series in frame.items()), strict=True))
    columns = {column: arrow_column(cells[column]) for column in chosen}
    return Source(name, columns, len(frame))


def choose(header: Sequence[str], wanted: Wanted, name: str) -> list[str]:
    """Choose the wanted columns of a header.

    Raises:
        DataError: There are absurdly many columns, one is missing, or one is there twice.
    """
    refuse_wide(header, name)
    known = set(header)
    for column in wanted.required:
        if column not in known:
            hint = _hint(column, header, known.intersection(wanted.required))
            raise DataError(f"{name}: the column '{column}' is missing; {hint}")
    chosen = [c for c in dict.fromkeys(wanted.required + wanted.optional) if c in known]
    for column in chosen:
        if header.count(column) > 1:
            raise DataError(
                f"{name}: the column '{column}' is there {header.count(column)} times; "
                "keep one of them"
            )
    return chosen


def refuse_wide(header: Sequence[str], name: str) -> None:
    """Raise a DataError if there are absurdly many columns."""
    if len(header) > MAX_COLUMNS:
        raise DataError(
            f"{name}: expected at most {MAX_COLUMNS} columns, got {len(header)}; "
            "is it one row a customer?"
        )


def refuse_empty(rows: int, name: str) -> None:
    """Raise a DataError if there are no rows."""
    if rows == 0:
        raise DataError(
            f"{name}: there are no rows, only column names; add the customers' rows"
        ) from None


def arrow_column(series: "pd.Series[Any]") -> pa.ChunkedArray:
    """Turn a column in memory into Arrow; cells of several types become texts."""
    try:
        cells = pa.array(series, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
        texts = [None if pd.isna(cell) is True else str(cell) for cell in series]
        cells = pa.array(texts, type=pa.large_string())
    return cells if isinstance(cells, pa.ChunkedArray) else pa.chunked_array([cells])


def _hint(column: str, header: Sequence[str], found: set[str]) -> str:
    """Say what the column may be called, unless the header could be a row of data."""
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        return "separate the cells by commas, not by semicolons or tabs"
    near = difflib.get_close_matches(column, header, n=3, cutoff=0.6) if found else []
    if near:
        names = " or ".join(f"'{name}'" for name in near)
        return f"did you mean {names}? Map it under [columns] in merchant.toml"
    return "add it, or map another one to it under [columns] in merchant.toml"
