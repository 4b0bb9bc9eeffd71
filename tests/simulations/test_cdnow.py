"""CDNOW against the numbers of the data page, and the dealing of its customers."""

import importlib.util
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from simulations import cdnow
from simulations.datasets import load

installed = pytest.mark.skipif(
    importlib.util.find_spec("lifetimes") is None, reason="the extra 'data' is missing"
)


@pytest.fixture(autouse=True)
def _use_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANSA_CACHE", str(tmp_path_factory.mktemp("cache")))


@installed
@pytest.mark.parametrize(
    ("label", "shares", "rule"),
    [("active", [0.701, 0.299], 0.718), ("value3", [0.701, 0.138, 0.161], 0.645)],
)
def test_segments_are_those_of_the_data_page(label: str, shares: list[float], rule: float) -> None:
    """Rows, shares of the segments and the free rule agree."""
    rows = pd.concat(load("cdnow", label=label).merchants.values())
    assert len(rows) == 23_570
    np.testing.assert_allclose(np.bincount(rows[label]) / len(rows), shares, atol=0.001)
    assert (rows[label] == rows[f"{label}_previous"]).mean() == pytest.approx(rule, abs=0.001)
    assert rows["person"].is_unique


@installed
def test_features_are_complete() -> None:
    """All twelve features are there for everyone; a customer of one purchase has the full gap."""
    dataset = load("cdnow", merchants=100)
    rows = pd.concat(dataset.merchants.values())
    features = rows[[feature.name for feature in dataset.contract.features]]
    assert features.shape[1] == 12
    assert features.notna().all().all()
    assert (rows.loc[rows["purchases"] == 1, "gap_days"] == 90).all()
    assert rows["cds"].min() >= 1
    assert len(dataset.merchants) == dataset.contract.federation.min_merchants == 100


@installed
def test_the_seed_decides_who_goes_where() -> None:
    """Same seed, same merchants; another seed, others."""
    first, same, other = (load("cdnow", seed=seed).merchants for seed in (0, 0, 1))
    pd.testing.assert_frame_equal(first["merchant-0000"], same["merchant-0000"])
    assert not first["merchant-0000"].equals(other["merchant-0000"])


@installed
@pytest.mark.parametrize("merchants", [0, 1001])
def test_loading_refuses_an_impossible_number_of_merchants(merchants: int) -> None:
    """The number is checked before the contract is made for it."""
    with pytest.raises(DataError, match=r"expected .*merchants"):
        load("cdnow", merchants=merchants)


def test_a_changed_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another edition of the file stops the load."""
    folder = tmp_path / "old_lifetimes"
    (folder / "datasets").mkdir(parents=True)
    (folder / "datasets" / cdnow.FILE).write_text("id date n value\n1 19970101 1 11.77\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    changed = cdnow.Source("old_lifetimes", "datasets", cdnow.SOURCE.files)
    monkeypatch.setattr(cdnow, "SOURCE", changed)
    with pytest.raises(DataError, match="expected SHA-256"):
        load("cdnow")


@given(st.integers(1, 40), st.integers(0, 2**32), st.integers(200, 400))
def test_dealing_gives_everyone_one_merchant(merchants: int, seed: int, customers: int) -> None:
    """Nobody is lost or doubled, and every merchant gets its least number."""
    rows = pd.DataFrame({"customer": [f"c{number:04d}" for number in range(customers)]})
    dealt = cdnow.deal(rows, merchants, seed)
    assert sorted(dealt["customer"]) == list(rows["customer"])
    sizes = dealt.groupby("merchant").size()
    assert len(sizes) == merchants
    assert sizes.min() >= cdnow.MIN_CUSTOMERS


@pytest.mark.parametrize("merchants", [0, 1001])
def test_an_impossible_number_of_merchants_is_refused(merchants: int) -> None:
    """The range is said."""
    with pytest.raises(DataError, match="expected 1 to 1000 merchants"):
        cdnow.deal(pd.DataFrame({"customer": ["a"]}), merchants, 0)
