"""A merchant's customers, validated like a whole table, but a batch of rows at a time.

Memory does not grow with the number of rows, where there is one row a customer. Raw transactions
are added up by customer first, which takes all of them at once.
"""

from collections import Counter
from collections.abc import Generator
from contextlib import closing

import numpy as np
from jaxtyping import UInt64

from clients import cells
from clients.merchant import Merchant
from clients.repeated import Marks
from clients.rows import BATCH_ROWS, Wanted
from clients.sources import source_batches
from clients.table import (
    CustomerBatch,
    CustomerTable,
    check_customers,
    check_mapping,
    read_table,
    refuse_repeated,
    wanted_columns,
)
from common.contract import Contract
from common.errors import DataError


def read_batches(merchant: Merchant, contract: Contract) -> Generator[CustomerBatch, None, None]:
    """Read a merchant's customers in the order of their rows, and validate them.

    What `clients.table.read_table` refuses is refused in the same words, when its batch is read;
    a customer who is in two batches, after the last one.

    Raises:
        DataError: The rows cannot be used; one sentence says where and what to do, and holds
            no value of any row.
        PolicyError: `[columns]` maps a feature that the contract does not have.
    """
    if merchant.data.kind == "transactions":
        yield from in_batches(read_table(merchant, contract))
        return
    columns = merchant.columns
    check_mapping(columns, contract, "merchant.toml")
    wanted = wanted_columns(columns, contract)
    with Marks() as marks, closing(source_batches(merchant.data, wanted)) as sources:
        for source in sources:
            batch = check_customers(source, contract, columns).batch
            marks.add(batch.customer_ids)
            yield batch
        suspects = marks.repeated()
        if len(suspects):
            _refuse_repeated(merchant, marks, suspects)


def in_batches(table: CustomerTable) -> Generator[CustomerBatch, None, None]:
    """Cut a table in memory into batches, at least one."""
    for start in range(0, max(len(table.values), 1), BATCH_ROWS):
        part = slice(start, start + BATCH_ROWS)
        yield CustomerBatch(
            table.customer_ids[part],
            table.values.iloc[part],
            None if table.previous is None else table.previous[part],
        )


def _refuse_repeated(
    merchant: Merchant, marks: Marks, suspects: UInt64[np.ndarray, " suspects"]
) -> None:
    """Read the ids again, and tell the first row whose customer is in an earlier one."""
    column = merchant.columns.customer
    earlier: dict[str, int] = {}
    met: Counter[int] = Counter()
    with closing(source_batches(merchant.data, Wanted((column,)))) as sources:
        for source in sources:
            ids = np.asarray(cells.keys(source, column, "customer id").to_pandas(), dtype=object)
            hashes = marks.of(ids)
            for row in np.flatnonzero(np.isin(hashes, suspects)):
                if ids[row] in earlier:
                    refuse_repeated(source, column, int(row), earlier[ids[row]])
                earlier[ids[row]] = source.start + int(row)
                met[int(hashes[row])] += 1
    if any(met[int(hash_)] < 2 for hash_ in suspects):
        raise DataError(
            f"{source.name}: the rows changed while they were read; try again when nothing "
            "writes to them"
        )
