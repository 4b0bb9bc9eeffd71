"""Tests of customer tables that are computed from raw transactions."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from clients.merchant import Merchant
from clients.table import CustomerTable, read_table
from common.contract import Contract
from common.errors import DataError

MakeMerchant = Callable[..., Merchant]
MakeContract = Callable[..., Contract]

ROWS = [
    ("c2", "2017-03-01T10:00:00", 10.0),
    ("c2", "2017-08-01T10:00:00", 20.0),
    ("c2", "2017-10-01T10:00:00", 50.0),
    ("c1", "2017-09-01T10:00:00", 7.5),
    ("c1", "2017-11-01T10:00:00", 49.99),
    ("c3", "2017-01-01T00:00:00", 6000.0),
    ("c4", "2017-12-01T10:00:00", 80.0),
]
FRAME = pd.DataFrame(ROWS, columns=["customer_id", "time", "amount"])


@pytest.fixture
def read(
    tmp_path: Path, make_merchant: MakeMerchant, spend_contract: Contract
) -> Callable[..., CustomerTable]:
    """Give a function that writes rows to a file and reads them as transactions."""

    def read_rows(
        frame: pd.DataFrame, *, columns: str = "", suffix: str = "csv",
        contract: Contract = spend_contract,
    ) -> CustomerTable:  # fmt: skip
        path = tmp_path / f"t.{suffix}"
        if suffix == "csv":
            frame.to_csv(path, index=False)
        elif suffix == "parquet":
            frame.to_parquet(path)
        else:
            connection = sqlite3.connect(path)
            frame.to_sql("t", connection, index=False)
            connection.close()
        data = f'path = "{path.name}"'
        if suffix == "db":
            data = 'url = "sqlite:///t.db"\nquery = "select * from t"'
        return read_table(make_merchant(data, columns=columns, kind="transactions"), contract)

    return read_rows


def assert_expected(table: CustomerTable) -> None:
    """Fail unless the table is the one that ROWS give."""
    assert table.customer_ids.tolist() == ["c1", "c2", "c3"]
    assert table.values["spend"].tolist() == [7.5, 30.0, 6000.0]
    assert table.values["purchases"].tolist() == [1.0, 2.0, 1.0]
    assert table.labels.tolist() == [1, 2, 0]
    assert table.previous is not None
    assert table.previous.tolist() == [1, 1, 0]
    assert table.out_of_bounds == {"spend": 1, "purchases": 0}


class TestReadTransactions:
    """read_table with kind = "transactions"."""

    @pytest.mark.parametrize("suffix", ["csv", "parquet", "db"])
    def test_measures_and_labels_customers(
        self, read: Callable[..., CustomerTable], suffix: str
    ) -> None:
        """Customers with a purchase in the feature window get features, label and history."""
        assert_expected(read(FRAME, suffix=suffix))

    @pytest.mark.parametrize(
        "change",
        [
            pd.to_datetime,
            lambda time: pd.to_datetime(time).dt.tz_localize("Europe/Berlin"),
            lambda time: pd.to_datetime(time).dt.date,
            lambda time: time + "+05:30",
            lambda time: time + "Z",
            lambda time: time.str.replace("T", " ") + ".123456789",
        ],
        ids=["timestamp", "zoned", "date", "offset", "utc", "nanoseconds"],
    )
    def test_times_are_taken_as_written(
        self, read: Callable[..., CustomerTable], change: Callable[[Any], Any]
    ) -> None:
        """A time is the local time that is written, whatever its type or UTC offset."""
        assert_expected(read(FRAME.assign(time=change(FRAME["time"])), suffix="parquet"))

    def test_orders_and_persons(self, read: Callable[..., CustomerTable]) -> None:
        """Items of one order are one purchase, and one person's customers stay together."""
        frame = pd.DataFrame(
            {
                "customer_id": [f"c{n // 2:03}" for n in range(400)],
                "who": [f"p{n // 8}" for n in range(400)],
                "bill": [f"b{n // 2}" for n in range(400)],
                "time": "2017-02-01",
                "amount": 1,
            }
        )
        table = read(frame, columns='person = "who"\norder = "bill"')
        assert set(table.values["purchases"]) == {1.0}
        assert set(table.values["spend"]) == {2.0}
        assert (table.held_out.reshape(-1, 4) == table.held_out[::4, None]).all()
        assert 0 < table.held_out.sum() < 200


BAD = [
    ("customer_id", "", "the customer id is empty; every row needs one"),
    ("amount", "SECRET", "the cell is not a number; write it like 3.14"),
    ("amount", "", "the amount is empty; write a number"),
    ("amount", "inf", "the number is infinite; leave the cell empty or correct it"),
    ("time", "", "the time is empty; every row needs one"),
    ("time", "SECRET", "the cell is not an ISO 8601 time like 2017-10-01T17:30:00"),
    ("time", "01.03.2017", "the cell is not an ISO 8601 time like 2017-10-01T17:30:00"),
    ("time", "2017-02-30", "the cell is not an ISO 8601 time like 2017-10-01T17:30:00"),
    (
        "time",
        "2017-03-01T10:00:00+01:00",
        "some times have a UTC offset and some do not; write all of them alike",
    ),
]


class TestRefusals:
    """Transactions that are refused."""

    @pytest.mark.parametrize(("column", "cell", "problem"), BAD)
    def test_names_row_line_and_column(
        self, read: Callable[..., CustomerTable], column: str, cell: str, problem: str
    ) -> None:
        """A bad cell is told by file, row, line and column, never by its value."""
        frame = FRAME.astype({"amount": str})
        frame.loc[3, column] = cell
        with pytest.raises(DataError) as caught:
            read(frame)
        assert str(caught.value) == f"t.csv: row 4 (line 5), column '{column}': {problem}"

    def test_numbers_are_no_times(self, read: Callable[..., CustomerTable]) -> None:
        """A number is not guessed to be a time."""
        with pytest.raises(DataError) as caught:
            read(FRAME.assign(time=20170301), suffix="parquet")
        assert str(caught.value) == (
            "t.parquet: row 1, column 'time': expected an ISO 8601 time: 2017-10-01T17:30:00"
        )

    def test_missing_parquet_time(self, read: Callable[..., CustomerTable]) -> None:
        """A missing time of a typed column is refused too."""
        times = pd.to_datetime(FRAME["time"]).mask(FRAME.index == 2)
        with pytest.raises(DataError) as caught:
            read(FRAME.assign(time=times), suffix="parquet")
        assert str(caught.value) == (
            "t.parquet: row 3, column 'time': the time is empty; every row needs one"
        )

    def test_customer_of_two_persons(self, read: Callable[..., CustomerTable]) -> None:
        """A customer cannot be on both sides of the split."""
        frame = FRAME.assign(who=["p", "p", "SECRET", "q", "q", "q", "q"])
        with pytest.raises(DataError) as caught:
            read(frame, columns='person = "who"')
        assert str(caught.value) == (
            "t.csv: row 3 (line 4), column 'who': "
            "the customer has another person than in an earlier row; keep one"
        )

    def test_no_purchase_in_the_window(self, read: Callable[..., CustomerTable]) -> None:
        """Purchases outside the feature window give no customers."""
        with pytest.raises(DataError) as caught:
            read(FRAME.assign(time="2016-01-01"))
        assert str(caught.value) == (
            "t.csv: no purchase lies in the feature window of the contract; "
            "check the times and `windows.features`"
        )

    def test_contract_without_windows(
        self, read: Callable[..., CustomerTable], contract: Contract
    ) -> None:
        """A contract without windows cannot be computed from transactions."""
        with pytest.raises(DataError) as caught:
            read(FRAME, contract=contract)
        assert str(caught.value) == (
            "the contract cannot be used with transactions; it needs [windows] and "
            "segments.source = 'spend', or give a table with one row a customer "
            "(kind = 'customers')"
        )

    def test_feature_without_a_measure(
        self, read: Callable[..., CustomerTable], make_contract: MakeContract,
        spend_contract: Contract,
    ) -> None:  # fmt: skip
        """A feature that transactions cannot give is named."""
        document = spend_contract.model_dump(mode="json")
        contract = make_contract(windows=document["windows"], segments=document["segments"])
        with pytest.raises(DataError) as caught:
            read(FRAME, contract=contract)
        assert str(caught.value) == (
            "the contract's feature 'spend' cannot be computed from transactions; "
            "it needs kind 'number' and a `measure`"
        )
