"""Every table that is refused, and the exact sentence with which it is.

Cells in these tests hold the word SECRET where they can: no message may repeat it.
"""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clients.batches import read_batches
from clients.merchant import Columns, Merchant
from clients.table import make_table, read_table
from common.contract import Contract
from common.errors import DataError, PolicyError

HEADER = "customer_id,spend,age,visits,member,plan,segment,last_segment"
GOOD = "c1,10,30,2,1,basic,low,low"
MakeMerchant = Callable[..., Merchant]


def csv_of(*rows: str) -> bytes:
    """Put a header over rows."""
    return "\n".join((HEADER, *rows, "")).encode()


def message_of(read: Callable[[], object]) -> str:
    """Return the one-sentence message with which reading fails."""
    with pytest.raises(DataError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert "SECRET" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return message


def refusal_of(merchant: Merchant, contract: Contract) -> str:
    """Return the message about a merchant's rows, the same however they are read."""
    message = message_of(lambda: read_table(merchant, contract))
    for rows in (1 << 17, 1):
        with pytest.MonkeyPatch.context() as patch:
            for module in ("batches", "rows", "sources"):
                patch.setattr(f"clients.{module}.BATCH_ROWS", rows)
            assert message_of(lambda: list(read_batches(merchant, contract))) == message
    return message


NUMBER = "the cell is not a number; write it like 3.14"
FLAG = "expected a flag: 0 or 1, false or true, no or yes"
CATEGORY = "the category is not in the contract; correct it, or agree on a new contract"
SEGMENT = "expected a segment of the contract: its name, or its id from 0 to 1"
MISSING = "a value is missing; the contract refuses missing values of"
ONE_ROW = "there are no rows, only column names; add the customers' rows"
MAP = "under [columns] in merchant.toml"
NO_TABLE = "this is not a comma-separated table; check its quotation marks"

CELLS = [
    ("c2,SECRET,30,2,1,basic,low,low", "spend", NUMBER),
    (
        'c2,"3,14",30,2,1,basic,low,low',
        "spend",
        "the cell is not a number; write the decimal point as a point, not as a comma",
    ),
    ("c2,1_000,30,2,1,basic,low,low", "spend", NUMBER),
    ("c2,0x1F,30,2,1,basic,low,low", "spend", NUMBER),
    ("c2,true,30,2,1,basic,low,low", "spend", NUMBER),
    ("c2,,30,2,1,basic,low,low", "spend", f"{MISSING} 'spend'"),
    ("c2, NaN ,30,2,1,basic,low,low", "spend", f"{MISSING} 'spend'"),
    (
        "c2,-inf,30,2,1,basic,low,low",
        "spend",
        "the number is infinite; leave the cell empty or correct it",
    ),
    (
        "c2,10,1e999,2,1,basic,low,low",
        "age",
        "the number is infinite; leave the cell empty or correct it",
    ),
    ("c2,10,30,2,SECRET,basic,low,low", "member", FLAG),
    ("c2,10,30,2,0.5,basic,low,low", "member", FLAG),
    ("c2,10,30,2,,basic,low,low", "member", f"{MISSING} 'member'"),
    ("c2,10,30,2,1,SECRET,low,low", "plan", CATEGORY),
    ("c2,10,30,2,1,Basic,low,low", "plan", CATEGORY),
    ("c2,10,30,2,1,basic,SECRET,low", "segment", SEGMENT),
    ("c2,10,30,2,1,basic,2,low", "segment", SEGMENT),
    ("c2,10,30,2,1,basic,-1,low", "segment", SEGMENT),
    ("c2,10,30,2,1,basic,0.5,low", "segment", SEGMENT),
    ("c2,10,30,2,1,basic,low,SECRET", "last_segment", SEGMENT),
    (",10,30,2,1,basic,low,low", "customer_id", "the customer id is empty; every row needs one"),
    ("  ,10,30,2,1,basic,low,low", "customer_id", "the customer id is empty; every row needs one"),
    (
        "c1,20,30,2,1,plus,low,low",
        "customer_id",
        "the customer is already in row 1; keep one row a customer",
    ),
]


class TestCells:
    """One bad cell in a CSV file."""

    @pytest.mark.parametrize(("row", "column", "problem"), CELLS)
    def test_names_row_line_and_column(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, row: str,
        column: str, problem: str,
    ) -> None:  # fmt: skip
        """The message says file, row, line, column, and what to do."""
        (tmp_path / "t.csv").write_bytes(csv_of(GOOD, row))
        merchant = make_merchant('path = "t.csv"')
        message = refusal_of(merchant, contract)
        assert message == f"t.csv: row 2 (line 3), column '{column}': {problem}"

    @pytest.mark.parametrize(
        "text",
        [
            f'{HEADER}\nc0,1,30,2,1,basic,"low\n",low\n,1,30,2,1,basic,low,low\n',
            f"{HEADER}\n\n{GOOD}\n,1,30,2,1,basic,low,low\n",
            f"{HEADER}\r{GOOD}\r,1,30,2,1,basic,low,low\r",
        ],
        ids=["line break in a cell", "blank line", "carriage returns"],
    )
    def test_leaves_the_line_out_where_it_is_not_exact(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, text: str
    ) -> None:
        """Where rows are not lines only the row is told."""
        (tmp_path / "t.csv").write_text(text, encoding="utf-8", newline="")
        merchant = make_merchant('path = "t.csv"')
        assert refusal_of(merchant, contract) == (
            "t.csv: row 2, column 'customer_id': the customer id is empty; every row needs one"
        )

    @pytest.mark.slow
    def test_finds_a_late_row(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """The row is exact however long the file, and the first of several is told."""
        rows = [f"c{r},{'SECRET' if r in {2345, 2999} else r},30,2,1,plus,1,0" for r in range(3000)]
        (tmp_path / "t.csv").write_bytes(csv_of(*rows))
        merchant = make_merchant('path = "t.csv"')
        message = refusal_of(merchant, contract)
        assert message == f"t.csv: row 2346 (line 2347), column 'spend': {NUMBER}"


FILES = [
    (b"", "t.csv: the file is empty; write column names and rows into it"),
    (b" \n\n", "t.csv: the file is empty; write column names and rows into it"),
    (HEADER.encode(), f"t.csv: {ONE_ROW}"),
    (csv_of(), f"t.csv: {ONE_ROW}"),
    (
        b"customer_id,spent,age,visits,member,plan\nSECRET,1,1,1,1,basic\n",
        f"t.csv: the column 'spend' is missing; did you mean 'spent'? Map it {MAP}",
    ),
    (
        b"customer_id,age,visits,member,plan\nSECRET,1,1,1,basic\n",
        f"t.csv: the column 'spend' is missing; add it, or map another one to it {MAP}",
    ),
    (
        b"customer_SECRET,1,2\ncustomer_SECRET2,1,2\n",
        f"t.csv: the column 'customer_id' is missing; add it, or map another one to it {MAP}",
    ),
    (
        b"customer_id;spend\nSECRET;1\n",
        "t.csv: the column 'customer_id' is missing; "
        "separate the cells by commas, not by semicolons or tabs",
    ),
    (
        b"customer_id,spend,spend,age,visits,member,plan\nSECRET,1,1,1,1,1,basic\n",
        "t.csv: the column 'spend' is there 2 times; keep one of them",
    ),
    (
        csv_of(GOOD, "SECRET,1,30"),
        "t.csv: row 2 (line 3) has 3 cells, expected 8 as in the line of column names",
    ),
    (
        csv_of(GOOD, "", "SECRET,10,30,2,1,basic,low,low,9"),
        "t.csv: row 2 has 9 cells, expected 8 as in the line of column names",
    ),
    (
        csv_of(GOOD, 'SECRET,"10,30,2,1,basic,low,low'),
        "t.csv: a quotation mark is never closed; close it or double it",
    ),
    (
        csv_of(GOOD) + b"c2,10,30,2,1,b\xe4sic,low,low\n",
        f"t.csv: the text is not UTF-8 at byte {len(csv_of(GOOD)) + 14} (line 3); "
        "save the file as UTF-8",
    ),
    (
        csv_of(GOOD)[:-1] + b"\xc3",
        f"t.csv: the text is not UTF-8 at byte {len(csv_of(GOOD)) - 1} (line 2); "
        "save the file as UTF-8",
    ),
    (
        HEADER.encode("utf-16"),
        "t.csv: there is a NUL byte at byte 3 (line 1); save the file as plain UTF-8 text",
    ),
    (
        csv_of(GOOD, "SEC\0RET,10,30,2,1,basic,low,low"),
        f"t.csv: there is a NUL byte at byte {len(csv_of(GOOD)) + 3} (line 3); "
        "save the file as plain UTF-8 text",
    ),
    (
        b",".join(b"x%d" % n for n in range(10_001)) + b"\n",
        "t.csv: expected at most 10000 columns, got 10001; is it one row a customer?",
    ),
    (
        b"x" * (1 << 20) + b"x\n",
        "t.csv: the line of column names is longer than 1 MiB; is this a CSV file?",
    ),
    (
        b"x" * 200_000 + b"\n1\n",
        "t.csv: the line of column names is longer than 1 MiB; is this a CSV file?",
    ),
]


class TestCsvFiles:
    """A CSV file that is bad as a whole."""

    @pytest.mark.parametrize(("content", "message"), FILES)
    def test_says_what_is_wrong(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, content: bytes,
        message: str,
    ) -> None:  # fmt: skip
        """One sentence names the file, the place and the remedy."""
        (tmp_path / "t.csv").write_bytes(content)
        merchant = make_merchant('path = "t.csv"')
        assert refusal_of(merchant, contract) == message

    def test_places_a_broken_byte_across_blocks(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A character that is cut by the scanner's block border is placed exactly."""
        start = csv_of(GOOD)
        filler = b"x" * ((1 << 20) - len(start) - 1)
        (tmp_path / "t.csv").write_bytes(start + filler + b"\xc3" + b"(,1,30,2,1,basic,low,low\n")
        merchant = make_merchant('path = "t.csv"')
        assert refusal_of(merchant, contract) == (
            f"t.csv: the text is not UTF-8 at byte {(1 << 20) - 1} (line 3); save the file as UTF-8"
        )

    def test_a_byte_order_mark_is_fine(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A UTF-8 file with a byte order mark is read like any other."""
        (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(GOOD))
        assert read_table(make_merchant('path = "t.csv"'), contract).customer_ids.tolist() == ["c1"]


class TestOtherSources:
    """Files that are missing or no tables, databases that fail, frames."""

    def test_missing_file(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """The whole path is told, because a wrong folder is the likely fault."""
        merchant = make_merchant('path = "t.csv"')
        assert refusal_of(merchant, contract) == (
            f"{tmp_path}/t.csv: there is no such file; correct `path` under [data]"
        )

    def test_unknown_suffix(self, make_merchant: MakeMerchant, contract: Contract) -> None:
        """Only .csv and .parquet are read."""
        merchant = make_merchant('path = "t.xlsx"')
        assert refusal_of(merchant, contract) == (
            "t.xlsx: expected a file name that ends in .csv or .parquet"
        )

    @pytest.mark.parametrize("content", [b"", b"SECRET", b"PAR1" + b"SECRET" * 99 + b"PAR1"])
    def test_no_parquet(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, content: bytes
    ) -> None:
        """A file that is no Parquet file is said to be none."""
        (tmp_path / "t.parquet").write_bytes(content)
        merchant = make_merchant('path = "t.parquet"')
        assert refusal_of(merchant, contract) == (
            "t.parquet: this is not a readable Parquet file; write it anew"
        )

    def test_damaged_parquet(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A Parquet file whose middle is damaged is refused with one sentence."""
        path = tmp_path / "t.parquet"
        frame = pd.DataFrame(
            {name: [f"SECRET{n}" for n in range(500)] for name in HEADER.split(",")}
        )
        frame.to_parquet(path)
        content = bytearray(path.read_bytes())
        content[4:2000] = bytes(1996)
        path.write_bytes(content)
        merchant = make_merchant('path = "t.parquet"')
        assert refusal_of(merchant, contract) in {
            "t.parquet: this is not a readable Parquet file; write it anew",
            "t.parquet: the file cannot be read (damaged content)",
        }

    def test_parquet_without_rows(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A Parquet file with columns but no rows is refused."""
        pq.write_table(pa.table({n: pa.array([], pa.string()) for n in HEADER.split(",")}),
                       tmp_path / "t.parquet")  # fmt: skip
        merchant = make_merchant('path = "t.parquet"')
        assert refusal_of(merchant, contract) == f"t.parquet: {ONE_ROW}"

    def test_a_row_of_parquet_has_no_line(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A bad cell of a Parquet file is told by row and column."""
        frame = pd.DataFrame([GOOD.split(",")] * 2, columns=HEADER.split(","))
        frame.loc[1, ["customer_id", "spend"]] = ["c2", "SECRET"]
        frame.to_parquet(tmp_path / "t.parquet")
        merchant = make_merchant('path = "t.parquet"')
        message = refusal_of(merchant, contract)
        assert message == f"t.parquet: row 2, column 'spend': {NUMBER}"

    @pytest.mark.parametrize(
        ("url", "query", "message"),
        [
            (
                "sqlite:///shop.db",
                "select * from SECRET",
                "the query of the sqlite database: it failed (OperationalError); "
                "run the `query` under [data] in a client of the database to see why",
            ),
            (
                "sqlite:///shop.db",
                "select * from t where 0",
                f"the query of the sqlite database: {ONE_ROW}",
            ),
            (
                "sqlite:///shop.db",
                "create table if not exists u(a)",
                "the query of the sqlite database: it gives no rows; "
                "`query` must be a SELECT statement",
            ),
            (
                "sqlite:///shop.db",
                "select customer_id from t",
                "the query of the sqlite database: the column 'spend' is missing; "
                f"add it, or map another one to it {MAP}",
            ),
            (
                "nonesuch://ann:SECRET@db/shop",
                "select 1",
                "the query of the nonesuch database: the database cannot be used; "
                "check the `url` under [data] and install its driver",
            ),
            (
                "postgresql+psycopg2://ann:SECRET@db/shop",
                "select 1",
                "the query of the postgresql database: the database cannot be used; "
                "check the `url` under [data] and install its driver",
            ),
            (
                "sqlite:///none.db",
                "select 1",
                "{folder}/none.db: there is no such database file; correct `url` under [data]",
            ),
        ],
    )
    def test_database(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract, url: str,
        query: str, message: str,
    ) -> None:  # fmt: skip
        """A failing database is told without its URL, its query or its words."""
        with sqlite3.connect(tmp_path / "shop.db") as connection:
            connection.execute(f"create table t({HEADER})")
        connection.close()
        merchant = make_merchant(f'url = "{url}"\nquery = "{query}"')
        expected = message.replace("{folder}", str(tmp_path))
        assert refusal_of(merchant, contract) == expected

    def test_database_that_is_none(
        self, tmp_path: Path, make_merchant: MakeMerchant, contract: Contract
    ) -> None:
        """A file that is no database fails with the kind of error only."""
        (tmp_path / "shop.db").write_bytes(b"SECRET" * 1000)
        merchant = make_merchant('url = "sqlite:///shop.db"\nquery = "select * from t"')
        assert refusal_of(merchant, contract).startswith(
            "the query of the sqlite database: it failed (DatabaseError); run"
        )

    @pytest.mark.parametrize(
        ("column", "values", "problem"),
        [
            ("spend", [True, False], "row 1, column 'spend': expected a number, like 3.14"),
            ("spend", [None, b"SECRET"], "row 2, column 'spend': expected a number, like 3.14"),
            ("spend", [1, "SECRET"], f"row 2, column 'spend': {NUMBER}"),
            ("spend", [1.0, np.inf], "row 2, column 'spend': the number is infinite; "
                                     "leave the cell empty or correct it"),
            ("member", [1, 2], f"row 2, column 'member': {FLAG}"),
            ("segment", [0, 2], f"row 2, column 'segment': {SEGMENT}"),
            ("plan", ["basic", "SEC\0RET"],
             "row 2, column 'plan': the text holds a NUL byte; remove it"),
            ("plan", [["SECRET"], ["b"]], "row 1, column 'plan': expected a plain text or number"),
        ],
    )  # fmt: skip
    def test_frame(
        self, contract: Contract, column: str, values: list[object], problem: str
    ) -> None:
        """A frame in memory is refused by the same words."""
        frame = pd.DataFrame([GOOD.split(",")] * 2, columns=HEADER.split(","))
        frame["customer_id"] = ["c1", "c2"]
        frame[column] = values
        message = message_of(lambda: make_table(frame, contract, source="made up"))
        assert message == f"made up: {problem}"

    def test_named_label_column_must_exist(self, contract: Contract) -> None:
        """A label column that the merchant names itself may not be missing."""
        frame = pd.DataFrame([GOOD.split(",")], columns=HEADER.split(","))
        columns = Columns(segment="segmnt")
        message = message_of(lambda: make_table(frame, contract, source="made up", columns=columns))
        assert message == (
            f"made up: the column 'segmnt' is missing; did you mean 'segment' or 'last_segment'? "
            f"Map it {MAP}"
        )

    def test_mapping_of_unknown_feature(self, contract: Contract) -> None:
        """Mapping a feature that the contract lacks is the merchant file's fault."""
        columns = Columns(features={"sped": "x"})
        with pytest.raises(PolicyError) as caught:
            make_table(pd.DataFrame(), contract, source="made up", columns=columns)
        assert str(caught.value) == (
            "made up: columns.features.sped: the contract has no such feature; "
            "expected one of age, member, plan, spend, visits"
        )
