"""Generated customers: valid for any seed, and shaped like what they were calibrated to."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.merchant import Identity
from common.contract import Contract
from common.errors import DataError
from simulations import synthetic
from simulations.datasets import ready_contract
from simulations.synthetic import PARTITIONS, PRESETS, Recipe

VALUE = ready_contract("synthetic-value4")
ACTIVE = ready_contract("synthetic-active28")


def generate(recipe: Recipe, contract: Contract = VALUE, seed: int = 0) -> pd.DataFrame:
    """Put all merchants' rows under each other, with a column `merchant`."""
    parts = [
        table.assign(merchant=name) for name, table in synthetic.stream(recipe, contract, seed)
    ]
    return pd.concat(parts, ignore_index=True)


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Generate as many merchants as Complete Journey has stores."""
    return generate(Recipe(106, 55))


@given(
    merchants=st.integers(1, 6),
    customers=st.integers(1, 30),
    size_sd=st.sampled_from([0.0, 0.4, 1.0]),
    strength=st.sampled_from(sorted(PARTITIONS)),
    seed=st.integers(0, 2**63),
)
@settings(max_examples=25, deadline=None)
def test_any_recipe_gives_valid_tables(
    merchants: int, customers: int, size_sd: float, strength: str, seed: int
) -> None:
    """Ids are valid, customers and persons unique in a merchant, values in natural limits."""
    concentration, shift = PARTITIONS[strength]
    recipe = Recipe(merchants, customers, size_sd, concentration, shift)
    tables = dict(synthetic.stream(recipe, VALUE, seed))
    assert len(tables) == merchants
    for name, table in tables.items():
        Identity(id=name)
        assert len(table) >= 1
        assert table["customer"].is_unique
        assert table["person"].is_unique
        features = table[[feature.name for feature in VALUE.features]]
        assert (features.drop(columns="household_size") >= 0).all().all()
        assert (table["purchases"] >= synthetic.MIN_PURCHASES).all()
        assert table["household_size"].dropna().between(1, 6).all()
        assert table["value4"].between(0, 3).all()
        assert table["value4_previous"].between(0, 3).all()


def test_sizes_are_kept() -> None:
    """Without spread every merchant has exactly the customers asked for."""
    assert (generate(PRESETS["smoke"]).groupby("merchant").size() == 50).all()


def test_a_seed_repeats_and_another_does_not() -> None:
    """Same seed, same rows."""
    first = generate(Recipe(3, 20), seed=7)
    pd.testing.assert_frame_equal(first, generate(Recipe(3, 20), seed=7))
    assert not first.equals(generate(Recipe(3, 20), seed=8))


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks give the same sizes and people as one large block."""
    whole = generate(Recipe(5, 30, size_sd=0.4))
    monkeypatch.setattr(synthetic, "BLOCK", 40)
    blocks = generate(Recipe(5, 30, size_sd=0.4))
    pd.testing.assert_frame_equal(
        whole[["merchant", "customer", "person", "household_size"]],
        blocks[["merchant", "customer", "person", "household_size"]],
    )


def test_the_label_does_not_change_the_customers() -> None:
    """Both labels describe the same purchases."""
    names = [feature.name for feature in VALUE.features]
    value, active = generate(Recipe(2, 40), VALUE), generate(Recipe(2, 40), ACTIVE)
    pd.testing.assert_frame_equal(value[names], active[names])


def test_segments_are_shared_out_as_calibrated(rows: pd.DataFrame) -> None:
    """Shares of value4 are within five points of Complete Journey's stores."""
    shares = np.bincount(rows["value4"], minlength=4) / len(rows)
    np.testing.assert_allclose(shares, [0.335, 0.202, 0.273, 0.190], atol=0.05)


def test_returning_is_as_calibrated() -> None:
    """About 48 % come back within 28 days, and the last 28 days tell much of it."""
    rows = generate(Recipe(106, 55), ACTIVE)
    assert rows["active28"].mean() == pytest.approx(0.482, abs=0.03)
    assert (rows["active28"] == rows["active28_previous"]).mean() > 0.65


def test_spend_has_a_heavy_tail(rows: pd.DataFrame) -> None:
    """The top hundredth of the customers brings about an eighth of the spend."""
    spend = rows["spend"].sort_values(ascending=False)
    assert 0.09 < spend.head(len(spend) // 100).sum() / spend.sum() < 0.18


def test_household_size_is_mostly_unstated(rows: pd.DataFrame) -> None:
    """Two thirds do not say; those who do, lean towards larger purchases."""
    assert rows["household_size"].isna().mean() == pytest.approx(0.676, abs=0.03)
    stated = rows.dropna(subset="household_size")
    correlation = np.corrcoef(stated["household_size"], np.log(stated["mean_purchase"]))[0, 1]
    assert 0.1 < correlation < 0.4


def test_people_shop_at_several_merchants(rows: pd.DataFrame) -> None:
    """A person has two and a half merchants on average, and one household size."""
    people = rows.groupby("person")
    assert people.size().mean() == pytest.approx(2.5, abs=0.1)
    assert people.size().max() <= 12
    assert (people["household_size"].nunique(dropna=False) == 1).all()


def test_one_merchant_has_no_overlap() -> None:
    """With one merchant everybody is a person of their own."""
    assert generate(Recipe(1, 200))["person"].is_unique


def test_stress_partitions_differ_more() -> None:
    """Shares of the segments spread more over merchants, the stronger the partition."""

    def spread(name: str) -> float:
        concentration, shift = PARTITIONS[name]
        found = generate(Recipe(40, 100, concentration=concentration, shift=shift))
        shares = found.groupby("merchant")["value4"].value_counts(normalize=True)
        return float(shares.unstack(fill_value=0).std().mean())

    assert spread("mild") < spread("skewed") < spread("extreme")


def test_the_largest_preset_streams() -> None:
    """A merchant of a large federation comes without generating the others."""
    recipe = replace(PRESETS["xl"], merchants=50)
    names = [name for name, _ in islice(synthetic.stream(recipe, VALUE, 0), 2)]
    assert names == ["merchant-0000", "merchant-0001"]


@pytest.mark.parametrize(
    ("merchants", "customers", "size_sd", "concentration"),
    [(0, 5, 0.0, 57.0), (100_001, 5, 0.0, 57.0), (5, 0, 0.0, 57.0), (5, 5, -1, 57), (5, 5, 0, 0)],
)
def test_an_impossible_recipe_is_refused(
    merchants: int, customers: int, size_sd: float, concentration: float
) -> None:
    """Nothing is generated from numbers that make no sense."""
    with pytest.raises(DataError, match="synthetic: expected"):
        Recipe(merchants, customers, size_sd, concentration)
