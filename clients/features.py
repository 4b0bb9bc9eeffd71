"""A validated customer table -> the model's bounded inputs.

Uses the contract's public bounds only (`common.scaling`): a customer's encoding depends on
that customer's row and the contract, and on no other customer.
"""

import numpy as np
import pandas as pd
from jaxtyping import Float

from clients.table import CustomerTable
from common.contract import Contract, Feature
from common.scaling import scale


def encode(table: CustomerTable, contract: Contract) -> Float[np.ndarray, "R F"]:
    """Encode every customer as F numbers in [-1, 1].

    Numbers are clipped, transformed and scaled between their public bounds; flags and
    one-hot categories become -1 or +1. With `missing = "indicator"` a missing value is 0
    (a category: all -1) and one more input says so with +1.

    Args:
        table: Customers validated against the same contract.
        contract: Order, bounds and kinds of the features.

    Returns:
        One customer a row, in the table's order; the columns are `common.scaling.inputs`.

    Guarantee: every entry is finite and in [-1, 1], and row r depends on customer r alone.
    """
    return encode_values(table.values, contract)


def encode_values(values: pd.DataFrame, contract: Contract) -> Float[np.ndarray, "R F"]:
    """Encode customers by their values alone, as `encode` does.

    Args:
        values: The contract's features in natural units (`clients.table.CustomerTable`).
        contract: Order, bounds and kinds of the features.
    """
    encoded = np.empty((len(values), contract.inputs), dtype=np.float64)
    start, columns = 0, dict(values.items())
    for feature in contract.features:
        block = encoded[:, start : start + feature.width]
        if feature.kind == "category":
            _fill_category(block, feature, columns[feature.name])
        else:
            _fill_value(block, feature, columns[feature.name])
        start += feature.width
    return encoded


def _fill_value(
    block: Float[np.ndarray, "R W"], feature: Feature, column: "pd.Series[float]"
) -> None:
    values = column.to_numpy(dtype=np.float64)
    missing = np.isnan(values)
    if isinstance(feature.missing, float):
        values = np.where(missing, feature.missing, values)
    if feature.kind == "flag":
        scaled = np.clip(values * 2.0 - 1.0, -1.0, 1.0)
    else:
        scaled = scale(feature, values)
    block[:, 0] = np.nan_to_num(scaled, nan=0.0)
    if feature.missing == "indicator":
        block[:, 1] = np.where(missing, 1.0, -1.0)


def _fill_category(
    block: Float[np.ndarray, "R W"], feature: Feature, column: "pd.Series[str]"
) -> None:
    codes = pd.Categorical(column, categories=list(feature.categories)).codes
    block[:] = -1.0
    known = np.flatnonzero(codes >= 0)
    block[known, codes[known]] = 1.0
    if feature.missing == "indicator":
        block[:, -1] = np.where(codes < 0, 1.0, -1.0)
