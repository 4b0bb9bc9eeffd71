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
from jaxtyping import Bool, Float, Int64, Shaped

from common.contract import Feature
from common.errors import DataError

Window = tuple[date, date]

_DAY = np.timedelta64(1, "D")
_EVENING_HOUR = 17


def behaviour(purchases: pd.DataFrame, window: Window, features: Sequence[Feature]) -> pd.DataFrame:
    """Measure every customer with a purchase in the window.

    Args:
        purchases: Line items with the columns `customer`, `time` (datetime64), `amount` and,
            where there is one, `category` and `order`; only a category may be missing.
        window: Start (included) and end (excluded).
        features: Those with a `measure` become columns; see `common.contract.MEASURES`.

    Returns:
        Natural units, not clipped to the bounds; one row a customer, in rising order of the
        customers.

    Raises:
        DataError: A measure needs a category column, and there is none.

    Days are whole days, counted downwards. `mean_gap_days` of one purchase is the feature's
    upper bound. Shares of the spend are 0 where the total spend is not positive.
    """
    items = _items(purchases, window)
    names = [feature.name for feature in features if feature.measure is not None]
    if not len(items.customers):
        return pd.DataFrame(columns=names, index=items.customers, dtype=np.float64)
    bought = _purchases(items)
    columns = {
        feature.name: _measure(feature, bought, items)
        for feature in features
        if feature.measure is not None
    }
    return pd.DataFrame(columns, index=items.customers)


def spend_in(
    purchases: pd.DataFrame, window: Window, customers: "pd.Index[str]"
) -> "pd.Series[float]":
    """Add up what the given customers spent in a window; 0 where nothing.

    Args:
        purchases: Line items as for `behaviour`.
        window: Start (included) and end (excluded).
        customers: Whose spend to give, in this order, each once.
    """
    items = _items(purchases[["customer", "time", "amount"]], window)
    spend = np.bincount(items.customer, weights=items.amount, minlength=len(items.customers))
    known = pd.Series(spend, index=items.customers, dtype=np.float64)
    return known.reindex(customers, fill_value=0.0).rename("spend")


@dataclass(frozen=True)
class _Items:
    """L line items of C customers in a window, sorted by customer, order, time and amount.

    `customer`, `order` and `category` are positions; `category` is -1 where missing.
    """

    customers: "pd.Index[str]"
    categories: "pd.Index[str] | None"
    customer: Int64[np.ndarray, "L"]
    order: Int64[np.ndarray, "L"]
    category: Int64[np.ndarray, "L"]
    time: Shaped[np.ndarray, "L"]
    amount: Float[np.ndarray, "L"]
    end: np.datetime64


@dataclass(frozen=True)
class _Purchases:
    """N purchases, sorted by customer; those of customer c begin at `starts[c]`."""

    time: Shaped[np.ndarray, "N"]
    value: Float[np.ndarray, "N"]
    starts: Int64[np.ndarray, "C"]
    end: np.datetime64

    def total(self, of: Shaped[np.ndarray, "N"]) -> Float[np.ndarray, "C"]:
        """Add up a quantity of the purchases for every customer."""
        return np.add.reduceat(of.astype(np.float64), self.starts)

    def days_since(self, time: Shaped[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
        """Count whole days up to the end of the window."""
        return _whole_days(self.end - time)

    def recent(self, days: str) -> Bool[np.ndarray, "N"]:
        """Tell which purchases lie in the last days of the window."""
        return self.time >= self.end - np.timedelta64(int(days), "D")

    @property
    def count(self) -> Float[np.ndarray, "C"]:
        """Number of purchases of every customer."""
        return np.diff(self.starts, append=len(self.time)).astype(np.float64)

    @property
    def first(self) -> Shaped[np.ndarray, "C"]:
        """Time of every customer's first purchase."""
        return np.minimum.reduceat(self.time, self.starts)

    @property
    def last(self) -> Shaped[np.ndarray, "C"]:
        """Time of every customer's last purchase."""
        return np.maximum.reduceat(self.time, self.starts)


def _items(purchases: pd.DataFrame, window: Window) -> _Items:
    times = purchases["time"].to_numpy()
    start, end = np.datetime64(window[0], "us"), np.datetime64(window[1], "us")
    rows = np.flatnonzero((times >= start) & (times < end))
    customer, customers = _positions(purchases["customer"].iloc[rows])
    order, category, categories = np.zeros_like(rows), np.full(len(rows), -1), None
    if "order" in purchases:
        order, _ = _positions(purchases["order"].iloc[rows])
    if "category" in purchases:
        category, categories = _positions(purchases["category"].iloc[rows])
    time = times[rows].astype("datetime64[us]")
    amount = purchases["amount"].to_numpy(dtype=np.float64)[rows]
    by = np.lexsort((amount, time, order, customer))
    purchase = order[by] if "order" in purchases else np.arange(len(rows))
    return _Items(
        customers=customers,
        categories=categories,
        customer=customer[by],
        order=purchase,
        category=category[by],
        time=time[by],
        amount=amount[by],
        end=end,
    )


def _positions(column: "pd.Series[str]") -> tuple[Int64[np.ndarray, "L"], "pd.Index[str]"]:
    """Number the different values of a column in rising order; -1 where missing."""
    coded = pd.Categorical(column)
    if isinstance(column.dtype, pd.CategoricalDtype):
        coded = coded.remove_unused_categories()
        coded = coded.reorder_categories(coded.categories.sort_values())
    return coded.codes.astype(np.int64), coded.categories.rename(column.name)


def _purchases(items: _Items) -> _Purchases:
    begins = np.flatnonzero(_changes(items.customer) | _changes(items.order))
    customer = items.customer[begins]
    return _Purchases(
        time=np.minimum.reduceat(items.time, begins),
        value=np.add.reduceat(items.amount, begins),
        starts=np.flatnonzero(_changes(customer)),
        end=items.end,
    )


def _changes(values: Int64[np.ndarray, "L"]) -> Bool[np.ndarray, "L"]:
    """Tell which values differ from the one before; the first does."""
    return np.asarray(np.diff(values, prepend=values[:1] - 1) != 0)


def _whole_days(period: Shaped[np.ndarray, "C"]) -> Float[np.ndarray, "C"]:
    return np.asarray(period // _DAY, dtype=np.float64)


def _is_weekend(time: Shaped[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    # 1970-01-01 was a Thursday, day 3 of a week that starts on Monday.
    return (time.astype("datetime64[D]").astype(np.int64) + 3) % 7 >= 5


def _is_evening(time: Shaped[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
    return time.astype("datetime64[h]").astype(np.int64) % 24 >= _EVENING_HOUR


def _mean_gap(bought: _Purchases, single: float) -> Float[np.ndarray, "C"]:
    days = _whole_days(bought.last - bought.first)
    return np.where(bought.count > 1, days / np.maximum(bought.count - 1, 1), single)


_OF_PURCHASES: dict[str, Callable[[_Purchases], Float[np.ndarray, "C"]]] = {
    "recency_days": lambda bought: bought.days_since(bought.last),
    "tenure_days": lambda bought: bought.days_since(bought.first),
    "purchases": lambda bought: bought.count,
    "spend": lambda bought: bought.total(bought.value),
    "mean_purchase": lambda bought: bought.total(bought.value) / bought.count,
    "weekend_share": lambda bought: bought.total(_is_weekend(bought.time)) / bought.count,
    "evening_share": lambda bought: bought.total(_is_evening(bought.time)) / bought.count,
}


def _measure(feature: Feature, bought: _Purchases, items: _Items) -> Float[np.ndarray, "C"]:
    name, _, argument = (feature.measure or "").partition(":")
    if name in _OF_PURCHASES:
        return _OF_PURCHASES[name](bought)
    if name == "mean_gap_days":
        return _mean_gap(bought, feature.high)
    if name == "spend_last":
        return bought.total(np.where(bought.recent(argument), bought.value, 0.0))
    if name == "purchases_last":
        return bought.total(bought.recent(argument))
    if items.categories is None:
        raise DataError(
            f"feature '{feature.name}': the measure '{name}' needs a category; name its column "
            "as `category` under [columns] in merchant.toml"
        )
    if name == "category_share":
        return _category_share(items, items.categories, argument)
    return _distinct_categories(items, len(items.categories))


def _category_share(
    items: _Items, categories: "pd.Index[str]", name: str
) -> Float[np.ndarray, "C"]:
    size = len(items.customers)
    own = items.category == (categories.get_loc(name) if name in categories else -2)
    spend = np.bincount(items.customer[own], weights=items.amount[own], minlength=size)
    total = np.bincount(items.customer, weights=items.amount, minlength=size)
    share = np.divide(spend, total, out=np.zeros(size), where=total > 0)
    return np.clip(share, 0.0, 1.0)


def _distinct_categories(items: _Items, categories: int) -> Float[np.ndarray, "C"]:
    known = items.category >= 0
    pairs = np.unique(items.customer[known] * categories + items.category[known])
    counts = np.bincount(pairs // max(categories, 1), minlength=len(items.customers))
    return counts.astype(np.float64)
