"""Tests of the place where noise is added."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.release import noisy_sum
from common.errors import AccountingError
from common.fixed_point import (
    SMOOTHING_STEPS,
    from_lattice,
    lattice_sensitivity,
    lattice_step,
    to_lattice,
)
from common.noise import NoiseSource


def part(exact: np.ndarray, seed: int = 0, **changes: float) -> np.ndarray:
    """Return a noisy part with seeded noise."""
    settings = {"sensitivity": 1.0, "noise_multiplier": 4.0, "contributors": 4, **changes}
    return noisy_sum(exact, noise=NoiseSource.seeded(seed), **settings)  # type: ignore[arg-type]


class TestNoisySum:
    """noisy_sum."""

    @given(st.floats(-1e5, 1e5), st.floats(1e-3, 1e3))
    def test_noise_does_not_depend_on_the_sum(self, value: float, sensitivity: float) -> None:
        """With the same stream the same integers are added to any sum."""
        exact = np.full(5, value)
        noise = part(exact, sensitivity=sensitivity) - part(np.zeros(5), sensitivity=sensitivity)
        assert np.array_equal(noise, to_lattice(exact, lattice_step(sensitivity)))

    def test_noise_covers_the_rounding(self) -> None:
        """A share is sigma times the sensitivity of the rounded sum, over sqrt(m), in steps."""
        stddev = 4.0 * lattice_sensitivity(2.5, 400) / 2.0 / lattice_step(2.5)
        share = math.sqrt(stddev**2 + SMOOTHING_STEPS**2)
        expected = NoiseSource.seeded(0).discrete_gaussian(400, share)
        assert part(np.zeros(400), sensitivity=2.5).tolist() == expected.tolist()

    def test_coarse_lattice(self) -> None:
        """With few steps a sensitivity the noise is as many sensitivities, in those steps."""
        steps = 2**8
        stddev = 4.0 * lattice_sensitivity(2.5, 400, steps) / 2.0 / lattice_step(2.5, steps)
        share = math.sqrt(stddev**2 + SMOOTHING_STEPS**2)
        expected = NoiseSource.seeded(0).discrete_gaussian(400, share)
        assert part(np.zeros(400), sensitivity=2.5, steps=steps).tolist() == expected.tolist()
        exact = np.array([3.0, -2.0])
        shift = part(exact, steps=steps) - part(np.zeros(2), steps=steps)
        assert shift.tolist() == [3 * steps, -2 * steps]

    def test_integers(self) -> None:
        """What leaves is a vector of 64-bit integers, as long as the sum."""
        answer = part(np.zeros(7))
        assert answer.dtype == np.int64
        assert answer.shape == (7,)

    def test_every_number_has_noise_of_its_own(self) -> None:
        """No two numbers of a vector share their noise."""
        assert len(np.unique(part(np.zeros(1000)))) == 1000

    def test_sums_are_order_independent(self) -> None:
        """Merchants' parts add up to one integer vector in any order."""
        parts = [part(np.full(3, 0.1 * k), seed=k) for k in range(4)]
        sums = {tuple(sum(order).tolist()) for order in itertools.permutations(parts)}
        assert len(sums) == 1

    def test_unit(self) -> None:
        """Without counting noise the sum comes back in its own unit."""
        exact = np.array([3.0, -2.0])
        shift = part(exact, sensitivity=2.5) - part(np.zeros(2), sensitivity=2.5)
        np.testing.assert_allclose(from_lattice(shift, lattice_step(2.5)), exact, atol=2.5 / 2**20)

    @pytest.mark.parametrize("value", [1e-5, 0.0, -1.0, np.nan])
    def test_too_fine(self, value: float) -> None:
        """Noise too fine for the lattice argument is refused."""
        with pytest.raises(AccountingError, match="too fine"):
            part(np.zeros(3), noise_multiplier=value)

    def test_too_many_shares(self) -> None:
        """A share of a fine noise is finer still."""
        part(np.zeros(3), noise_multiplier=0.01, contributors=1)
        with pytest.raises(AccountingError, match="too fine"):
            part(np.zeros(3), noise_multiplier=0.01, contributors=1_000_000)

    @pytest.mark.parametrize("value", [1e10, 1e300, np.inf])
    def test_too_coarse(self, value: float) -> None:
        """Noise that would overflow the integers is refused, not wrapped around."""
        with pytest.raises(AccountingError, match="too coarse"):
            part(np.zeros(3), noise_multiplier=value)
