"""Tests of the streams: known answers, seeds, freshness."""

import doctest
import math
from bisect import bisect_right

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

import common.noise
from common.discrete_gaussian import base_table, choose_plan
from common.errors import AccountingError
from common.noise import NoiseSource


def keystream(key: bytes, count: int) -> bytes:
    """Return AES-256-CTR keystream, straight from `cryptography`."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(count))


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.noise).failed == 0


class TestKnownAnswers:
    """The stream is AES-256-CTR, and the transformations are the stated ones."""

    def test_nist_vector(self) -> None:
        """With the all-zero key the first block is the one NIST publishes for AES-256."""
        assert keystream(bytes(32), 16).hex() == "dc95c078a2408989ad48a21492842087"

    @pytest.mark.parametrize(
        ("stddev", "expected"),
        [
            (20.0, [18, 25, 13, -18, -39, 7, 24, -13]),
            (1000.5, [1484, -648, -259, -246, 398, 1202, 976, 650]),
            (1e6, [-793145, -483837, 1269630, 830815, 291673, 1134378, 542484, 226142]),
            (
                2.0**48,
                [
                    -178330162653205,
                    263970102659470,
                    362190937456608,
                    134702473096257,
                    -27527690971547,
                    -622352133156857,
                    -420426591669966,
                    471230206996966,
                ],
            ),
        ],
    )
    def test_discrete_gaussian(self, stddev: float, expected: list[int]) -> None:
        """The integers of one key are these, for any implementation."""
        numbers = NoiseSource(bytes(range(32))).discrete_gaussian(8, stddev)
        assert numbers.dtype == np.int64
        assert numbers.tolist() == expected

    def test_discrete_gaussian_by_hand(self) -> None:
        """A block is a uniform of 128 bits; two make a number with one multiplier."""
        key = bytes(range(32))
        words = np.frombuffer(keystream(key, 8 * 2 * 16), dtype="<u8").tolist()
        plan = choose_plan(1000.5)
        table = base_table(plan.base_stddev)
        ends = [int(high) * 2**64 + int(low) for high, low in np.stack([table.high, table.low]).T]
        z = [
            bisect_right(ends, high * 2**64 + low) - table.reach
            for high, low in zip(words[::2], words[1::2], strict=True)
        ]
        expected = [one + 3 * other for one, other in zip(z[::2], z[1::2], strict=True)]
        assert NoiseSource(key).discrete_gaussian(8, 1000.5).tolist() == expected

    @pytest.mark.parametrize("stddev", [20.0, 1000.5, 1e6])
    def test_draws_add_up(self, stddev: float) -> None:
        """Three integers and five more are the eight of one draw."""
        source = NoiseSource(bytes(32))
        parts = [*source.discrete_gaussian(3, stddev), *source.discrete_gaussian(5, stddev)]
        assert parts == NoiseSource(bytes(32)).discrete_gaussian(8, stddev).tolist()

    def test_chosen(self) -> None:
        """A customer is chosen when the top 53 bits of its word lie below the rate."""
        key = bytes(range(32))
        words = np.frombuffer(keystream(key, 160), dtype="<u8").tolist()
        expected = [(word >> 11) / 2**53 < 0.3 for word in words]
        assert NoiseSource(key).chosen(20, 0.3).tolist() == expected

    def test_stream_goes_on(self) -> None:
        """A second draw continues the stream; nothing is drawn twice."""
        source = NoiseSource(bytes(32))
        first, second = (source.discrete_gaussian(4, 1e12).tolist() for _ in range(2))
        assert not set(first) & set(second)


class TestSeeded:
    """Repeatable streams."""

    def test_same_labels_same_stream(self) -> None:
        """Equal seeds and labels give equal numbers."""
        one, other = (NoiseSource.seeded(1, "shop", "update", 3, 0) for _ in range(2))
        assert one.discrete_gaussian(9, 1e12).tolist() == other.discrete_gaussian(9, 1e12).tolist()

    @pytest.mark.parametrize(
        "labels",
        [("shop", "update", 3, 1), ("shop", "update", 4, 0), ("shopu", "pdate", 3, 0), ("shop",)],
    )
    def test_other_labels_other_stream(self, labels: tuple[str | int, ...]) -> None:
        """Any other label gives other numbers."""
        one = NoiseSource.seeded(1, "shop", "update", 3, 0).discrete_gaussian(9, 1e12)
        other = NoiseSource.seeded(1, *labels).discrete_gaussian(9, 1e12)
        assert not set(one.tolist()) & set(other.tolist())

    def test_other_seed_other_stream(self) -> None:
        """Another seed gives other numbers."""
        one, other = (NoiseSource.seeded(k, "a").discrete_gaussian(9, 1e12) for k in (1, 2))
        assert not set(one.tolist()) & set(other.tolist())


class TestFresh:
    """Streams keyed by the operating system."""

    def test_integers_differ(self) -> None:
        """No two fresh streams share an integer."""
        one, other = (NoiseSource.fresh().discrete_gaussian(9, 1e12) for _ in range(2))
        assert not set(one.tolist()) & set(other.tolist())

    def test_other_generators_have_no_part(self) -> None:
        """Seeding numpy and torch changes nothing."""
        import torch

        draws = []
        for _ in range(2):
            np.random.seed(0)
            torch.manual_seed(0)
            draws.append(NoiseSource.fresh().discrete_gaussian(4, 1e12).tolist())
        assert not set(draws[0]) & set(draws[1])


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_counts(count: int) -> None:
    """As many numbers as asked for, odd or none."""
    source = NoiseSource.fresh()
    assert source.chosen(count, 0.5).shape == (count,)
    for stddev in (20.0, 1000.5, 1e6):
        assert source.discrete_gaussian(count, stddev).shape == (count,)


@pytest.mark.parametrize("stddev", [math.nan, math.inf, 0.0, -20.0, 19.9, 2.0**49])
def test_impossible_stddev(stddev: float) -> None:
    """Integers too fine or too coarse are refused."""
    with pytest.raises(AccountingError, match="expected a noise stddev"):
        NoiseSource.fresh().discrete_gaussian(1, stddev)


@pytest.mark.parametrize(("rate", "all_or_none"), [(1.0, True), (0.0, False)])
def test_certain_choice(rate: float, all_or_none: bool) -> None:
    """Rate 1 takes everybody and rate 0 nobody."""
    assert set(NoiseSource.fresh().chosen(1000, rate).tolist()) == {all_or_none}
