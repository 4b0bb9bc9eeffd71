"""A merchant's file, query or frame -> customers validated against the contract.

Everything here stays with the merchant. A customer's row, split and label depend on that
customer alone, so that adding or removing one never changes another.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64, Shaped

from clients import cells
from clients.merchant import Columns, Merchant
from clients.purchases import measured
from clients.rows import Source, Wanted, frame_source
from clients.sources import read_source
from common.contract import Contract, Feature, Training
from common.errors import DataError, PolicyError


@dataclass(frozen=True)
class CustomerTable:
    """One row a customer, validated against a contract (R customers).

    Attributes:
        customer_ids: The merchant's own identifiers, as text.
        values: The contract's features in its order and in natural units: 64-bit floats for
            numbers and flags, categories for categories; missing only where allowed.
        labels: Segment of each customer, -1 where not known.
        previous: Last period's segment, -1 where not known; None without such a column.
        held_out: Customers kept for evaluation and never trained on.
        out_of_bounds: For each number, how many customers lie outside its public bounds
            (encoding clips them). Never leaves the merchant.
    """

    customer_ids: Shaped[np.ndarray, "R"]
    values: pd.DataFrame
    labels: Int64[np.ndarray, "R"]
    previous: Int64[np.ndarray, "R"] | None
    held_out: Bool[np.ndarray, "R"]
    out_of_bounds: dict[str, int]


@dataclass(frozen=True)
class CustomerBatch:
    """Some of a merchant's customers, as far as an assignment needs them (R customers).

    The attributes are those of `CustomerTable`.
    """

    customer_ids: Shaped[np.ndarray, "R"]
    values: pd.DataFrame
    previous: Int64[np.ndarray, "R"] | None


@dataclass(frozen=True)
class CheckedCustomers:
    """Rows that were validated, before anything is worked out from them.

    Attributes:
        batch: The customers.
        persons: Names the person behind each.
        labels: Segment of each, -1 where not known.
    """

    batch: CustomerBatch
    persons: Shaped[np.ndarray, "R"]
    labels: Int64[np.ndarray, "R"]


def read_table(merchant: Merchant, contract: Contract) -> CustomerTable:
    """Read a merchant's customers and validate them against the contract.

    Raises:
        DataError: The rows cannot be used; one sentence says where and what to do, and holds
            no value of any row.
        PolicyError: `[columns]` maps a feature that the contract does not have.
    """
    columns = merchant.columns
    check_mapping(columns, contract, "merchant.toml")
    if merchant.data.kind == "transactions":
        return _from_transactions(merchant, contract)
    return _from_customers(
        read_source(merchant.data, wanted_columns(columns, contract)), contract, columns
    )


def make_table(
    frame: pd.DataFrame,
    contract: Contract,
    *,
    source: str,
    columns: Columns = Columns(),  # noqa: B008 - frozen
) -> CustomerTable:
    """Validate a frame in memory, one row a customer.

    Args:
        frame: Holds the columns that `columns` names; the index is ignored.
        contract: What to validate against.
        source: What messages call the frame.
        columns: How the frame's columns are called.

    Raises:
        DataError: The rows cannot be used.
        PolicyError: `columns` maps a feature that the contract does not have.
    """
    check_mapping(columns, contract, source)
    return _from_customers(
        frame_source(frame, source, wanted_columns(columns, contract)), contract, columns
    )


def is_held_out(persons: Sequence[str], training: Training) -> Bool[np.ndarray, "R"]:
    """Tell which customers are kept for evaluation, by the person behind each.

    A function of the person's key and the contract alone: the first 8 bytes (big-endian) of
    SHA-256("hansa split <split_seed>", NUL, person) as a fraction of 2**64 are compared with
    `held_out`.

    >>> is_held_out(["ada", "ben", "ada"], Training(held_out=0.25)).tolist()
    [True, False, True]
    """
    codes, unique = pd.factorize(np.asarray(persons, dtype=object))
    start = hashlib.sha256(f"hansa split {training.split_seed}\x00".encode())
    digests = bytearray()
    for person in unique:
        digest = start.copy()
        digest.update(str(person).encode())
        digests += digest.digest()[:8]
    fractions = np.frombuffer(bytes(digests), dtype=">u8").astype(np.float64) / 2.0**64
    return (fractions < training.held_out)[codes]


def check_mapping(columns: Columns, contract: Contract, source: str) -> None:
    """Raise a PolicyError where a feature is mapped that the contract does not have."""
    known = {feature.name for feature in contract.features}
    for name in columns.features:
        if name not in known:
            raise PolicyError(
                f"{source}: columns.features.{name}: the contract has no such feature; "
                f"expected one of {', '.join(sorted(known))}"
            )


def _column(feature: Feature, columns: Columns) -> str:
    return columns.features.get(feature.name, feature.name)


def wanted_columns(columns: Columns, contract: Contract) -> Wanted:
    """Name a customer table's columns; labels may lack unless the merchant names theirs."""
    features = [_column(feature, columns) for feature in contract.features]
    named = (columns.person, columns.segment, columns.previous)
    return Wanted(
        required=(columns.customer, *features, *(name for name in named if name)),
        optional=tuple(name for name in _label_columns(columns, contract) if name),
    )


def _label_columns(columns: Columns, contract: Contract) -> tuple[str, str | None]:
    segments = contract.segments
    return columns.segment or segments.column, columns.previous or segments.previous_column


def check_customers(source: Source, contract: Contract, columns: Columns) -> CheckedCustomers:
    """Validate rows, one a customer, against the contract.

    Raises:
        DataError: A cell cannot be used, or a customer is there twice in these rows.
    """
    customers = cells.keys(source, columns.customer, "customer id")
    customer_ids = np.asarray(customers.to_pandas(), dtype=object)
    _refuse_duplicates(source, columns.customer, customer_ids)
    persons = customer_ids
    if columns.person:
        persons = np.asarray(cells.keys(source, columns.person, "person").to_pandas(), dtype=object)
    values = pd.DataFrame(
        {
            feature.name: _values(source, feature, _column(feature, columns))
            for feature in contract.features
        }
    )
    label, previous = _label_columns(columns, contract)
    known = _segments(source, contract, label)
    return CheckedCustomers(
        CustomerBatch(customer_ids, values, _segments(source, contract, previous)),
        persons=persons,
        labels=known if known is not None else np.full(source.rows, cells.MISSING, np.int64),
    )


def refuse_repeated(source: Source, column: str, row: int, first: int) -> NoReturn:
    """Raise a DataError about a customer who is there twice.

    Args:
        source: Holds the later row.
        column: The column of the customers' ids.
        row: Position of the later row in `source`, from 0.
        first: Position of the earlier row in the whole, from 0.
    """
    source.refuse(
        row, column, f"the customer is already in row {first + 1}; keep one row a customer"
    )


def _from_customers(source: Source, contract: Contract, columns: Columns) -> CustomerTable:
    checked = check_customers(source, contract, columns)
    batch = checked.batch
    return CustomerTable(
        customer_ids=batch.customer_ids,
        values=batch.values,
        labels=checked.labels,
        previous=batch.previous,
        held_out=is_held_out(checked.persons.tolist(), contract.training),
        out_of_bounds=_out_of_bounds(batch.values, contract),
    )


def _refuse_duplicates(source: Source, column: str, ids: Shaped[np.ndarray, "R"]) -> None:
    codes, _ = pd.factorize(ids)
    repeated = pd.Series(codes).duplicated().to_numpy()
    if repeated.any():
        row = int(repeated.argmax())
        first = int((codes == codes[row]).argmax())
        refuse_repeated(source, column, row, source.start + first)


def _values(
    source: Source, feature: Feature, column: str
) -> "Float[np.ndarray, ' R'] | pd.Categorical[str]":
    values: Float[np.ndarray, " R"] | pd.Categorical[str]
    if feature.kind == "category":
        problem = "the category is not in the contract; correct it, or agree on a new contract"
        codes = cells.categories(source, column, feature.categories, problem)
        values = pd.Categorical.from_codes(codes, categories=pd.Index(feature.categories))
        missing = codes == cells.MISSING
    else:
        read = cells.numbers if feature.kind == "number" else cells.flags
        values = read(source, column)
        missing = np.isnan(values)
    if feature.missing == "refuse" and missing.any():
        source.refuse(
            int(missing.argmax()),
            column,
            f"a value is missing; the contract refuses missing values of '{feature.name}'",
        )
    return values


def _segments(
    source: Source, contract: Contract, column: str | None
) -> Int64[np.ndarray, "R"] | None:
    if column is None or column not in source.columns:
        return None
    return cells.segments(source, column, contract.segments.names)


def _out_of_bounds(values: pd.DataFrame, contract: Contract) -> dict[str, int]:
    counts, columns = {}, dict(values.items())
    for feature in contract.features:
        if feature.kind == "number":
            numbers = columns[feature.name].to_numpy()
            outside = (numbers < feature.low) | (numbers > feature.high)
            counts[feature.name] = int(np.count_nonzero(outside))
    return counts


def _from_transactions(merchant: Merchant, contract: Contract) -> CustomerTable:
    rows = measured(merchant, contract)
    if rows.values.empty:
        raise DataError(
            f"{rows.name}: no purchase lies in the feature window of the contract; "
            "check the times and `windows.features`"
        )
    return CustomerTable(
        customer_ids=np.asarray(rows.values.index, dtype=object),
        values=rows.values.reset_index(drop=True),
        labels=_cut(rows.spend, contract),
        previous=None if rows.previous_spend is None else _cut(rows.previous_spend, contract),
        held_out=is_held_out(rows.persons, contract.training),
        out_of_bounds=_out_of_bounds(rows.values, contract),
    )


def _cut(spend: Float[np.ndarray, "R"], contract: Contract) -> Int64[np.ndarray, "R"]:
    return np.asarray(np.digitize(spend, contract.segments.cuts), dtype=np.int64)
