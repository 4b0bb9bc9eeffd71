"""Statistical tests of the noise: the right distribution passes, two thirds and 3/2 fail.

Streams are seeded, so every run gives the same answer; the stated false-alarm rates are those
of the tests before the seed was fixed.
"""

import numpy as np
import pytest
from scipy import stats

from clients.release import noisy_sum
from common.fixed_point import from_lattice, lattice_sensitivity, lattice_step
from common.noise import NoiseSource

ALARM = 1e-4
COUNT = 20_000


def fits(numbers: np.ndarray, scale: float) -> bool:
    """Say whether Kolmogorov and Smirnov take the numbers for normal with this scale."""
    return bool(stats.kstest(numbers / scale, "norm").pvalue > ALARM)


def achieved(merchants: int, contributors: int, seed: int = 0) -> np.ndarray:
    """Return the noise, in sensitivities, of a sum of merchants' parts over empty tables."""
    total = np.zeros(COUNT, dtype=np.int64)
    for number in range(merchants):
        total += noisy_sum(
            np.zeros(COUNT),
            sensitivity=2.5,
            noise_multiplier=4.0,
            contributors=contributors,
            noise=NoiseSource.seeded(seed, "m", number),
        )
    return from_lattice(total, lattice_step(2.5)) / 2.5


class TestStream:
    """NoiseSource.normal and .chosen."""

    def test_standard_normal(self) -> None:
        """The scale is one; false-alarm rate 1e-4."""
        assert fits(NoiseSource.seeded(1, "scale").normal(COUNT), 1.0)

    @pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
    def test_wrong_scale_is_seen(self, wrong: float) -> None:
        """The same test refuses two thirds and one and a half; chance to miss below 1e-9."""
        assert not fits(NoiseSource.seeded(1, "scale").normal(COUNT), wrong)

    def test_mean(self) -> None:
        """The mean is zero; false-alarm rate 6e-5 (four standard errors)."""
        assert abs(NoiseSource.seeded(1, "mean").normal(COUNT).mean()) < 4 / COUNT**0.5

    def test_tails(self) -> None:
        """Beyond three deviations lie 0.27 % of a million; false-alarm rate 6e-5."""
        count = int((np.abs(NoiseSource.seeded(1, "tails").normal(10**6)) > 3).sum())
        assert abs(count - 2699.8) < 4 * 2699.8**0.5

    @pytest.mark.parametrize("other", [("m", 2, 0), ("n", 1, 0), ("m", 1, 1)])
    def test_streams_are_independent(self, other: tuple[str | int, ...]) -> None:
        """Rounds, merchants and attempts are uncorrelated; false-alarm rate 6e-5 each."""
        one = NoiseSource.seeded(1, "m", 1, 0).normal(COUNT)
        two = NoiseSource.seeded(1, *other).normal(COUNT)
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / COUNT**0.5

    def test_halves_are_independent(self) -> None:
        """Cosine and sine of a pair are uncorrelated, squares too; false-alarm rate 1.2e-4."""
        numbers = NoiseSource.seeded(1, "pairs").normal(COUNT)
        one, two = numbers[: COUNT // 2], numbers[COUNT // 2 :]
        limit = 4 / (COUNT // 2) ** 0.5
        assert abs(np.corrcoef(one, two)[0, 1]) < limit
        assert abs(np.corrcoef(one**2, two**2)[0, 1]) < limit

    def test_chosen_rate(self) -> None:
        """Customers are chosen at the rate; false-alarm rate 6e-5."""
        share = NoiseSource.seeded(1, "rate").chosen(COUNT, 0.3).mean()
        assert abs(share - 0.3) < 4 * (0.21 / COUNT) ** 0.5

    @pytest.mark.parametrize("wrong", [0.2, 0.45])
    def test_wrong_rate_is_seen(self, wrong: float) -> None:
        """The same test refuses two thirds and one and a half of the rate."""
        share = NoiseSource.seeded(1, "rate").chosen(COUNT, 0.3).mean()
        assert abs(share - wrong) > 4 * (wrong * (1 - wrong) / COUNT) ** 0.5

    def test_choices_are_independent(self) -> None:
        """Being chosen in one step says nothing about the next; false-alarm rate 6e-5."""
        source = NoiseSource.seeded(1, "steps")
        one, two = source.chosen(COUNT, 0.3), source.chosen(COUNT, 0.3)
        assert abs(np.corrcoef(one, two)[0, 1]) < 4 / COUNT**0.5


class TestAchieved:
    """noisy_sum: what a sum over merchants really holds."""

    SCALE = 4.0 * lattice_sensitivity(1.0, COUNT)

    @pytest.mark.parametrize("merchants", [1, 3, 10])
    def test_shares_add_up(self, merchants: int) -> None:
        """M shares make the whole noise, sensitivity included; false-alarm rate 1e-4 each."""
        assert fits(achieved(merchants, merchants), self.SCALE)

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
