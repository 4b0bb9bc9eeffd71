"""A table in batches is the same table, and is refused for the same reasons."""

import gc
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clients.batches import in_batches, read_batches
from clients.merchant import Merchant
from clients.repeated import Marks
from clients.table import CustomerBatch, CustomerTable, make_table, read_table
from common.contract import Contract
from common.errors import DataError

MakeMerchant = Callable[..., Merchant]
AGAIN = "the customer is already in row {}; keep one row a customer"
SOURCES = ("t.csv", "t.parquet", "t.db")


def batches_of(rows: int) -> pytest.MonkeyPatch:
    """Cut tables into batches of so many rows, until undone."""
    patch = pytest.MonkeyPatch()
    for module in ("batches", "rows", "sources"):
        patch.setattr(f"clients.{module}.BATCH_ROWS", rows)
    patch.setattr("clients.database._FETCHED_ROWS", rows)
    return patch


def customers(count: int) -> pd.DataFrame:
    """Give customers, some of whose values are missing."""
    frame = pd.DataFrame({"customer_id": [f"c{row}" for row in range(count)]})
    frame["spend"] = np.arange(count) * 1.25
    frame["age"] = [None if row % 3 == 0 else 20.0 + row for row in range(count)]
    frame["visits"] = [float(row % 50) for row in range(count)]
    frame["member"] = [row % 2 for row in range(count)]
    frame["plan"] = [("basic", "plus", None)[row % 3] for row in range(count)]
    frame["last_segment"] = [("low", None, "high")[row % 3] for row in range(count)]
    return frame


def write(frame: pd.DataFrame, folder: Path, source: str) -> str:
    """Write customers as a file or a database; return the lines of `[data]`."""
    if source.endswith(".csv"):
        frame.to_csv(folder / source, index=False)
    elif source.endswith(".parquet"):
        frame.to_parquet(folder / source)
    else:
        connection = sqlite3.connect(folder / source)
        frame.to_sql("t", connection, index=False, if_exists="replace")
        connection.close()
        return 'url = "sqlite:///t.db"\nquery = "select * from t"'
    return f'path = "{source}"'


def assert_same(batches: Iterable[CustomerBatch], table: CustomerTable) -> None:
    """Fail unless batches put together are the table, to the last bit."""
    batches = list(batches)
    assert [name for batch in batches for name in batch.customer_ids] == list(table.customer_ids)
    values = pd.concat([batch.values for batch in batches], ignore_index=True)
    pd.testing.assert_frame_equal(values, table.values, check_exact=True)
    if table.previous is None:
        assert all(batch.previous is None for batch in batches)
    else:
        found = [one for batch in batches if batch.previous is not None for one in batch.previous]
        assert found == table.previous.tolist()


class TestReadBatches:
    """read_batches."""

    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(count=st.integers(1, 12), rows=st.integers(1, 6), source=st.sampled_from(SOURCES))
    def test_the_same_customers(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, count: int,
        rows: int, source: str,
    ) -> None:  # fmt: skip
        """In the same order, from every source, with batches of every size."""
        merchant = make_merchant(write(customers(count), tmp_path, source))
        table = read_table(merchant, contract)
        patch = batches_of(rows)
        try:
            batches = list(read_batches(merchant, contract))
        finally:
            patch.undo()
        assert max(len(batch.customer_ids) for batch in batches) == min(rows, count)
        assert_same(batches, table)

    @pytest.mark.parametrize("source", SOURCES)
    def test_no_previous_segment(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, source: str
    ) -> None:
        """A table without last period's segments has none in its batches."""
        frame = customers(5).drop(columns="last_segment")
        merchant = make_merchant(write(frame, tmp_path, source))
        assert_same(read_batches(merchant, contract), read_table(merchant, contract))

    def test_transactions(
        self, tmp_path: Path, make_merchant: MakeMerchant, spend_contract: Contract
    ) -> None:
        """They are added up first; the batches are cut from that table."""
        days = [f"2017-0{1 + row % 9}-15" for row in range(20)]
        frame = pd.DataFrame({"customer_id": [f"c{row % 7}" for row in range(20)], "time": days})
        frame["amount"] = np.arange(20) + 0.5
        frame.to_csv(tmp_path / "t.csv", index=False)
        merchant = make_merchant('path = "t.csv"', kind="transactions")
        patch = batches_of(3)
        try:
            batches = list(read_batches(merchant, spend_contract))
        finally:
            patch.undo()
        assert [len(batch.customer_ids) for batch in batches] == [3, 3, 1]
        assert_same(batches, read_table(merchant, spend_contract))

    @pytest.mark.parametrize("source", SOURCES)
    def test_a_customer_in_two_batches(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, source: str
    ) -> None:
        """Is told by both rows, as in one batch."""
        frame = customers(9)
        frame.loc[[4, 7, 8], "customer_id"] = ["c1", "c5", "c1"]
        merchant = make_merchant(write(frame, tmp_path, source))
        name = "the query of the sqlite database" if source == "t.db" else source
        line = " (line 6)" if source == "t.csv" else ""
        patch = batches_of(2)
        try:
            with pytest.raises(DataError) as caught:
                list(read_batches(merchant, contract))
        finally:
            patch.undo()
        expected = f"{name}: row 5{line}, column 'customer_id': {AGAIN.format(2)}"
        assert str(caught.value) == expected
        with pytest.raises(DataError) as caught:
            read_table(merchant, contract)
        assert str(caught.value) == expected

    def test_two_customers_with_one_hash(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Are two customers."""
        monkeypatch.setattr(Marks, "of", lambda _, ids: np.zeros(len(ids), dtype=np.uint64))
        merchant = make_merchant(write(customers(9), tmp_path, "t.csv"))
        patch = batches_of(2)
        try:
            assert_same(read_batches(merchant, contract), read_table(merchant, contract))
        finally:
            patch.undo()

    def test_rows_that_change_under_the_reader(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Where a suspect is gone when the ids are read again, nothing is taken for sure."""
        frame = customers(6)
        frame.loc[5, "customer_id"] = "c0"
        merchant = make_merchant(write(frame, tmp_path, "t.db"))
        patch = batches_of(2)
        try:
            reading = read_batches(merchant, contract)
            for _ in range(3):
                next(reading)
            write(customers(6), tmp_path, "t.db")
            with pytest.raises(DataError, match="the rows changed while they were read"):
                next(reading)
        finally:
            patch.undo()

    def test_a_bad_row_comes_after_good_batches(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """What lies before it was given already, and its row is counted over all batches."""
        frame = customers(9).astype({"spend": object})
        frame.loc[7, "spend"] = "x"
        merchant = make_merchant(write(frame, tmp_path, "t.csv"))
        patch = batches_of(3)
        try:
            reading = read_batches(merchant, contract)
            assert len(next(reading).customer_ids) == len(next(reading).customer_ids) == 3
            with pytest.raises(DataError, match=r"t\.csv: row 8 \(line 9\), column 'spend'"):
                next(reading)
        finally:
            patch.undo()

    def test_no_line_is_told_where_a_later_row_is_ragged(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Then nobody can tell rows from lines; the row is right all the same."""
        columns = "customer_id,spend,age,visits,member,plan"
        good = "".join(f"c{row},1,30,2,1,basic{' ' * 900}\n" for row in range(40_000))
        text = f"{columns}\nc,x,30,2,1,basic\n{good}c,1,30\n"
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        merchant = make_merchant('path = "t.csv"')
        with pytest.raises(DataError) as caught:
            next(read_batches(merchant, contract))
        assert str(caught.value) == (
            "t.csv: row 1, column 'spend': the cell is not a number; write it like 3.14"
        )

    def test_a_ragged_row_far_down(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Is told by its number, after the batches before it."""
        columns = "customer_id,spend,age,visits,member,plan"
        good = "".join(f"c{row},1,30,2,1,basic{' ' * 900}\n" for row in range(40_000))
        (tmp_path / "t.csv").write_text(f"{columns}\n{good}c,1,30\n", encoding="utf-8")
        merchant = make_merchant('path = "t.csv"')
        reading = read_batches(merchant, contract)
        assert len(next(reading).customer_ids) > 0
        with pytest.raises(DataError) as caught:
            list(reading)
        assert str(caught.value) == (
            "t.csv: row 40001 (line 40002) has 3 cells, expected 6 as in the line of column names"
        )

    def test_a_row_that_is_far_too_long(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Nobody's row has more than 4 MiB; a quotation mark at a wrong place makes such."""
        columns = "customer_id,spend,age,visits,member,plan,note"
        text = f'{columns}\nc1,1,30,2,1,basic,"{"x," * (1 << 22)}"\n'
        (tmp_path / "t.csv").write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="check its quotation marks"):
            list(read_batches(make_merchant('path = "t.csv"'), contract))

    def test_a_reader_that_stops_early_leaves_nothing_open(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Closing it closes the database and the files; open ones would be warned of."""
        merchant = make_merchant(write(customers(9), tmp_path, "t.db"))
        patch = batches_of(2)
        try:
            reading = read_batches(merchant, contract)
            next(reading)
            reading.close()
        finally:
            patch.undo()
        gc.collect()
        assert list(reading) == []

    def test_a_row_group_is_not_read_at_once(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Memory that Arrow holds for a batch is a small part of the file's one row group."""
        rows = 1_500_000
        drawn = np.random.default_rng(0).uniform(0, 1, (3, rows))
        table = pa.table(
            {
                "customer_id": pa.array(np.arange(rows)),
                **dict(zip(("spend", "age", "visits"), drawn, strict=True)),
                "member": np.zeros(rows),
                "plan": pa.nulls(rows, pa.string()),
            }
        )
        pq.write_table(table, tmp_path / "t.parquet", row_group_size=rows)
        merchant = make_merchant('path = "t.parquet"')
        before = pa.total_allocated_bytes()
        patch = batches_of(1000)
        try:
            reading = read_batches(merchant, contract)
            next(reading)
            held = pa.total_allocated_bytes() - before
            reading.close()
        finally:
            patch.undo()
        assert 0 < held < table.nbytes / 3


class TestInBatches:
    """in_batches."""

    def test_an_empty_table_is_one_batch(self, contract: Contract) -> None:
        """So that its files are written, without rows."""
        table = make_table(customers(1), contract, source="made up")
        previous = table.previous
        assert previous is not None
        nobody = CustomerTable(
            table.customer_ids[:0], table.values.iloc[:0], table.labels[:0], previous[:0],
            table.held_out[:0], table.out_of_bounds,
        )  # fmt: skip
        (batch,) = in_batches(nobody)
        assert len(batch.values) == len(batch.customer_ids) == 0
