"""Tests of the lattice that sums travel on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import WireError
from common.fixed_point import (
    STEPS_PER_UNIT,
    from_lattice,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)

vectors = arrays.arrays(np.float64, 7, elements=st.floats(-1e6, 1e6))


class TestLattice:
    """to_lattice and from_lattice."""

    @given(vectors, st.floats(1e-3, 1e3))
    def test_error_is_half_a_step(self, values: np.ndarray, sensitivity: float) -> None:
        """Rounding moves a number by at most half a step (and float64's own error)."""
        step = lattice_step(sensitivity)
        moved = np.abs(from_lattice(to_lattice(values, step), step) - values)
        assert np.all(moved <= step * 0.5 * (1 + 1e-6) + 1e-15 * np.abs(values))

    @given(st.lists(vectors, min_size=3, max_size=3))
    def test_sums_are_exact_in_any_order(self, parts: list[np.ndarray]) -> None:
        """Integers give one sum, whoever is added first."""
        rounded = [to_lattice(part, lattice_step(1.0)) for part in parts]
        sums = {tuple(sum(order).tolist()) for order in itertools.permutations(rounded)}
        assert len(sums) == 1

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**33])
    def test_refuses(self, value: float) -> None:
        """What has no exact integer is refused, and the message holds no number."""
        with pytest.raises(WireError, match="not finite or too large") as caught:
            to_lattice(np.array([0.0, value]), lattice_step(1.0))
        assert not any(letter.isdigit() for letter in str(caught.value))

    def test_largest(self) -> None:
        """The largest admitted number is exact."""
        largest = np.array([2.0**52 - 1])
        assert from_lattice(to_lattice(largest, 1.0), 1.0) == largest


class TestSensitivity:
    """lattice_sensitivity."""

    @given(
        arrays.arrays(np.float64, 16, elements=st.floats(-1e3, 1e3)),
        arrays.arrays(np.float64, 16, elements=st.floats(-1, 1)),
        st.floats(1e-3, 1e3),
    )
    def test_bounds_rounded_sums(
        self, others: np.ndarray, customer: np.ndarray, sensitivity: float
    ) -> None:
        """A customer within the sensitivity moves the rounded sum within the lattice's."""
        customer = customer / max(np.linalg.norm(customer), 1.0) * sensitivity
        step = lattice_step(sensitivity)
        with_, without = to_lattice(others + customer, step), to_lattice(others, step)
        moved = np.linalg.norm(from_lattice(with_ - without, step))
        assert moved <= lattice_sensitivity(sensitivity, 16)

    def test_worst_case_needs_the_slack(self) -> None:
        """Rounding alone can pass the unrounded sensitivity: the slack is no luxury."""
        step = lattice_step(1.0)
        customer = np.full(16, 0.25) / 1.0
        others = np.full(16, 0.49999 * step)
        offset = np.full(16, 0.00002 * step)
        moved = to_lattice(others + customer + offset, step) - to_lattice(others, step)
        assert 1.0 < np.linalg.norm(from_lattice(moved, step)) <= lattice_sensitivity(1.0, 16)

    def test_costs_little(self) -> None:
        """For ten thousand parameters the lattice costs a sixth of a percent of noise."""
        assert lattice_sensitivity(1.0, 10_000) == 1 + 1600 / STEPS_PER_UNIT
