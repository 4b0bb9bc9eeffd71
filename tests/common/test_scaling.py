"""Tests of the formulas between natural units and model inputs."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.scaling
from common.contract import Contract, Feature, parse_contract
from common.errors import ContractError
from common.scaling import Input, inputs, natural, scale, unscale

numbers = st.floats(-1e9, 1e9)


@st.composite
def features(draw: st.DrawFn) -> Feature:
    """Draw a number feature with distinguishable bounds."""
    transform = draw(st.sampled_from(["none", "log1p", "sqrt"]))
    low = draw(st.floats(0.0 if transform != "none" else -1e6, 1e6))
    return Feature(name="x", low=low, high=low + draw(st.floats(1, 1e6)), transform=transform)


def contract_of(*rows: dict[str, object]) -> Contract:
    """Build a contract with the given features."""
    document = {
        "federation": {"name": "test"},
        "features": list(rows),
        "segments": {"names": ["a", "b"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract(document, source="test")


EVERY_KIND = contract_of(
    {"name": "age", "low": 20.0, "high": 80.0, "missing": "indicator", "unit": "years"},
    {"name": "member", "kind": "flag"},
    {"name": "plan", "kind": "category", "categories": ["s", "m"], "missing": "indicator"},
)


class TestScale:
    """scale and unscale."""

    @given(features(), st.lists(numbers, min_size=1))
    def test_stays_within_one(self, feature: Feature, values: list[float]) -> None:
        """Whatever the value, the input is in [-1, 1]."""
        scaled = scale(feature, np.array(values))
        assert np.all(np.abs(scaled) <= 1.0)

    @given(features(), numbers, numbers)
    def test_rises(self, feature: Feature, one: float, other: float) -> None:
        """A larger value never gives a smaller input."""
        smaller, larger = scale(feature, np.sort([one, other]))
        assert smaller <= larger

    @given(features(), st.floats(-1.5, 1.5), st.floats(-1.5, 1.5))
    def test_inverse_rises(self, feature: Feature, one: float, other: float) -> None:
        """A larger input never gives a smaller value, even outside [-1, 1]."""
        smaller, larger = unscale(feature, np.sort([one, other]))
        assert feature.low <= smaller <= larger <= feature.high

    @given(features(), st.floats(0, 1))
    def test_inverse_undoes(self, feature: Feature, share: float) -> None:
        """A value within the bounds comes back."""
        value = np.array([feature.low + share * (feature.high - feature.low)])
        back = unscale(feature, scale(feature, value))
        np.testing.assert_allclose(back, value, rtol=1e-6, atol=1e-6 * (feature.high - feature.low))

    @pytest.mark.parametrize("transform", ["none", "log1p", "sqrt"])
    def test_bounds_become_exact_ends(self, transform: str) -> None:
        """The public bounds become exactly -1 and 1."""
        feature = Feature(name="x", low=0.3, high=7.7, transform=transform)
        assert scale(feature, np.array([0.3, 7.7])).tolist() == [-1.0, 1.0]

    def test_log1p_formula(self) -> None:
        """log1p is taken before scaling, between the transformed bounds."""
        feature = Feature(name="x", low=1.0, high=7.0, transform="log1p")
        expected = 2 * (np.log(4) - np.log(2)) / (np.log(8) - np.log(2)) - 1
        assert scale(feature, np.array([3.0]))[0] == pytest.approx(expected, abs=1e-12)

    def test_keeps_nan(self) -> None:
        """A missing number stays missing in both directions."""
        feature = Feature(name="x")
        assert np.isnan(scale(feature, np.array([np.nan]))).all()
        assert np.isnan(unscale(feature, np.array([np.nan]))).all()

    @pytest.mark.parametrize(
        ("low", "high", "transform"),
        [(1e17, 1.00000000000000016e17, "log1p"), (-1.7e308, 1.7e308, "none")],
    )
    def test_refuses_bounds_it_cannot_scale(self, low: float, high: float, transform: str) -> None:
        """Bounds that coincide after the transform, or overflow, are refused by name."""
        feature = Feature(name="x", low=low, high=high, transform=transform)
        with pytest.raises(ContractError) as caught:
            scale(feature, np.array([low]))
        assert str(caught.value) == (
            "feature 'x': expected bounds that 64-bit numbers can tell apart, "
            f"got low={low} and high={high}"
        )


class TestInputs:
    """inputs."""

    def test_lists_every_input_in_order(self) -> None:
        """Each kind of feature becomes its inputs, an indicator last."""
        share = "share of customers"
        assert inputs(EVERY_KIND) == (
            Input("age", "age", "years", "number"),
            Input("age", "age (missing)", share, "missing"),
            Input("member", "member", share, "flag"),
            Input("plan", "plan = s", share, "category"),
            Input("plan", "plan = m", share, "category"),
            Input("plan", "plan (missing)", share, "missing"),
        )

    def test_counts_as_the_contract_does(self) -> None:
        """There are as many inputs as the contract says."""
        assert len(inputs(EVERY_KIND)) == EVERY_KIND.inputs


class TestNatural:
    """natural."""

    def test_gives_units_and_shares(self) -> None:
        """Numbers come back in their unit, everything else as a share."""
        mean = np.array([0.0, -1.0, 0.5, -1.0, 1.0, -1.0])
        values = [quantity.value for quantity in natural(EVERY_KIND, mean)]
        assert values == [50.0, 0.0, 0.75, 0.0, 1.0, 0.0]

    def test_undoes_zeros_of_the_missing(self) -> None:
        """With an indicator, the number is that of the customers who have one."""
        three_known_at_65, one_missing = 0.75 * 0.5, 0.25 * 2 - 1
        mean = np.array([three_known_at_65, one_missing, 0.0, 0.0, 0.0, 0.0])
        age, missing = natural(EVERY_KIND, mean)[:2]
        assert age.value == pytest.approx(65.0)
        assert missing.value == pytest.approx(0.25)

    def test_says_none_where_nobody_has_a_value(self) -> None:
        """A number that all customers lack has no mean."""
        assert natural(EVERY_KIND, np.array([0.1, 1.0, 0.0, 0.0, 0.0, 0.0]))[0].value is None

    def test_says_none_for_suppressed_cells(self) -> None:
        """A suppressed cell (NaN) has no value."""
        assert {q.value for q in natural(EVERY_KIND, np.full(6, np.nan))} == {None}

    @given(st.lists(st.floats(-50, 50), min_size=6, max_size=6))
    def test_noise_never_leaves_the_bounds(self, mean: list[float]) -> None:
        """However large the noise, published values stay within the public bounds."""
        for quantity in natural(EVERY_KIND, np.array(mean)):
            low, high = (20.0, 80.0) if quantity.input.kind == "number" else (0.0, 1.0)
            assert quantity.value is None or low <= quantity.value <= high


def test_docstring_examples() -> None:
    """The examples in the docstrings are true."""
    assert doctest.testmod(common.scaling).failed == 0
