"""Tests of the lattice that sums travel on."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from common.errors import AccountingError, WireError
from common.fixed_point import (
    MIN_NOISE_STEPS,
    STEPS_PER_UNIT,
    SUMMATION_ERROR,
    Lattice,
    from_lattice,
    lattice_sensitivity,
    lattice_step,
    local_lattice,
    ring_steps,
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
        st.sampled_from([1, 2**6, 2**11, STEPS_PER_UNIT]),
    )
    def test_bounds_rounded_sums(
        self, others: np.ndarray, customer: np.ndarray, sensitivity: float, steps: int
    ) -> None:
        """A customer within the sensitivity moves the rounded sum within the lattice's."""
        customer = customer / max(np.linalg.norm(customer), 1.0) * sensitivity
        step = lattice_step(sensitivity, steps)
        with_, without = to_lattice(others + customer, step), to_lattice(others, step)
        moved = np.linalg.norm(from_lattice(with_ - without, step))
        assert moved <= lattice_sensitivity(sensitivity, 16, steps)

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

    @given(st.integers(1, 10**6), st.sampled_from([1, 2**6, 2**11, STEPS_PER_UNIT]))
    def test_rounding_and_summation_are_both_in_it(self, length: int, steps: int) -> None:
        """One step and the error of float64 sums a number, in L2."""
        expected = 1 + length**0.5 * (1 / steps + SUMMATION_ERROR)
        assert lattice_sensitivity(2.5, length, steps) == pytest.approx(2.5 * expected)


class TestRing:
    """Lattice.to_ring and from_ring."""

    @pytest.mark.parametrize("bits", [32, 64])
    @given(st.data())
    def test_sums_come_back(self, bits: int, data: st.DataObject) -> None:
        """However far single numbers wrap around, a sum that fits comes out right."""
        lattice = Lattice(1.0, bits)
        reach = 2 ** min(bits - 1, 61) - 1
        wide = st.integers(-(2**62), 2**62)
        parts = data.draw(st.lists(wide, min_size=0, max_size=5))
        total = data.draw(st.integers(-reach, reach))
        last = total - sum(parts)
        parts = [*parts, *([2**62 if last > 0 else -(2**62)] * (abs(last) // 2**62))]
        parts.append(total - sum(parts))
        ring = [lattice.to_ring(np.array([part], dtype=np.int64)) for part in parts]
        found = np.sum(ring, axis=0, dtype=lattice.dtype)
        assert found.dtype == lattice.dtype
        assert lattice.from_ring(found).tolist() == [total]

    @pytest.mark.parametrize(("bits", "dtype"), [(32, np.uint32), (64, np.uint64)])
    def test_ends(self, bits: int, dtype: type) -> None:
        """The ring's half belongs to the negative numbers."""
        lattice = Lattice(1.0, bits)
        top = 2 ** (bits - 1)
        ring = np.array([0, 1, top - 1, top, 2 * top - 1], dtype=dtype)
        assert lattice.from_ring(ring).tolist() == [0, 1, top - 1, -top, -1]
        assert lattice.to_ring(lattice.from_ring(ring)).tolist() == ring.tolist()


class TestRingSteps:
    """ring_steps."""

    @given(
        st.sampled_from([32, 64]),
        st.integers(1, 10**12),
        st.floats(0.01, 1e6),
        st.floats(1.0, 100.0),
    )
    def test_sums_fit_tightly(self, bits: int, customers: int, sigma: float, spread: float) -> None:
        """The exact sum and twenty deviations fit, and would not with twice the steps."""
        reach = customers + 20 * sigma * spread
        try:
            steps = ring_steps(bits, customers, sigma, spread)
        except AccountingError as error:
            assert "does not fit" in str(error)  # noqa: PT017
            assert reach > 2 ** (bits - 1)
            return
        assert reach * steps <= 2 ** (bits - 1)
        assert steps == STEPS_PER_UNIT or reach * 2 * steps > 2 ** (bits - 1)
        assert steps.bit_count() == 1

    def test_default_leaves_noise_enough(self) -> None:
        """A million customers at a noise of one leave 2048 steps, far above the least."""
        steps = ring_steps(32, 10**6, 1.0, 1.0)
        assert steps == 2048 > 40 * MIN_NOISE_STEPS


class TestLocalLattice:
    """local_lattice."""

    @given(
        st.sampled_from([32, 64]), st.integers(1, 10**7) | st.integers(0, 23).map(lambda k: 2**k)
    )
    def test_sums_fit(self, bits: int, merchants: int) -> None:
        """As many clipped updates as there may be merchants do not overflow the ring."""
        lattice, bound = local_lattice(bits, merchants)
        assert merchants * bound / lattice.step < 2 ** (bits - 1)
        assert lattice.step >= 2.0**-30
        assert bound / lattice.step >= 1

    def test_too_many_merchants(self) -> None:
        """More merchants than the ring has room for are refused."""
        with pytest.raises(AccountingError, match="do not fit"):
            local_lattice(32, 2**26)
