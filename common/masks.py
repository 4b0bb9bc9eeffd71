"""Keys and mask streams.

Keys: HKDF with SHA-256 (RFC 5869), one block, salted with the roster's hash. Streams: see
`common.streams`. A key serves one stream.
"""

import hashlib
import hmac
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.streams import KEY_BYTES, MOST_BYTES, NONCE, key_stream

_BLOCK_BYTES = 2**18  # with zeros, mask and values it fits into a core's own cache
_SHORT_BYTES = 2**16  # up to here one call makes a stream at less cost
_ZEROS = memoryview(bytes(_BLOCK_BYTES))
_STREAMS_AT_ONCE = 256  # open cipher contexts
_LABEL = b"hansa secure sum 1"


def joined(*parts: bytes) -> bytes:
    """Return the parts, each behind its length, so that different parts never look alike."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def digest(*parts: bytes) -> bytes:
    """Return SHA-256 over the protocol's label and the parts."""
    return hashlib.sha256(joined(_LABEL, *parts)).digest()


def extract(salt: bytes, secret: bytes) -> bytes:
    """Return a pseudo-random key from a shared secret (HKDF-Extract)."""
    return hmac.digest(salt, secret, hashlib.sha256)


def expand(key: bytes, info: bytes) -> bytes:
    """Return 32 bytes for one purpose (HKDF-Expand, one block).

    Raises:
        ValueError: The key does not have 32 bytes; an empty one would be known to all.
    """
    return hmac.digest(_checked(key), info + b"\x01", hashlib.sha256)


def stream_bytes(key: bytes, count: int) -> bytes:
    """Return the first `count` bytes of a key's stream."""
    return key_stream(key).update(bytes(count))


def add_masks(values: np.ndarray, plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
    """Add the streams of `plus` and subtract those of `minus`, in place, modulo the ring.

    All streams are applied to one cache-sized block before the next.

    Args:
        values: uint32 or uint64 [P], contiguous; words of a stream are little-endian.
        plus: 32-byte keys.
        minus: 32-byte keys.
    """
    if values.dtype not in (np.uint32, np.uint64) or values.nbytes > MOST_BYTES:
        raise ValueError("expected at most 64 GiB of uint32 or uint64")
    jobs = [(key, np.add) for key in plus] + [(key, np.subtract) for key in minus]
    if values.nbytes <= _SHORT_BYTES:
        word, zeros = values.dtype.newbyteorder("<"), _ZEROS[: values.nbytes]
        for key, operation in jobs:
            raw = AESGCM(key).encrypt(NONCE, zeros, None)  # and a tag, unused
            operation(values, np.frombuffer(raw, word, count=values.size), out=values)
        return
    for start in range(0, len(jobs), _STREAMS_AT_ONCE):
        _add_streams(
            values, [(key_stream(k), op) for k, op in jobs[start : start + _STREAMS_AT_ONCE]]
        )


def _add_streams(values: np.ndarray, streams: list[tuple[CipherContext, np.ufunc]]) -> None:
    block = _BLOCK_BYTES // values.itemsize
    raw = bytearray(min(_BLOCK_BYTES, values.nbytes) + 16)
    words = np.frombuffer(raw, values.dtype.newbyteorder("<"), count=min(block, values.size))
    for start in range(0, values.size, block):
        part = values[start : start + block]
        zeros, mask = _ZEROS[: part.nbytes], words[: part.size]
        for stream, operation in streams:
            stream.update_into(zeros, raw)
            operation(part, mask, out=part)


def _checked(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"expected a key of {KEY_BYTES} bytes, got {len(key)}")
    return key
