"""Tests of reading and validating customer tables."""

import doctest
import hashlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import clients.table
from clients.merchant import Columns, Merchant
from clients.table import CustomerTable, is_held_out, make_table, read_table
from common.contract import Contract, Training

MakeMerchant = Callable[..., Merchant]
MakeContract = Callable[..., Contract]

reals = st.floats(-1e6, 1e6).map(lambda value: value + 0.0)
maybe = st.one_of(st.none(), reals)
rows = st.fixed_dictionaries(
    {
        "spend": reals,
        "age": maybe,
        "visits": maybe,
        "member": st.sampled_from([0, 1]),
        "plan": st.sampled_from(["basic", "plus", None]),
        "segment": st.sampled_from(["low", "high", None]),
        "last_segment": st.sampled_from([0, 1]),
    }
)
ids = st.text("abcXYZ019-_.@äß\"',;", min_size=1, max_size=8)


@st.composite
def frames(draw: st.DrawFn, min_size: int = 1) -> pd.DataFrame:
    """Draw customers with different ids."""
    customers = draw(st.lists(ids, min_size=min_size, max_size=8, unique=True))
    frame = pd.DataFrame([draw(rows) for _ in customers])
    frame = frame.astype({"age": "float64", "visits": "float64"})
    frame.insert(0, "customer_id", customers)
    return frame


def assert_same(one: CustomerTable, other: CustomerTable) -> None:
    """Fail unless two tables are equal to the last bit."""
    assert one.customer_ids.tolist() == other.customer_ids.tolist()
    pd.testing.assert_frame_equal(one.values, other.values, check_exact=True)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.previous is not None
    assert other.previous is not None
    np.testing.assert_array_equal(one.previous, other.previous)
    np.testing.assert_array_equal(one.held_out, other.held_out)
    assert one.out_of_bounds == other.out_of_bounds


def frame_of(**columns: list[object]) -> pd.DataFrame:
    """Build two customers; keywords replace columns, None removes one."""
    frame = pd.DataFrame(
        {
            "customer_id": ["c1", "c2"],
            "spend": [10.0, 20.0],
            "age": [30.0, np.nan],
            "visits": [1, 2],
            "member": [0, 1],
            "plan": ["basic", None],
        }
    )
    return frame.assign(**columns)


class TestSources:
    """The same rows from a CSV file, a Parquet file, a database and memory."""

    @settings(
        max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(frame=frames())
    def test_all_sources_give_equal_tables(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, frame: pd.DataFrame
    ) -> None:
        """What a customer's row means does not depend on where it is kept."""
        expected = make_table(frame, contract, source="frame")
        frame.to_csv(tmp_path / "t.csv", index=False)
        frame.to_parquet(tmp_path / "t.parquet")
        connection = sqlite3.connect(tmp_path / "t.db")
        frame.to_sql("t", connection, index=False, if_exists="replace")
        connection.close()
        for data in (
            'path = "t.csv"',
            'path = "t.parquet"',
            'url = "sqlite:///t.db"\nquery = "select * from t"',
        ):
            assert_same(read_table(make_merchant(data), contract), expected)

    def test_database_chunks_of_different_types(
        self,
        tmp_path: Path,
        make_merchant: MakeMerchant,
        contract: Contract,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A database column may hold numbers in one chunk and text or nothing in the next."""
        monkeypatch.setattr("clients.database._FETCHED_ROWS", 2)
        connection = sqlite3.connect(tmp_path / "t.db")
        connection.execute("create table t(customer_id, spend, age, visits, member, plan)")
        values = [
            (1, 1, 30, None, 1, "basic"),
            ("b", 2, 31, None, 0, None),
            ("c", 2.5, "32", 1, "yes", "plus"),
            (4, "3.25", None, 2, True, "basic"),
        ]
        connection.executemany("insert into t values (?, ?, ?, ?, ?, ?)", values)
        connection.commit()
        connection.close()
        merchant = make_merchant('url = "sqlite:///t.db"\nquery = "select * from t"')
        table = read_table(merchant, contract)
        assert table.customer_ids.tolist() == ["1", "b", "c", "4"]
        assert table.values["spend"].tolist() == [1.0, 2.0, 2.5, 3.25]
        assert table.values["age"].tolist()[:3] == [30.0, 31.0, 32.0]
        assert table.values["member"].tolist() == [1.0, 0.0, 1.0, 1.0]

    def test_query_is_taken_literally(
        self, tmp_path: Path, make_merchant: MakeMerchant, make_contract: MakeContract
    ) -> None:
        """Percent signs and colons in a query are not placeholders."""
        sqlite3.connect(tmp_path / "t.db").close()
        query = "select 'a' as customer_id, 7 % 4 as x where ':y' like '%y'"
        merchant = make_merchant(f'url = "sqlite:///t.db"\nquery = "{query}"')
        table = read_table(merchant, make_contract(features=[{"name": "x", "high": 9.0}]))
        assert table.values["x"].tolist() == [3.0]

    def test_only_named_columns_are_read(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """Other columns may hold anything, and the merchant's names are used."""
        frame = frame_of().rename(columns={"spend": "total, net", "customer_id": "nr."})
        frame.insert(0, "note", ['"', ",\n"])
        frame.to_csv(tmp_path / "t.csv", index=False)
        merchant = make_merchant(
            'path = "t.csv"', columns='customer = "nr."\nfeatures = {spend = "total, net"}'
        )
        assert read_table(merchant, contract).values["spend"].tolist() == [10.0, 20.0]


class TestValues:
    """What cells mean."""

    @pytest.mark.parametrize("cell", ["", " ", "NA", "n/a", "NaN", "null", "None"])
    def test_words_for_missing_numbers(self, contract: Contract, cell: str) -> None:
        """Every usual word for a missing value is understood."""
        table = make_table(frame_of(age=["30", cell]), contract, source="frame")
        np.testing.assert_array_equal(table.values["age"], [30.0, np.nan])

    def test_a_category_may_be_called_none(self, make_contract: MakeContract) -> None:
        """A category that looks like a word for missing is that category."""
        plan = {
            "name": "plan",
            "kind": "category",
            "categories": ["None", "x"],
            "missing": "indicator",
        }
        frame = frame_of(plan=["None", "NA"])
        table = make_table(frame, make_contract(features=[plan]), source="frame")
        assert table.values["plan"].cat.codes.tolist() == [0, -1]

    def test_a_customer_may_be_called_na(self, contract: Contract) -> None:
        """Identifiers are never taken for missing."""
        table = make_table(frame_of(customer_id=["NA", "None"]), contract, source="frame")
        assert table.customer_ids.tolist() == ["NA", "None"]

    @pytest.mark.parametrize(
        "cells",
        [[False, True], [0.0, 1.0], ["no", "Yes"], ["false", "TRUE"], ["0", " 1 "], ["0.0", "1.0"]],
    )
    def test_flags(self, contract: Contract, cells: list[object]) -> None:
        """Flags may be booleans, numbers or words."""
        table = make_table(frame_of(member=cells), contract, source="frame")
        assert table.values["member"].tolist() == [0.0, 1.0]

    def test_values_are_in_contract_order_and_type(self, contract: Contract) -> None:
        """Columns follow the contract, as floats and categories."""
        table = make_table(frame_of().iloc[:, ::-1], contract, source="frame")
        assert list(table.values) == ["spend", "age", "visits", "member", "plan"]
        assert [str(kind) for kind in table.values.dtypes] == ["float64"] * 4 + ["category"]

    def test_counts_customers_outside_the_bounds(self, contract: Contract) -> None:
        """Values outside the public bounds are counted and kept, missing ones are not counted."""
        frame = frame_of(spend=[-1.0, 5000.5], age=[17.9, np.nan], visits=[0, 50])
        table = make_table(frame, contract, source="frame")
        assert table.out_of_bounds == {"spend": 2, "age": 1, "visits": 0}
        assert table.values["spend"].tolist() == [-1.0, 5000.5]

    @pytest.mark.parametrize(
        ("numbers", "expected"),
        [([17, 10**12], ["17", "1000000000000"]), ([17.0, 123456789012.0], ["17", "123456789012"])],
    )
    def test_numeric_ids(
        self, contract: Contract, numbers: list[object], expected: list[str]
    ) -> None:
        """Whole numbers are written as whole numbers."""
        table = make_table(frame_of(customer_id=numbers), contract, source="frame")
        assert table.customer_ids.tolist() == expected


class TestLabels:
    """Labels and last period's segments."""

    @pytest.mark.parametrize(
        ("cells", "expected"),
        [
            (["low", "high"], [0, 1]),
            ([1, 0], [1, 0]),
            ([1.0, np.nan], [1, -1]),
            (["1.0", ""], [1, -1]),
            ([" high ", None], [1, -1]),
        ],
    )
    def test_names_and_ids(
        self, contract: Contract, cells: list[object], expected: list[int]
    ) -> None:
        """Labels may be names or ids, and may be missing."""
        table = make_table(frame_of(segment=cells), contract, source="frame")
        assert table.labels.tolist() == expected

    def test_names_win_over_ids(self, make_contract: MakeContract) -> None:
        """Where a segment is called like another one's id, its name is meant."""
        contract = make_contract(segments={"names": ["1", "0"]})
        table = make_table(frame_of(segment=[0, 1]), contract, source="frame")
        assert table.labels.tolist() == [1, 0]

    def test_table_without_labels(self, contract: Contract) -> None:
        """A table without label columns can still be used, with all labels unknown."""
        table = make_table(frame_of(), contract, source="frame")
        assert table.labels.tolist() == [-1, -1]
        assert table.previous is None

    def test_columns_override_the_contract(self, contract: Contract) -> None:
        """The merchant's own column names go before those of the contract."""
        frame = frame_of(segment=[0, 0], mine=["high", "low"], before=[1, None])
        columns = Columns(segment="mine", previous="before")
        table = make_table(frame, contract, source="frame", columns=columns)
        assert table.labels.tolist() == [1, 0]
        assert table.previous is not None
        assert table.previous.tolist() == [1, -1]


class TestHeldOut:
    """The split into training and held-out customers."""

    def test_follows_the_formula(self) -> None:
        """The split is the documented hash."""
        digest = hashlib.sha256(b"hansa split 7\x00ad\xc3\xa4").digest()
        share = int.from_bytes(digest[:8], "big") / 2**64
        for held_out in (share - 1e-6, share + 1e-6):
            training = Training(held_out=held_out, split_seed=7)
            assert is_held_out(["adä"], training).tolist() == [share < held_out]

    def test_takes_the_stated_share(self) -> None:
        """About the stated share is held out, and another seed takes others."""
        people = [str(person) for person in range(4000)]
        one = is_held_out(people, Training(held_out=0.25))
        other = is_held_out(people, Training(held_out=0.25, split_seed=1))
        assert abs(one.mean() - 0.25) < 0.03
        assert 0.3 < (one != other).mean() < 0.45

    def test_goes_by_person(self, contract: Contract) -> None:
        """Customers of one person are on the same side."""
        size = 60
        frame = pd.concat([frame_of()] * size, ignore_index=True)
        frame["customer_id"] = [f"c{row}" for row in range(len(frame))]
        frame["person"] = [f"p{row // 2}" for row in range(len(frame))]
        table = make_table(frame, contract, source="frame", columns=Columns(person="person"))
        assert (table.held_out[::2] == table.held_out[1::2]).all()
        assert 0 < table.held_out.sum() < len(frame)

    def test_docstring_examples(self) -> None:
        """The examples in the docstrings are true."""
        assert doctest.testmod(clients.table).failed == 0


class TestNeighbours:
    """What one customer's presence changes for the others: nothing."""

    @settings(
        max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(frame=frames(min_size=2), data=st.data())
    def test_removing_and_permuting(
        self, contract: Contract, frame: pd.DataFrame, data: st.DataObject
    ) -> None:
        """Rows, labels and split move with the customer, whoever else is there."""
        order = data.draw(st.permutations(range(len(frame))))
        kept = order[: data.draw(st.integers(1, len(frame)))]
        whole = make_table(frame, contract, source="frame")
        part = make_table(frame.iloc[kept], contract, source="frame")
        assert whole.previous is not None
        expected = CustomerTable(
            customer_ids=whole.customer_ids[kept],
            values=whole.values.iloc[kept].reset_index(drop=True),
            labels=whole.labels[kept],
            previous=whole.previous[kept],
            held_out=whole.held_out[kept],
            out_of_bounds=part.out_of_bounds,
        )
        assert_same(part, expected)
