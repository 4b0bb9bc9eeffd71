"""Read the wanted columns of the file or database that `merchant.toml` names."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clients.csv_file import csv_batches, read_csv
from clients.merchant import Data
from clients.rows import BATCH_ROWS, Source, Wanted, choose, numbered_batches, refuse_empty
from common.errors import DataError

_BUFFERED_BYTES = 1 << 20  # of a column: a whole row group's could be large


def read_source(data: Data, wanted: Wanted) -> Source:
    """Read the wanted columns of the file or query that `[data]` names.

    Raises:
        DataError: The source is missing, unreadable, empty, or lacks a column.
    """
    if data.path is None:
        from clients.database import read_query

        return read_query(data, wanted)
    with _readable(data.path) as path:
        if path.suffix.lower() == ".csv":
            return read_csv(path, wanted)
        with _parquet(path, wanted) as (file, chosen):
            table = file.read(columns=chosen)
    return Source(path.name, {name: table[name] for name in chosen}, table.num_rows)


def source_batches(data: Data, wanted: Wanted) -> Generator[Source, None, None]:
    """Read the same rows in the same order, at most `BATCH_ROWS` of them at a time.

    Memory does not grow with the number of rows.

    Raises:
        DataError: As `read_source`; about a row when its batch is read.
    """
    if data.path is None:
        from clients.database import query_batches

        yield from query_batches(data, wanted)
        return
    with _readable(data.path) as path:
        if path.suffix.lower() == ".csv":
            yield from csv_batches(path, wanted)
            return
        with _parquet(path, wanted) as (file, chosen):
            batches = file.iter_batches(BATCH_ROWS, columns=chosen)
            tables = (pa.Table.from_batches([batch]) for batch in batches)
            yield from numbered_batches(path.name, tables)


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise DataError(f"{path.name}: expected a file name that ends in .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; correct `path` under [data]")
    try:
        yield path
    except OSError as error:
        reason = error.strerror or "damaged content"
        raise DataError(f"{path.name}: the file cannot be read ({reason})") from None


@contextmanager
def _parquet(path: Path, wanted: Wanted) -> Iterator[tuple[pq.ParquetFile, list[str]]]:
    try:
        with pq.ParquetFile(path, buffer_size=_BUFFERED_BYTES, pre_buffer=False) as file:
            chosen = choose(file.schema_arrow.names, wanted, path.name)
            refuse_empty(file.metadata.num_rows, path.name)
            yield file, chosen
    except pa.ArrowException:
        raise DataError(
            f"{path.name}: this is not a readable Parquet file; write it anew"
        ) from None
