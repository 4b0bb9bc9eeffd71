"""A merchant's line items -> behaviour and spend, validated against the contract's windows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from clients import cells
from clients.merchant import Columns, Merchant
from clients.rows import Source, Wanted
from clients.sources import read_source
from clients.transactions import behaviour, spend_in
from common.contract import Contract, Windows
from common.errors import DataError


@dataclass(frozen=True)
class Measured:
    """R customers with a purchase in the feature window.

    Attributes:
        name: What messages call the source.
        values: The contract's features in its order, indexed by customer.
        persons: The person behind each customer.
        spend: Spend in the label window.
        previous_spend: Spend in the previous window, if the contract has one.
    """

    name: str
    values: pd.DataFrame
    persons: Sequence[str]
    spend: Float[np.ndarray, "R"]
    previous_spend: Float[np.ndarray, "R"] | None


def measured(merchant: Merchant, contract: Contract) -> Measured:
    """Read line items and measure every customer in the contract's windows.

    Raises:
        DataError: The contract cannot be computed from line items, or a row cannot be used.
    """
    windows = _check_contract(contract)
    columns = merchant.columns
    source = read_source(merchant.data, _wanted(columns))
    purchases = line_items(source, columns)
    values = behaviour(purchases, windows.features, contract.features)
    customers = values.index
    previous = windows.previous and spend_in(purchases, windows.previous, customers).to_numpy()
    return Measured(
        name=source.name,
        values=values,
        persons=_persons(source, columns, purchases, customers),
        spend=spend_in(purchases, windows.label, customers).to_numpy(),
        previous_spend=previous,
    )


def line_items(source: Source, columns: Columns) -> pd.DataFrame:
    """Validate line items; the columns are those that `clients.transactions` expects.

    Raises:
        DataError: A customer, order, time or amount is missing or cannot be used.
    """
    amounts = cells.numbers(source, columns.amount)
    missing = np.isnan(amounts)
    if missing.any():
        source.refuse(int(missing.argmax()), columns.amount, "the amount is empty; write a number")
    items = {
        "customer": cells.factorized(cells.keys(source, columns.customer, "customer id")),
        "time": cells.times(source, columns.time),
        "amount": amounts,
    }
    if columns.order:
        items["order"] = cells.factorized(cells.keys(source, columns.order, "order"))
    if columns.category:
        items["category"] = cells.factorized(cells.texts(source, columns.category))
    return pd.DataFrame(items, copy=False)


def _check_contract(contract: Contract) -> Windows:
    if contract.windows is None or contract.segments.source != "spend":
        raise DataError(
            "the contract cannot be used with transactions; it needs [windows] and "
            "segments.source = 'spend', or give a table with one row a customer "
            "(kind = 'customers')"
        )
    for feature in contract.features:
        if feature.measure is None or feature.kind != "number":
            raise DataError(
                f"the contract's feature '{feature.name}' cannot be computed from transactions; "
                "it needs kind 'number' and a `measure`"
            )
    return contract.windows


def _wanted(columns: Columns) -> Wanted:
    named = (columns.person, columns.category, columns.order)
    return Wanted(
        (columns.customer, columns.time, columns.amount, *(name for name in named if name))
    )


def _persons(
    source: Source, columns: Columns, purchases: pd.DataFrame, customers: "pd.Index[str]"
) -> Sequence[str]:
    """Give the person behind each customer; refuse a customer of two persons."""
    if not columns.person:
        return list(customers)
    persons = cells.factorized(cells.keys(source, columns.person, "person"))
    coded = purchases["customer"].cat
    rows = np.arange(source.rows)
    first = np.empty(len(coded.categories), dtype=np.int64)
    first[coded.codes.to_numpy()[::-1]] = rows[::-1]
    person = persons.codes[first]
    odd = persons.codes != person[coded.codes.to_numpy()]
    if odd.any():
        problem = "the customer has another person than in an earlier row; keep one"
        source.refuse(int(odd.argmax()), columns.person, problem)
    wanted = coded.categories.get_indexer(customers)
    return [str(key) for key in persons.categories[person[wanted]]]
