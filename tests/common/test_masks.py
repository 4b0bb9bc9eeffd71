"""Keys and mask streams against the standards they claim to be."""

import numpy as np
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st

from common.masks import add_masks, digest, expand, extract, joined, stream_bytes

RINGS = (np.uint32, np.uint64)
keys = st.binary(min_size=32, max_size=32)
short = st.binary(max_size=80)


def counter_mode(key: bytes, count: int) -> bytes:
    """Return AES-256 in counter mode from block 2, by `cryptography`'s own counter mode."""
    first = (2).to_bytes(16, "big")
    return Cipher(algorithms.AES(key), modes.CTR(first)).encryptor().update(bytes(count))


def stream(key: bytes, length: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return a stream's words."""
    raw = counter_mode(key, length * np.dtype(dtype).itemsize)
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).astype(dtype)


def ramp(length: int, dtype: type[np.unsignedinteger]) -> np.ndarray:
    """Return numbers all over the ring."""
    return (np.arange(length, dtype=np.uint64) * 0x9E3779B97F4A7C15).astype(dtype)


class TestStream:
    """A key's stream is AES-256-CTR from block 2."""

    @pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 65_535, 65_536, 65_537, 300_001])
    def test_bytes_are_those_of_counter_mode(self, count: int) -> None:
        """Around the edges of blocks."""
        key = bytes(range(32))
        assert stream_bytes(key, count) == counter_mode(key, count)

    @pytest.mark.parametrize("dtype", RINGS)
    @pytest.mark.parametrize("around", [2**16, 2**17, 2**18, 2**19, 2**20])
    @pytest.mark.parametrize("more", [-1, 0, 1, 5])
    def test_long_and_short_vectors_have_the_same_stream(
        self, dtype: type[np.unsignedinteger], around: int, more: int
    ) -> None:
        """Whichever way a mask is made, it is counter mode's, added or subtracted."""
        length = around // np.dtype(dtype).itemsize + more
        plus, minus = bytes(range(32)), bytes(range(32, 64))
        values = ramp(length, dtype)
        add_masks(values, [plus], [minus])
        expected = ramp(length, dtype) + stream(plus, length, dtype) - stream(minus, length, dtype)
        np.testing.assert_array_equal(values, expected)

    @pytest.mark.parametrize("count", [255, 256, 257, 600])
    def test_more_keys_than_are_open_at_once(self, count: int) -> None:
        """Keys are taken in portions; none is left out, none taken twice."""
        names = [number.to_bytes(32, "big") for number in range(count)]
        values = np.zeros(20_000, dtype=np.uint32)
        add_masks(values, names, [])
        words = [stream(name, 20_000, np.uint32)[-1] for name in names]
        assert values[-1] == np.sum(words, dtype=np.uint32)

    def test_words_are_little_endian(self) -> None:
        """The first four bytes of the stream, the lowest first."""
        values = np.zeros(1, dtype=np.uint32)
        add_masks(values, [bytes(32)], [])
        assert values[0] == int.from_bytes(stream_bytes(bytes(32), 4), "little")


class TestAddMasks:
    """`add_masks` in the ring."""

    @settings(max_examples=60, deadline=None)
    @given(
        plus=st.lists(keys, max_size=4),
        minus=st.lists(keys, max_size=4),
        length=st.sampled_from([0, 1, 2, 7, 1000, 16_385, 70_000]),
        dtype=st.sampled_from(RINGS),
    )
    def test_subtracting_what_was_added_is_nothing(
        self, plus: list[bytes], minus: list[bytes], length: int, dtype: type[np.unsignedinteger]
    ) -> None:
        """Masks come off again, whatever the ring and the length."""
        values = ramp(length, dtype)
        add_masks(values, plus, minus)
        add_masks(values, minus, plus)
        np.testing.assert_array_equal(values, ramp(length, dtype))

    @pytest.mark.parametrize("length", [10, 100_000])
    def test_a_key_on_both_sides_cancels(self, length: int) -> None:
        """Which is how pair masks vanish from a sum."""
        values = ramp(length, np.uint64)
        add_masks(values, [bytes(32), b"k" * 32], [b"k" * 32, bytes(32)])
        np.testing.assert_array_equal(values, ramp(length, np.uint64))

    def test_no_keys_change_nothing(self) -> None:
        """An empty mask is no mask."""
        for length in (0, 5, 100_000):
            values = ramp(length, np.uint32)
            add_masks(values, [], [])
            np.testing.assert_array_equal(values, ramp(length, np.uint32))

    @pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float64, ">u4", np.uint16])
    def test_other_numbers_are_refused(self, dtype: type | str) -> None:
        """Masks are for rings only."""
        with pytest.raises(ValueError, match="uint32 or uint64"):
            add_masks(np.zeros(3, dtype=dtype), [bytes(32)], [])


# RFC 5869, appendix A: (input key, salt, information, pseudo-random key, first block of output)
RFC_5869 = [
    (
        b"\x0b" * 22,
        bytes(range(13)),
        bytes(range(0xF0, 0xFA)),
        "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5",
        "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf",
    ),
    (
        bytes(range(0x50)),
        bytes(range(0x60, 0xB0)),
        bytes(range(0xB0, 0x100)),
        "06a6b88c5853361a06104c9ceb35b45cef760014904671014a193f40c15fc244",
        "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c",
    ),
    (
        b"\x0b" * 22,
        b"",
        b"",
        "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04",
        "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d",
    ),
]


class TestKeys:
    """HKDF-SHA256, one block."""

    @pytest.mark.parametrize(("secret", "salt", "info", "key", "block"), RFC_5869)
    def test_rfc_5869(self, secret: bytes, salt: bytes, info: bytes, key: str, block: str) -> None:
        """The test cases with SHA-256, as far as one block goes."""
        assert extract(salt, secret).hex() == key
        assert expand(extract(salt, secret), info).hex() == block

    @settings(max_examples=50, deadline=None)
    @given(short, short, short)
    def test_any_input_agrees_with_another_implementation(
        self, salt: bytes, secret: bytes, info: bytes
    ) -> None:
        """`cryptography` has HKDF too."""
        other = HKDF(hashes.SHA256(), 32, salt, info).derive(secret)
        assert expand(extract(salt, secret), info) == other

    @pytest.mark.parametrize("length", [0, 1, 16, 31, 33, 64])
    def test_a_key_of_another_length_is_refused(self, length: int) -> None:
        """What comes of an empty key would be known to everybody."""
        with pytest.raises(ValueError, match=f"expected a key of 32 bytes, got {length}"):
            expand(bytes(length), b"mask")


class TestJoined:
    """Parts never look alike."""

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.binary(max_size=3), max_size=4), st.lists(st.binary(max_size=3), max_size=4))
    def test_different_parts_differ_joined(self, one: list[bytes], other: list[bytes]) -> None:
        """Also where their bytes are the same in a row."""
        assert (joined(*one) == joined(*other)) == (one == other)
        assert (digest(*one) == digest(*other)) == (one == other)
