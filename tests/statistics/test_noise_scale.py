"""Statistical tests of the noise: the right distribution passes, two thirds and 3/2 fail.

Streams are seeded, so every run gives the same answer; the stated false-alarm rates are those
of the tests before the seed was fixed.
"""

import numpy as np
import pytest
from scipy import stats

from clients.release import noisy_sum
from common.fixed_point import STEPS_PER_UNIT, from_lattice, lattice_sensitivity, lattice_step
from common.noise import NoiseSource

ALARM = 1e-4
COARSE = 2**11  # steps that a ring of 32 bits leaves for a million customers
COUNT = 20_000


def fits(numbers: np.ndarray, scale: float) -> bool:
    """Say whether Kolmogorov and Smirnov take the numbers for normal with this scale."""
    return bool(stats.kstest(numbers / scale, "norm").pvalue > ALARM)


def standard(count: int, *labels: str | int) -> np.ndarray:
    """Return integers of a stream, in standard deviations so fine that they are continuous."""
    return NoiseSource.seeded(1, *labels).discrete_gaussian(count, 1e9) / 1e9


def achieved(
    merchants: int, contributors: int, seed: int = 0, steps: int = STEPS_PER_UNIT
) -> np.ndarray:
    """Return the noise, in sensitivities, of a sum of merchants' parts over empty tables."""
    total = np.zeros(COUNT, dtype=np.int64)
    for number in range(merchants):
        total += noisy_sum(
            np.zeros(COUNT),
            sensitivity=2.5,
            noise_multiplier=4.0,
            contributors=contributors,
            noise=NoiseSource.seeded(seed, "m", number),
            steps=steps,
        )
    return from_lattice(total, lattice_step(2.5, steps)) / 2.5


class TestStream:
    """NoiseSource.discrete_gaussian and .chosen."""

    def test_standard_normal(self) -> None:
        """The scale is one; false-alarm rate 1e-4."""
        assert fits(standard(COUNT, "scale"), 1.0)

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_wrong_scale_is_seen(self, wrong: float) -> None:
        """The same test refuses two thirds and one and a half; chance to miss below 1e-9."""
        assert not fits(standard(COUNT, "scale"), wrong)

    def test_mean(self) -> None:
        """The mean is zero; false-alarm rate 6e-5 (four standard errors)."""
        assert abs(standard(COUNT, "mean").mean()) < 4 / COUNT**0.5

    def test_tails(self) -> None:
        """Beyond three deviations lie 0.27 % of a million; false-alarm rate 6e-5."""
        count = int((np.abs(standard(10**6, "tails")) > 3).sum())
        assert abs(count - 2699.8) < 4 * 2699.8**0.5

    @pytest.mark.parametrize("other", [("m", 2, 0), ("n", 1, 0), ("m", 1, 1)])
    def test_streams_are_independent(self, other: tuple[str | int, ...]) -> None:
        """Rounds, merchants and attempts are uncorrelated; false-alarm rate 6e-5 each."""
        one, two = standard(COUNT, "m", 1, 0), standard(COUNT, *other)
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / COUNT**0.5

    def test_halves_are_independent(self) -> None:
        """Halves of a draw are uncorrelated, squares too; false-alarm rate 1.2e-4."""
        numbers = standard(COUNT, "pairs")
        one, two = numbers[: COUNT // 2], numbers[COUNT // 2 :]
        limit = 4 / (COUNT // 2) ** 0.5
        assert abs(np.corrcoef(one, two)[0, 1]) < limit
        assert abs(np.corrcoef(one**2, two**2)[0, 1]) < limit

    def test_chosen_rate(self) -> None:
        """Customers are chosen at the rate; false-alarm rate 6e-5."""
        share = NoiseSource.seeded(1, "rate").sampled(COUNT, 0.3).size / COUNT
        assert abs(share - 0.3) < 4 * (0.21 / COUNT) ** 0.5

    @pytest.mark.parametrize("wrong", [0.2, 0.45])
    def test_wrong_rate_is_seen(self, wrong: float) -> None:
        """The same test refuses two thirds and one and a half of the rate."""
        share = NoiseSource.seeded(1, "rate").sampled(COUNT, 0.3).size / COUNT
        assert abs(share - wrong) > 4 * (wrong * (1 - wrong) / COUNT) ** 0.5

    def test_choices_are_independent(self) -> None:
        """Being chosen in one step says nothing about the next; false-alarm rate 6e-5."""
        source = NoiseSource.seeded(1, "steps")
        one, two = np.zeros((2, COUNT))
        one[source.sampled(COUNT, 0.3)] = two[source.sampled(COUNT, 0.3)] = 1.0
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / COUNT**0.5


class TestAchieved:
    """noisy_sum: what a sum over merchants really holds."""

    SCALE = 4.0 * lattice_sensitivity(1.0, COUNT)

    @pytest.mark.parametrize("merchants", [1, 3, 10])
    def test_shares_add_up(self, merchants: int) -> None:
        """M shares make the whole noise, sensitivity included; false-alarm rate 1e-4 each."""
        assert fits(achieved(merchants, merchants), self.SCALE)

    @pytest.mark.parametrize("merchants", [1, 3, 10])
    def test_shares_add_up_on_a_coarse_lattice(self, merchants: int) -> None:
        """So do those of a ring of 32 bits; false-alarm rate 1e-4 each."""
        scale = 4.0 * lattice_sensitivity(1.0, COUNT, COARSE)
        noise = achieved(merchants, merchants, steps=COARSE)
        assert fits(noise, scale)
        for wrong in (2 / 3, 3 / 2):
            assert not fits(noise, scale * wrong)

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_wrong_scale_is_seen(self, wrong: float) -> None:
        """The same test refuses two thirds and one and a half; chance to miss below 1e-9."""
        assert not fits(achieved(3, 3), self.SCALE * wrong)

    def test_too_few_merchants_are_seen(self) -> None:
        """Four of nine shares are two thirds of the noise: the test refuses them."""
        assert not fits(achieved(4, 9), self.SCALE)

    def test_further_merchants_only_add(self) -> None:
        """Twelve merchants where nine are counted on: the noise is sqrt(12 / 9) times as large."""
        assert fits(achieved(12, 9), self.SCALE * (12 / 9) ** 0.5)

    def test_never_below_what_the_event_says(self) -> None:
        """The spread is not below noise_multiplier * sensitivity; false-alarm rate 3e-5."""
        spread = achieved(3, 3).std()
        assert spread > 4.0 * (1 - 4 / (2 * COUNT) ** 0.5)
