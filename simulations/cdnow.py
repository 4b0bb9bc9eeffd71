"""CDNOW: purchases of 23,570 customers of an online CD shop, 1997 to mid-1998.

All first bought in the first quarter of 1997, at one shop. They are dealt at random to
merchants of public random sizes, so merchants differ in size only (an IID partition).
"""

from pathlib import Path

import numpy as np
import pandas as pd

from clients.transactions import behaviour
from common.contract import Contract
from common.errors import DataError
from simulations.labelling import cut, previous_column, segments, windows_of
from simulations.sources import Source

FILE = "CDNOW_master.txt"
SOURCE = Source(
    package="lifetimes",
    folder="datasets",
    files={FILE: "eff6889ed364c5199d6eacbbeb7a6d559971df4406ac876f322c373f00a072ef"},
)
MIN_CUSTOMERS = 5  # of a merchant
MAX_MERCHANTS = 1000


def customer_rows(contract: Contract) -> pd.DataFrame:
    """Build one row a customer, in raw units.

    Returns:
        Columns `customer`, `person`, every feature, the segment and the previous one, sorted
        by customer.

    Raises:
        DataError: The data package is missing or changed.
    """
    windows = windows_of(contract)
    purchases = _read(SOURCE.locate()[FILE])
    rows = behaviour(purchases[["customer", "time", "amount"]], windows.features, contract.features)
    before = purchases[purchases["time"] < pd.Timestamp(windows.features[1])]
    rows["cds"] = before.groupby("customer")["cds"].sum().astype(float)
    rows = rows[[feature.name for feature in contract.features]]
    rows = rows.assign(**segments(purchases, contract, rows.index))
    # There is no earlier period, as everyone is new. The rule looks at what came after the
    # first purchase; for two segments that is whether the customer bought more than once.
    again = before[before.duplicated("customer")].groupby("customer")["amount"].sum()
    rows[previous_column(contract)] = cut(again.reindex(rows.index, fill_value=0.0), contract)
    names = rows.index.map("customer-{:05d}".format).to_numpy()
    rows.insert(0, "customer", names)
    rows.insert(1, "person", names)
    return rows.reset_index(drop=True)


def _read(path: Path) -> pd.DataFrame:
    """Read the purchases, the customer's first purchase first."""
    purchases = pd.read_csv(path, sep=r"\s+", header=0, names=["customer", "date", "cds", "amount"])
    purchases["time"] = pd.to_datetime(purchases.pop("date").astype(str), format="%Y%m%d")
    return purchases.sort_values(["customer", "time"], kind="stable", ignore_index=True)


def deal(rows: pd.DataFrame, merchants: int, seed: int) -> pd.DataFrame:
    """Give every customer to one of the merchants, whose sizes are public and random.

    Args:
        rows: One row a customer.
        merchants: How many; each gets at least `MIN_CUSTOMERS`.
        seed: Of the sizes and of the dealing.

    Returns:
        The rows with a first column `merchant`, sorted by it.

    Raises:
        DataError: The number of merchants is out of range.
    """
    if not 1 <= merchants <= MAX_MERCHANTS:
        raise DataError(f"cdnow: expected 1 to {MAX_MERCHANTS} merchants, got {merchants}")
    random = np.random.default_rng(seed)
    weights = random.pareto(1.2, merchants) + 0.3
    spare = len(rows) - MIN_CUSTOMERS * merchants
    ends = MIN_CUSTOMERS * np.arange(1, merchants + 1) + np.floor(
        spare * np.cumsum(weights) / weights.sum() + 1e-9
    )
    sizes = np.diff(ends.astype(int), prepend=0)
    names = [f"merchant-{number:04d}" for number in range(merchants)]
    dealt = rows.iloc[random.permutation(len(rows))]
    dealt.insert(0, "merchant", np.repeat(names, sizes))
    return dealt.sort_values(["merchant", "customer"], ignore_index=True)
