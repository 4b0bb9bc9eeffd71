"""Key streams against the standard they claim to be."""

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

import common.streams
from common.streams import _as_counter_mode, _as_gcm, key_stream

Way = Callable[[bytes], CipherContext]


@pytest.fixture(params=[_as_gcm, _as_counter_mode], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take either way, whichever is faster here."""
    monkeypatch.setattr(common.streams, "_faster", request.param)


def test_first_block_of_the_zero_key() -> None:
    """Case 14 of McGrew and Viega's test vectors for GCM: key, nonce and text of zeros."""
    assert key_stream(bytes(32)).update(bytes(16)).hex() == "cea7403d4d606b6e074ec5d3baf39d18"


@pytest.mark.parametrize("pieces", [(300_001,), (0, 1, 15, 16, 17, 8), (65_536, 3, 65_537)])
def test_bytes_are_those_of_counter_mode(pieces: tuple[int, ...]) -> None:
    """From block 2 on, however many are asked for at once."""
    key = bytes(range(32))
    stream = key_stream(key)
    found = b"".join(stream.update(bytes(count)) for count in pieces)
    counter = Cipher(algorithms.AES(key), modes.CTR((2).to_bytes(16, "big"))).encryptor()
    assert found == counter.update(bytes(sum(pieces)))


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33])
def test_other_keys_are_refused(length: int) -> None:
    """Shorter keys that AES would take, too."""
    with pytest.raises(ValueError, match="key of 32 bytes"):
        key_stream(bytes(length))
