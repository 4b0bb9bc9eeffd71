"""Tests of the streams: known answers, seeds, freshness."""

import doctest
import math
from bisect import bisect_right

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

import common.noise
from common.discrete_gaussian import base_table, choose_plan
from common.errors import AccountingError
from common.noise import NoiseSource


def keystream(key: bytes, count: int) -> bytes:
    """Return AES-256 in counter mode from block 2, by `cryptography`'s own counter mode."""
    first = (2).to_bytes(16, "big")
    return Cipher(algorithms.AES(key), modes.CTR(first)).encryptor().update(bytes(count))


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.noise).failed == 0


class TestKnownAnswers:
    """The stream is AES-256-CTR, and the transformations are the stated ones."""

    @pytest.mark.parametrize(
        ("stddev", "expected"),
        [
            (20.0, [13, 23, -19, 13, 8, -16, -19, 5]),
            (1000.5, [-399, -73, -284, -648, 415, -223, 2665, -319]),
            (1e6, [-1908745, 1353709, 87081, 94213, 656901, -781593, -182189, 1149933]),
            (
                2.0**48,
                [
                    177304243746788,
                    -68729919346063,
                    -10745054215372,
                    81297038168121,
                    -408140205199426,
                    556696003686898,
                    -308438075020288,
                    4470296176357,
                ],
            ),
        ],
    )
    def test_discrete_gaussian(self, stddev: float, expected: list[int]) -> None:
        """The integers of one key are these, for any implementation."""
        numbers = NoiseSource(bytes(range(32))).discrete_gaussian(8, stddev)
        assert numbers.dtype == np.int64
        assert numbers.tolist() == expected

    @pytest.mark.parametrize("stddev", [20.0, 1000.5, 1e6])
    def test_discrete_gaussian_by_hand(self, stddev: float) -> None:
        """Uniforms of 128 bits, of which no more is read than a look-up needs."""
        key, count = bytes(range(32)), 3000
        plan = choose_plan(stddev)
        table = base_table(plan.base_stddev)
        ends = [int(high) * 2**64 + int(low) for high, low in np.stack([table.high, table.low]).T]
        stream = Cipher(algorithms.AES(key), modes.CTR((2).to_bytes(16, "big"))).encryptor()
        prefixes = np.frombuffer(stream.update(bytes(2 * plan.draws * count)), dtype="<u2")
        z = []
        for prefix in prefixes.tolist():
            least = bisect_right(ends, prefix << 112)
            if bisect_right(ends, (prefix << 112) + 2**112 - 1) > least:
                word = int.from_bytes(stream.update(bytes(8)), "little") >> 16
                upper = ((prefix << 48) + word) << 64
                least = bisect_right(ends, upper)
                assert bisect_right(ends, upper + 2**64 - 1) == least  # no tie under this key
            z.append(least - table.reach)
        rows = np.array(z).reshape(plan.draws, count)
        for multiplier in plan.multipliers:
            rows = np.stack([rows[k] + multiplier * rows[k + 1] for k in range(0, len(rows), 2)])
        assert NoiseSource(key).discrete_gaussian(count, stddev).tolist() == rows[0].tolist()

    def test_blocks(self) -> None:
        """What does not fit into a block is drawn in equal ones, from the same stream."""
        whole_blocks = 2 * 2**17 // 4
        count = whole_blocks + 7
        source = NoiseSource(bytes(32))
        sizes = [-(-count // 3)] * 2
        sizes.append(count - sum(sizes))
        parts = [source.discrete_gaussian(size, 1e6).tolist() for size in sizes]
        whole = NoiseSource(bytes(32)).discrete_gaussian(count, 1e6).tolist()
        assert [number for part in parts for number in part] == whole

    def test_sampled(self) -> None:
        """A customer is chosen when the top 53 bits of its word lie below the rate."""
        key = bytes(range(32))
        words = np.frombuffer(keystream(key, 160), dtype="<u8").tolist()
        chosen = [row for row, word in enumerate(words) if (word >> 11) / 2**53 < 0.3]
        expected = sorted(chosen, key=lambda row: words[row])
        assert NoiseSource(key).sampled(20, 0.3).tolist() == expected

    def test_a_key_is_followed_by_the_next(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Before a key's counter would repeat; what is asked for at once has one key."""
        key = bytes(range(32))
        monkeypatch.setattr("common.noise.MOST_BYTES", 200)
        source = NoiseSource(key)
        found = [source._words(count).tobytes() for count in (8, 13, 5, 21, 1)]
        first = keystream(key, 200)
        second = keystream(first[168:], 200)
        third = keystream(second[40:72], 200)
        assert found == [
            first[:64],
            first[64:168],
            second[:40],
            third[:168],
            keystream(third[168:], 8),
        ]

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
    assert source.sampled(count, 1.0).shape == (count,)
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
    assert NoiseSource.fresh().sampled(1000, rate).size == 1000 * all_or_none


class TestSampled:
    """Who is chosen, and in which order."""

    def test_order_is_uniform(self) -> None:
        """Among three that are chosen all six orders are equally likely; false alarm 1e-6."""
        source = NoiseSource.seeded(2, "order")
        counts: dict[tuple[int, ...], int] = {}
        for _ in range(6000):
            rows = tuple(source.sampled(5, 0.5).tolist())
            if set(rows) == {0, 2, 3}:
                counts[rows] = counts.get(rows, 0) + 1
        assert len(counts) == 6
        assert stats.chisquare(list(counts.values())).pvalue > 1e-6

    def test_equal_words_are_drawn_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A tie would favour the table's order."""
        words = [np.zeros(3, dtype=np.uint64), np.array([5, 5, 1]), np.array([9, 2, 4])]
        source = NoiseSource.seeded(0)
        monkeypatch.setattr(source, "_words", lambda count: words.pop(0).astype(np.uint64)[:count])
        assert source.sampled(3, 0.5).tolist() == [1, 2, 0]
        assert not words


def test_spawned() -> None:
    """A stream of its own: the next 32 bytes are its key, and what follows is not shared."""
    source, key = NoiseSource(bytes(range(32))), keystream(bytes(range(32)), 32)
    spawned, expected = source.spawn(), NoiseSource(key)
    assert spawned.discrete_gaussian(5, 1e9).tolist() == expected.discrete_gaussian(5, 1e9).tolist()
    rest = np.frombuffer(keystream(bytes(range(32)), 64)[32:], dtype="<u8")
    assert source._words(4).tolist() == rest.tolist()
