"""Secret sharing: enough shares restore a secret, fewer fit every secret, sums are exact."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import SecureSumError
from common.shares import (
    ELEMENTS,
    MAX_HOLDERS,
    PRIME,
    SECRET_BYTES,
    combine,
    random_elements,
    split,
    weights,
)

elements = st.lists(
    st.one_of(st.sampled_from([0, 1, PRIME - 1]), st.integers(0, PRIME - 1)),
    min_size=1,
    max_size=8,
)


def evaluated(coefficients: list[int], point: int) -> int:
    """Return a polynomial's value in the field, in Python's integers."""
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def interpolated(points: list[tuple[int, int]], at: int) -> int:
    """Return the value of the polynomial through some points, in Python's integers."""
    total = 0
    for x, y in points:
        term = y
        for other, _ in points:
            if other != x:
                term = term * (at - other) * pow(x - other, -1, PRIME) % PRIME
        total += term
    return total % PRIME


def row(values: list[int]) -> np.ndarray:
    """Return field elements as the module takes them."""
    return np.array(values, dtype=np.uint16)


class TestRestoring:
    """`combine` undoes `split`."""

    @settings(max_examples=100, deadline=None)
    @given(secret=elements, sizes=st.tuples(st.integers(1, 30), st.integers(0, 20)), data=st.data())
    def test_any_threshold_of_holders_restores_the_secret(
        self, secret: list[int], sizes: tuple[int, int], data: st.DataObject
    ) -> None:
        """Whoever they are, in whatever order."""
        threshold, more = sizes
        shares = split(row(secret), threshold, threshold + more)
        order = data.draw(st.permutations(range(threshold + more)))[:threshold]
        restored = combine(tuple(holder + 1 for holder in order), shares[list(order)])
        assert restored.tolist() == secret

    @pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (1, 3), (2, 2), (3, 5), (4, 6)])
    def test_every_subset_of_a_small_group_restores(self, threshold: int, holders: int) -> None:
        """Exhaustively."""
        secret = random_elements(ELEMENTS)
        shares = split(secret, threshold, holders)
        for chosen in combinations(range(holders), threshold):
            found = combine(tuple(holder + 1 for holder in chosen), shares[list(chosen)])
            np.testing.assert_array_equal(found, secret)

    def test_more_than_the_threshold_restore_too(self) -> None:
        """A polynomial of low degree goes through all its points."""
        secret = random_elements(5)
        shares = split(secret, 3, 9)
        np.testing.assert_array_equal(combine(tuple(range(1, 10)), shares), secret)

    def test_a_wrong_share_restores_another_secret(self) -> None:
        """Nothing corrects errors here; commitments find them."""
        shares = split(row([7]), 3, 3)
        shares[1, 0] ^= 1
        assert combine((1, 2, 3), shares).tolist() != [7]


class TestSecrecy:
    """Fewer than `threshold` shares fit every secret."""

    @pytest.mark.parametrize(("threshold", "holders"), [(2, 3), (3, 4), (5, 7)])
    def test_too_few_shares_fit_every_candidate(self, threshold: int, holders: int) -> None:
        """For each set of t - 1 shares, each secret has one polynomial through them."""
        shares = split(row([1234]), threshold, holders)
        candidates = [0, 1, 1234, 40_000, PRIME - 1]
        for chosen in combinations(range(holders), threshold - 1):
            known = [(holder + 1, int(shares[holder, 0])) for holder in chosen]
            missing = next(h for h in range(holders) if h not in chosen)
            rest = {interpolated([(0, secret), *known], at=missing + 1) for secret in candidates}
            assert len(rest) == len(candidates)  # another share of its own for each candidate
            for secret in candidates:
                share = interpolated([(0, secret), *known], at=missing + 1)
                points = (*(x for x, _ in known), missing + 1)
                values = [*(y for _, y in known), share]
                assert combine(points, row(values)[:, None]).tolist() == [secret]

    def test_coefficients_are_fresh_for_every_element_and_every_call(self) -> None:
        """Equal secrets have different shares."""
        shares = split(row([5] * 200), 2, 2)
        assert len(set(shares[0].tolist())) > 150
        assert (split(row([5] * 200), 2, 2) != shares).any()

    def test_a_single_share_is_uniform(self) -> None:
        """The first holder's shares of one secret spread over the whole field (chi-square)."""
        shares = split(row([PRIME - 1] * 65_536), 3, 3)[0].astype(np.int64)
        observed = np.bincount(shares * 64 // PRIME, minlength=64)
        assert float(((observed - 1024.0) ** 2 / 1024.0).sum()) < 133.0  # 63 degrees, 1e-6: 132.2


class TestExactness:
    """The field arithmetic is exact."""

    def test_the_largest_group_agrees_with_pythons_integers(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """200 holders, 134 of them enough; coefficients near the modulus included."""
        generator = np.random.default_rng(1)
        drawn = generator.integers(0, PRIME, 133 * 4, dtype=np.int64)
        drawn[::4] = PRIME - 1  # one whole polynomial of the largest coefficients
        monkeypatch.setattr("common.shares.random_elements", lambda _n: drawn.astype(np.uint16))
        secret = [PRIME - 1, 0, 1, 31_337]
        shares = split(row(secret), 134, 200)
        for element in range(4):
            coefficients = [secret[element], *(int(c) for c in drawn[element::4])]
            expected = [evaluated(coefficients, holder + 1) for holder in range(200)]
            assert shares[:, element].tolist() == expected
        last = tuple(range(67, 201))
        assert combine(last, shares[66:]).tolist() == secret

    @pytest.mark.slow
    def test_weights_agree_with_pythons_integers(self) -> None:
        """Lagrange's weights at zero, for the two ends of the largest group."""
        for points in ((1, 200), tuple(range(67, 201)), tuple(range(200, 0, -1)), (7,)):
            expected = [interpolated([(x, int(x == one)) for x in points], at=0) for one in points]
            assert weights(points).tolist() == expected

    def test_the_largest_sum_fits_into_a_float(self) -> None:
        """What the module's docstring says."""
        assert MAX_HOLDERS * 65_535 * (PRIME - 1) < 2**53
        assert SECRET_BYTES == 2 * ELEMENTS

    def test_the_modulus_is_the_largest_prime_of_16_bits(self) -> None:
        """By trial division."""
        primes = [n for n in range(65_500, 65_536) if all(n % d for d in range(2, 257))]
        assert primes[-1] == PRIME

    @pytest.mark.parametrize("secrets", [1, 17, 2000])
    def test_many_secrets_at_once_are_as_good_as_one_by_one(self, secrets: int) -> None:
        """Products are made in pieces; the pieces fit together."""
        secret = random_elements(secrets)
        shares = split(secret, 134, 200)
        found = combine(tuple(range(1, 135)), shares[:134])
        np.testing.assert_array_equal(found, secret)


class TestRefusals:
    """What cannot be shared or restored."""

    @pytest.mark.parametrize(
        ("threshold", "holders"), [(0, 3), (-1, 3), (4, 3), (1, 0), (2, 201), (201, 201)]
    )
    def test_impossible_thresholds(self, threshold: int, holders: int) -> None:
        """The message says what was expected and what came."""
        with pytest.raises(SecureSumError, match=rf"got {threshold} of {holders}"):
            split(row([1]), threshold, holders)

    @pytest.mark.parametrize("points", [(0, 1), (1, 1), (201, 1), (-1, 2), (PRIME + 1, 2)])
    def test_wrong_points(self, points: tuple[int, ...]) -> None:
        """A point out of range or given twice is refused, never divided by."""
        with pytest.raises(SecureSumError, match="points must differ and lie between 1 and 200"):
            combine(points, np.zeros((2, 3), dtype=np.uint16))


class TestRandomElements:
    """`random_elements` is uniform over the field."""

    @pytest.mark.parametrize("count", [0, 1, 31, 5000])
    def test_as_many_as_asked_for(self, count: int) -> None:
        """No fewer where draws beyond the modulus are thrown away."""
        drawn = random_elements(count)
        assert drawn.shape == (count,)
        assert drawn.dtype == np.uint16

    def test_draws_beyond_the_modulus_are_thrown_away(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And drawn again, not reduced: the smallest elements are no more frequent."""
        given_out = []

        def urandom(count: int) -> bytes:
            given_out.append(count)
            word = b"\xff\xff" if len(given_out) == 1 else b"\xf0\xff"  # 65535, then 65520
            return word * (count // 2)

        monkeypatch.setattr("os.urandom", urandom)
        assert random_elements(3).tolist() == [PRIME - 1] * 3
        assert len(given_out) == 2
