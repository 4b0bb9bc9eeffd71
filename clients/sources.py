"""Read the wanted columns of the file or database that `merchant.toml` names."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from clients.csv_file import read_csv
from clients.database import read_query
from clients.merchant import Data
from clients.rows import Source, Wanted, choose, refuse_empty
from common.errors import DataError


def read_source(data: Data, wanted: Wanted) -> Source:
    """Read the wanted columns of the file or query that `[data]` names.

    Raises:
        DataError: The source is missing, unreadable, empty, or lacks a column.
    """
    if data.path is None:
        return read_query(data, wanted)
    path = data.path
    if path.suffix.lower() not in {".csv", ".parquet"}:
        raise DataError(f"{path.name}: expected a file name that ends in .csv or .parquet")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; correct `path` under [data]")
    try:
        if path.suffix.lower() == ".csv":
            return read_csv(path, wanted)
        return _read_parquet(path, wanted)
    except OSError as error:
        reason = error.strerror or "damaged content"
        raise DataError(f"{path.name}: the file cannot be read ({reason})") from None


def _read_parquet(path: Path, wanted: Wanted) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            chosen = choose(file.schema_arrow.names, wanted, path.name)
            refuse_empty(file.metadata.num_rows, path.name)
            table = file.read(columns=chosen)
    except pa.ArrowException:
        raise DataError(
            f"{path.name}: this is not a readable Parquet file; write it anew"
        ) from None
    return Source(path.name, {name: table[name] for name in chosen}, table.num_rows)
