"""Random numbers for privacy, from a cryptographic source.

AES-256 in counter mode (`common.streams`), keyed by the operating system. Never numpy's or
torch's generators: torch's CPU generator has 32 bits of state to guess, and its noise can be
subtracted.

A seeded source exists for simulations that must be repeatable. Its noise can be guessed by
whoever knows the seed, so results made with it are marked "not for release".
"""

import hashlib
import math
import os

import numpy as np
from jaxtyping import Int64

from common.discrete_gaussian import choose_plan, samples
from common.noise_loops import any_twice, choose
from common.streams import KEY_BYTES, MOST_BYTES, key_stream

_SAMPLES = 2**17  # of a table at a time: what they take stays in the processor's cache


class NoiseSource:
    """A stream of random numbers that nobody without the key can predict.

    It does not end: before a key's counter would repeat, its next 32 bytes are the next key.

    Args:
        key: 32 secret bytes. One key serves one stream; never use a key twice.
    """

    def __init__(self, key: bytes) -> None:
        self._stream, self._left = key_stream(key), MOST_BYTES - KEY_BYTES

    @classmethod
    def fresh(cls) -> "NoiseSource":
        """Return a stream keyed by the operating system."""
        return cls(os.urandom(32))

    @classmethod
    def seeded(cls, seed: int, *labels: str | int) -> "NoiseSource":
        """Return a repeatable, hence guessable, stream; `labels` keep streams apart."""
        text = "\x00".join(["hansa seeded noise", str(seed), *map(str, labels)])
        return cls(hashlib.sha256(text.encode()).digest())

    def spawn(self) -> "NoiseSource":
        """Return a stream of its own, keyed by the next 32 bytes of this one.

        Where one stream's use depends on the customers (how many are to be chosen from), another's
        must not: whoever compares two tables then sees the same noise in both.
        """
        return NoiseSource(self._bytes(KEY_BYTES))

    def discrete_gaussian(self, count: int, stddev: float) -> Int64[np.ndarray, " count"]:
        """Return integers k with probability proportional to exp(-k^2 / (2 stddev^2)).

        Drawn in equal blocks of at most 131,072 table samples. Of a block the first 16 bits of
        every uniform come first, little-endian, the first table sample of each number before the
        second of each; then the words that `common.discrete_gaussian.base_samples` asks for.

        Args:
            count: How many.
            stddev: The parameter, from 20 to 2^48. At most 1.2e-11 of it is added.

        Raises:
            AccountingError: `stddev` is outside that range or not a number.

        Guarantee: total variation of at most `Plan.distance` a number, never above 2^-112, if
        AES-CTR cannot be told from random words; only integers are computed with. See
        `common.discrete_gaussian`.
        """
        plan, numbers = choose_plan(stddev), np.empty(count, dtype=np.int64)
        blocks = max(1, -(-count * plan.draws // _SAMPLES))
        at_once = max(1, -(-count // blocks))
        for start in range(0, count, at_once):
            part = numbers[start : start + at_once]
            bits = self._bytes(2 * plan.draws * part.size)
            prefixes = np.frombuffer(bits, dtype="<u2").reshape(plan.draws, part.size)
            samples(plan, prefixes, self._words, part)
        return numbers

    def sampled(self, count: int, rate: float) -> Int64[np.ndarray, " chosen"]:
        """Return who is chosen of `count`, each with chance `rate` (to 2**-53), in random order.

        Each has one word. Whose upper 53 bits lie below the rate is chosen; the order is that of
        the words of the chosen ones, which are uniform, whoever is chosen. If two are equal, all
        get new words for the order.
        """
        rows, keys = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.uint64)
        limit = np.uint64(math.ceil(rate * 2.0**53))
        chosen = choose(self._words(count), limit, rows, keys)
        rows, keys = rows[:chosen], keys[:chosen]
        order = np.argsort(keys)
        while any_twice(keys, order):
            keys = self._words(chosen).copy()
            order = np.argsort(keys)
        return rows[order]

    def _words(self, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
        return np.frombuffer(self._bytes(8 * count), dtype="<u8")

    def _bytes(self, count: int) -> bytes:
        if count > self._left:
            next_key = self._stream.update(bytes(KEY_BYTES))
            self._stream, self._left = key_stream(next_key), MOST_BYTES - KEY_BYTES
        self._left -= count
        return self._stream.update(bytes(count))
