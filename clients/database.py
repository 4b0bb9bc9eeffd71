"""Read the wanted columns of a database query through SQLAlchemy.

Messages name the kind of database only: a URL holds a password, and a driver's own words may
repeat a cell.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import SQLAlchemyError

from clients.merchant import Data
from clients.rows import Source, Wanted, arrow_column, choose, numbered_batches, refuse_empty
from common.errors import DataError

_FETCHED_ROWS = 50_000


def read_query(data: Data, wanted: Wanted) -> Source:
    """Run the query of `[data]` and keep the wanted columns.

    Raises:
        DataError: The database or the query fails, or lacks a column.
    """
    with _connected(data) as (connection, name):
        parts = list(_fetch(connection, data.query or "", name, wanted))
    rows = sum(part.num_rows for part in parts)
    refuse_empty(rows, name)
    names = parts[0].column_names
    return Source(
        name, {column: _joined([part[column] for part in parts]) for column in names}, rows
    )


def query_batches(data: Data, wanted: Wanted) -> Generator[Source, None, None]:
    """Run the query like `read_query`, and give a batch of rows at a time.

    Raises:
        DataError: As `read_query`.
    """
    with _connected(data) as (connection, name):
        yield from numbered_batches(name, _fetch(connection, data.query or "", name, wanted))


@contextmanager
def _connected(data: Data) -> Iterator[tuple[Connection, str]]:
    """Open the database; say how messages call the query."""
    url = make_url(data.url.get_secret_value() if data.url is not None else "")
    name = f"the query of the {url.get_backend_name()} database"
    _refuse_missing_database(url)
    try:
        engine = create_engine(url)
    except (SQLAlchemyError, ImportError, TypeError, ValueError):
        raise DataError(
            f"{name}: the database cannot be used; check the `url` under [data] "
            "and install its driver"
        ) from None
    try:
        with engine.connect() as connection:
            yield connection, name
    except SQLAlchemyError as error:
        raise DataError(
            f"{name}: it failed ({type(error).__name__}); run the `query` under [data] in a "
            "client of the database to see why"
        ) from None
    finally:
        engine.dispose()


def _refuse_missing_database(url: URL) -> None:
    """SQLite would make an empty database where a file name is wrong."""
    file = url.database or ":memory:"
    if url.get_backend_name() != "sqlite" or file == ":memory:" or file.startswith("file:"):
        return
    if not Path(file).is_file():
        raise DataError(f"{file}: there is no such database file; correct `url` under [data]")


def _fetch(connection: Connection, query: str, name: str, wanted: Wanted) -> Iterator[pa.Table]:
    # no_parameters: a `%` or `:name` in the merchant's query is not ours to replace.
    options = {"no_parameters": True, "stream_results": True}
    result = connection.exec_driver_sql(query, execution_options=options)
    if not result.returns_rows:
        raise DataError(f"{name}: it gives no rows; `query` must be a SELECT statement")
    header = list(result.keys())
    chosen = choose(header, wanted, name)
    places = [header.index(column) for column in chosen]
    for part in result.partitions(_FETCHED_ROWS):
        cells = [arrow_column(pd.Series([row[at] for row in part], dtype=object)) for at in places]
        yield pa.table(cells, names=chosen)


def _joined(chunks: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    """Join chunks whose types were inferred one by one."""
    types = {chunk.type for chunk in chunks if not pa.types.is_null(chunk.type)}
    if len(types) == 1:
        joined = types.pop()
    elif types and all(pa.types.is_integer(t) or pa.types.is_floating(t) for t in types):
        joined = pa.float64()
    else:
        joined = pa.large_string()
    cast = (pc.cast(chunk, joined) for chunk in chunks)
    return pa.chunked_array(list(chain.from_iterable(c.chunks for c in cast)), type=joined)
