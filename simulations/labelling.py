"""Segments of generated and built-in customers, cut from their spend as the contract says."""

from typing import Any

import numpy as np
import pandas as pd

from clients.transactions import spend_in
from common.contract import Contract, Windows
from common.errors import ContractError

Values = np.ndarray[Any, np.dtype[Any]]


def windows_of(contract: Contract) -> Windows:
    """Return the contract's windows.

    Raises:
        ContractError: It has none, so nothing says which purchases are features.
    """
    if contract.windows is None:
        raise ContractError(f"{contract.federation.name}: a [windows] section is needed here")
    return contract.windows


def previous_column(contract: Contract) -> str:
    """Return the column of last period's segment, by default named after the label's."""
    return contract.segments.previous_column or f"{contract.segments.column}_previous"


def cut(spend: "pd.Series[float]", contract: Contract) -> Values:
    """Return the segment id of each spend."""
    return np.asarray(np.digitize(spend, contract.segments.cuts), dtype=np.int64)


def segments(
    purchases: pd.DataFrame, contract: Contract, customers: "pd.Index[Any]"
) -> dict[str, Values]:
    """Compute the label, and the previous period's where the contract has such a period.

    Args:
        purchases: Columns `customer`, `time` and `amount`.
        contract: Says windows, cuts and the names of the columns.
        customers: Whose segments to give, in this order.

    Returns:
        Column name -> segment ids.
    """
    windows = windows_of(contract)
    ids = {contract.segments.column: cut(spend_in(purchases, windows.label, customers), contract)}
    if windows.previous is not None:
        previous = spend_in(purchases, windows.previous, customers)
        ids[previous_column(contract)] = cut(previous, contract)
    return ids
