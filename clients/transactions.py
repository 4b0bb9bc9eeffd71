"""Purchases -> one row of behaviour a customer, in natural units.

Line items of one customer and one order are one purchase: its time is that of the earliest
item, its value the sum of the items. Without an order column every row is a purchase of its
own. Periods are half-open, [start, end).

A customer's row depends on that customer's items only, and not on the order of the rows: items
are sorted before they are added up, so that even rounding errors are the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import pandas as pd
from jaxtyping import Float, Int, Int64, Shaped

from common.contract import Feature
from common.errors import DataError

Window = tuple[date, date]
Times = Shaped[np.ndarray, "N"]
Codes = Int[np.ndarray, "N"]

_DAY = np.timedelta64(1, "D")
_EVENING_HOUR = 17
_MONDAY_OFFSET = 3  # 1970-01-01 was a Thursday


@dataclass(frozen=True)
class _Purchases:
    """All purchases of C customers, sorted by customer, at least one a customer.

    `starts` is where each customer's purchases start; `end` is the end of the window.
    """

    customer: Int64[np.ndarray, "N"]
    time: Shaped[np.ndarray, "N"]
    value: Float[np.ndarray, "N"]
    starts: Int64[np.ndarray, "C"]
    end: np.datetime64

    def total(self, of: Shaped[np.ndarray, "N"]) -> Float[np.ndarray, "C"]:
        """Add up a quantity of the purchases for every customer."""
        return np.add.reduceat(of, self.starts, dtype=np.float64)

    @property
    def count(self) -> Float[np.ndarray, "C"]:
        """Number of purchases of every customer."""
        return np.diff(self.starts, append=len(self.customer)).astype(np.float64)

    @property
    def first(self) -> Shaped[np.ndarray, "C"]:
        """Time of every customer's first purchase."""
        return np.minimum.reduceat(self.time, self.starts)

    @property
    def last(self) -> Shaped[np.ndarray, "C"]:
        """Time of every customer's last purchase."""
        return np.maximum.reduceat(self.time, self.starts)

    def recent(self, days: int) -> Shaped[np.ndarray, "N"]:
        """Tell which purchases lie in the last days of the window."""
        return self.time >= self.end - np.timedelta64(days, "D")


@dataclass(frozen=True)
class _Baskets:
    """Spend of every customer in every category, for the measures that look into purchases."""

    customer: Int64[np.ndarray, "M"]
    category: Int64[np.ndarray, "M"]
    amount: Float[np.ndarray, "M"]
    names: tuple[str, ...]

    def spend(self, name: str, customers: int) -> Float[np.ndarray, "C"]:
        """Add up every customer's spend in one category; zero for an unknown one."""
        own = self.category == (self.names.index(name) if name in self.names else -2)
        return np.bincount(self.customer[own], weights=self.amount[own], minlength=customers)

    def distinct(self, customers: int) -> Float[np.ndarray, "C"]:
        """Count every customer's different categories."""
        known = self.category >= 0
        pairs = np.unique(self.customer[known] * len(self.names) + self.category[known])
        counts = np.bincount(pairs // max(len(self.names), 1), minlength=customers)
        return counts.astype(np.float64)


def behaviour(
    purchases: pd.DataFrame, window: Window, features: Sequence[Feature]
) -> pd.DataFrame:
    """Measure every customer with a purchase in the window.

    Args:
        purchases: Line items with the columns `customer`, `time` (datetime64), `amount` and,
            where there is one, `category` and `order`.
        window: Start (included) and end (excluded).
        features: Those with a `measure` become columns; see `common.contract.MEASURES`.

    Returns:
        Natural units, not clipped to the bounds; one row a customer, in rising order of the
        customers.

    Raises:
        DataError: A customer or order is missing, or a measure needs a category column.

    Shares of the spend are 0 where the total spend is not positive. Whole days are counted
    downwards. `mean_gap_days` of one purchase is the feature's upper bound.
    """
    measured = [feature for feature in features if feature.measure is not None]
    inside = np.flatnonzero(_inside(purchases["time"], window))
    items, customers, codes = _sorted_items(purchases, inside)
    if not len(customers):
        return pd.DataFrame({f.name: np.empty(0) for f in measured}, index=customers)
    bought = _purchases(items, codes, np.datetime64(window[1], "us"))
    baskets = _baskets(items, codes, measured)
    columns = {feature.name: _measure(feature, bought, baskets) for feature in measured}
    return pd.DataFrame(columns, index=customers)


def spend_in(
    purchases: pd.DataFrame, window: Window, customers: "pd.Index[str]"
) -> "pd.Series[float]":
    """Add up what the given customers spent in a window; 0 where nothing.

    Args:
        purchases: Line items as for `behaviour`.
        window: Start (included) and end (excluded).
        customers: Whose spend to give, in this order; each once.
    """
    inside = np.flatnonzero(_inside(purchases["time"], window))
    places = customers.get_indexer(pd.Index(_taken(purchases["customer"], inside)))
    amounts = purchases["amount"].to_numpy(dtype=np.float64)[inside]
    known = places >= 0
    places, amounts = places[known], amounts[known]
    order = np.lexsort((amounts, places))
    spend = np.bincount(places[order], weights=amounts[order], minlength=len(customers))
    return pd.Series(spend, index=customers, name="spend", dtype=np.float64)


def _inside(times: "pd.Series[pd.Timestamp]", window: Window) -> Shaped[np.ndarray, "N"]:
    values = times.to_numpy()
    start, end = (np.datetime64(day, "us") for day in window)
    return (values >= start) & (values < end)


def _taken(column: "pd.Series[str]", rows: Codes) -> "pd.Series[str] | pd.Categorical":
    return column.iloc[rows]


def _codes(column: "pd.Series[str]", name: str) -> tuple[Int64[np.ndarray, "N"], "pd.Index[str]"]:
    """Number the different values of a column in rising order; -1 where missing."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        used, codes = np.unique(column.cat.codes, return_inverse=True)
        missing = int(len(used) > 0 and used[0] < 0)
        names = column.cat.categories[used[missing:]]
        order = np.append(np.argsort(np.argsort(names)), -1)
        return order[codes - missing].astype(np.int64), names.sort_values().rename(name)
    codes, names = pd.factorize(column, sort=True)
    return codes.astype(np.int64), pd.Index(names, name=name)


def _sorted_items(
    purchases: pd.DataFrame, inside: Codes
) -> tuple[pd.DataFrame, "pd.Index[str]", Int64[np.ndarray, "N"]]:
    """Sort the items in the window by customer, order, time and amount."""
    codes, customers = _codes(purchases["customer"].iloc[inside], "customer")
    if "order" in purchases:
        orders, names = _codes(purchases["order"].iloc[inside], "order")
    else:
        orders, names = np.arange(len(inside)), pd.RangeIndex(len(inside))
