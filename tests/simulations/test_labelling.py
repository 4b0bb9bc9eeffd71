"""Segments cut from spend as the contract says."""

import numpy as np
import pandas as pd
import pytest

from common.errors import ContractError
from simulations.datasets import ready_contract
from simulations.labelling import cut, previous_column, segments, windows_of

CONTRACT = ready_contract("synthetic-value4")


def test_a_spend_on_a_cut_belongs_to_the_higher_segment() -> None:
    """Nothing is gone, a cent is small, 50 is regular and 300 is big."""
    spend = pd.Series([0.0, 0.01, 49.99, 50.0, 299.99, 300.0])
    assert list(cut(spend, CONTRACT)) == [0, 1, 1, 2, 2, 3]


def test_windows_are_half_open() -> None:
    """The label window's first day counts, its last does not; nor does another customer."""
    purchases = pd.DataFrame(
        {
            "customer": [1, 1, 1, 2],
            "time": pd.to_datetime(
                ["2017-09-30 23:59", "2017-10-01 00:00", "2018-01-01 00:00", "2017-10-02 12:00"]
            ),
            "amount": [400.0, 60.0, 400.0, 5.0],
        }
    )
    found = segments(purchases, CONTRACT, pd.Index([2, 1, 3]))
    np.testing.assert_array_equal(found["value4"], [1, 2, 0])
    np.testing.assert_array_equal(found["value4_previous"], [0, 3, 0])


def test_without_windows_there_are_no_segments() -> None:
    """The message names the contract."""
    bare = CONTRACT.model_copy(update={"windows": None})
    with pytest.raises(ContractError, match=r"Synthetic, value4: a \[windows\] section"):
        windows_of(bare)


def test_the_previous_column_has_a_default_name() -> None:
    """A contract need not name it."""
    unnamed = CONTRACT.segments.model_copy(update={"previous_column": None})
    assert previous_column(CONTRACT.model_copy(update={"segments": unnamed})) == "value4_previous"
