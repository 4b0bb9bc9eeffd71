"""Tests of behaviour measured from purchases."""

from datetime import date

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clients.transactions import behaviour, spend_in
from common.contract import Feature
from common.errors import DataError

WINDOW = (date(2017, 1, 1), date(2017, 10, 1))
MEASURES = (
    "recency_days",
    "tenure_days",
    "purchases",
    "spend",
    "mean_purchase",
    "weekend_share",
    "evening_share",
    "mean_gap_days",
    "spend_last:30",
    "purchases_last:30",
    "category_share:FUEL",
    "distinct_categories",
)
FEATURES = [Feature(name=measure, measure=measure, high=90.0) for measure in MEASURES]

# (customer, time, amount, category, order); 2017-09-30 was a Saturday.
ITEMS = [
    ("b", "2017-09-29 18:00", 6.0, "FUEL", "o1"),
    ("b", "2017-09-29 16:59", 4.0, "FOOD", "o1"),
    ("b", "2017-09-30 17:00", 30.0, "FUEL", "o2"),
    ("b", "2017-01-01 00:00", 20.0, None, "o3"),
    ("b", "2017-10-01 00:00", 999.0, "FUEL", "o4"),
    ("b", "2016-12-31 23:59", 999.0, "TOYS", "o5"),
    ("a", "2017-05-03 12:00", 5.0, "FOOD", "o1"),
    ("a", "2017-05-03 12:00", -5.0, "FUEL", "o1"),
    ("c", "2017-12-24 12:00", 7.0, "FUEL", "o9"),
]

items = st.tuples(
    st.sampled_from("abc"),
    st.datetimes(pd.Timestamp("2016-12-01"), pd.Timestamp("2017-11-01")),
    st.floats(-100, 1000).map(lambda amount: round(amount, 2)),
    st.sampled_from(["FUEL", "FOOD", None]),
    st.sampled_from(["o1", "o2", "o3"]),
)


def purchases_of(rows: list[tuple[object, ...]]) -> pd.DataFrame:
    """Build a frame of line items."""
    frame = pd.DataFrame(rows, columns=["customer", "time", "amount", "category", "order"])
    return frame.astype({"time": "datetime64[us]", "amount": "float64"})


def reference(purchases: pd.DataFrame) -> pd.DataFrame:
    """Measure customers by the definitions of the first study, with pandas' groupby."""
    start, end = (pd.Timestamp(day) for day in WINDOW)
    inside = purchases[(purchases.time >= start) & (purchases.time < end)]
    bought = inside.groupby(["customer", "order"]).agg(v=("amount", "sum"), t=("time", "min"))
    bought = bought.reset_index()
    bought["weekend"] = bought.t.dt.day_of_week >= 5
    bought["evening"] = bought.t.dt.hour >= 17
    by = bought.groupby("customer")
    late = bought[bought.t >= end - pd.Timedelta(days=30)].groupby("customer")
    total = inside.groupby("customer").amount.sum()
    fuel = inside[inside.category == "FUEL"].groupby("customer").amount.sum()
    share = (fuel.reindex(total.index, fill_value=0.0) / total).clip(0, 1).where(total > 0, 0.0)
    gaps = (by.t.max() - by.t.min()).dt.days / np.maximum(by.size() - 1, 1)
    columns = [
        (end - by.t.max()).dt.days,
        (end - by.t.min()).dt.days,
        by.size(),
        by.v.sum(),
        by.v.mean(),
        by.weekend.mean(),
        by.evening.mean(),
        gaps.where(by.size() > 1, 90.0),
        late.v.sum().reindex(total.index, fill_value=0.0),
        late.size().reindex(total.index, fill_value=0),
        share,
        inside.groupby("customer").category.nunique(),
    ]
    return pd.DataFrame(dict(zip(MEASURES, columns, strict=True))).astype(float)


class TestBehaviour:
    """behaviour."""

    def test_by_hand(self) -> None:
        """Every measure of a customer with three purchases is as counted by hand."""
        measured = behaviour(purchases_of(ITEMS), WINDOW, FEATURES)
        assert measured.index.tolist() == ["a", "b"]
        assert measured.loc["b"].to_dict() == {
            "recency_days": 0.0,
            "tenure_days": 273.0,
            "purchases": 3.0,
            "spend": 60.0,
            "mean_purchase": 20.0,
            "weekend_share": pytest.approx(2 / 3),
            "evening_share": pytest.approx(1 / 3),
            "mean_gap_days": 136.0,
            "spend_last:30": 40.0,
            "purchases_last:30": 2.0,
            "category_share:FUEL": pytest.approx(0.6),
            "distinct_categories": 2.0,
        }

    def test_one_refunded_purchase(self) -> None:
        """One purchase has the upper bound as gap, and no spend gives a share of 0."""
        measured = behaviour(purchases_of(ITEMS), WINDOW, FEATURES).loc["a"]
        assert measured["mean_gap_days"] == 90.0
        assert measured["spend"] == 0.0
        assert measured["category_share:FUEL"] == 0.0
        assert measured["distinct_categories"] == 2.0

    def test_without_orders_every_row_is_a_purchase(self) -> None:
        """Rows are grouped only where there is an order column."""
        purchases = purchases_of(ITEMS).drop(columns="order")
        assert behaviour(purchases, WINDOW, FEATURES)["purchases"].to_dict() == {"a": 2, "b": 4}

    def test_features_without_a_measure_are_left_out(self) -> None:
        """Only features with a measure become columns."""
        features = [Feature(name="age", high=100.0), Feature(name="n", measure="purchases", high=9)]
        assert list(behaviour(purchases_of(ITEMS), WINDOW, features)) == ["n"]

    def test_unknown_category_has_no_share(self) -> None:
        """Nobody spent anything in a category that does not occur."""
        feature = Feature(name="x", measure="category_share:BOOKS")
        assert behaviour(purchases_of(ITEMS), WINDOW, [feature])["x"].tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("measure", ["category_share:FUEL", "distinct_categories"])
    def test_needs_a_category_column(self, measure: str) -> None:
        """A measure of categories says which column is missing and where to name it."""
        purchases = purchases_of(ITEMS).drop(columns="category")
        with pytest.raises(DataError) as caught:
            behaviour(purchases, WINDOW, [Feature(name="x", measure=measure)])
        assert str(caught.value) == (
            f"feature 'x': the measure '{measure.partition(':')[0]}' needs a category; "
            "name its column as `category` under [columns] in merchant.toml"
        )

    def test_empty_window(self) -> None:
        """A window without purchases gives the columns and no customer."""
        window = (date(2001, 1, 1), date(2001, 2, 1))
        measured = behaviour(purchases_of(ITEMS), window, FEATURES)
        assert list(measured) == list(MEASURES)
        assert len(measured) == 0

    @pytest.mark.slow
    @settings(max_examples=40, deadline=None)
    @given(st.lists(items, min_size=1, max_size=30))
    def test_equals_the_first_study(self, rows: list[tuple[object, ...]]) -> None:
        """The measures are those that the study of the data used."""
        purchases = purchases_of(rows)
        measured, expected = behaviour(purchases, WINDOW, FEATURES), reference(purchases)
        near_zero = expected["spend"].abs() < 1e-6
        pd.testing.assert_frame_equal(
            measured[~near_zero.to_numpy()], expected[~near_zero], atol=1e-6, check_index_type=False
        )

    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(items, min_size=1, max_size=30), st.randoms(use_true_random=False), st.booleans()
    )
    def test_order_of_rows_and_other_customers_change_nothing(
        self, rows: list[tuple[object, ...]], random: "st.random.Random", ordered: bool
    ) -> None:
        """A customer's measures are the same to the last bit, alone or among others."""
        columns = ["customer", "time", "amount", "category", *(["order"] if ordered else [])]
        purchases = purchases_of(rows)[columns]
        measured = behaviour(purchases, WINDOW, FEATURES)
        shuffled = random.sample(range(len(rows)), len(rows))
        coded = purchases.iloc[shuffled].astype({"customer": "category", "category": "category"})
        again = behaviour(coded, WINDOW, FEATURES)
        np.testing.assert_array_equal(measured, again)
        for customer in measured.index:
            alone = behaviour(coded[coded["customer"] == customer], WINDOW, FEATURES)
            np.testing.assert_array_equal(alone.iloc[0], measured.loc[customer])


class TestSpendIn:
    """spend_in."""

    def test_follows_the_customers_given(self) -> None:
        """Spend is in the order asked for, 0 where nothing was bought, refunds included."""
        spend = spend_in(purchases_of(ITEMS), WINDOW, pd.Index(["b", "x", "a"]))
        assert spend.to_dict() == {"b": 60.0, "x": 0.0, "a": 0.0}

    def test_empty_window(self) -> None:
        """A window without purchases gives 0 for everyone."""
        window = (date(2001, 1, 1), date(2001, 2, 1))
        assert spend_in(purchases_of(ITEMS), window, pd.Index(["b"])).tolist() == [0.0]
