"""Secret sharing: any `threshold` holders restore a secret, fewer learn nothing about it.

Shamir 1979, number by number over the field of 65,521 elements (the largest prime below 2^16).
A secret is 16 uniform field elements, 255.99 bits. Sharing each element by a polynomial of its
own is as secret as sharing one large number by one polynomial, and turns both directions into
a small matrix product that float64 computes exactly: every partial sum is a whole number below
200 * 65520^2 < 2^53.
"""

import os
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, UInt16

from common.errors import SecureSumError

PRIME = 65521
ELEMENTS = 16  # of one secret
SECRET_BYTES = 2 * ELEMENTS
MAX_HOLDERS = 200
_PIECE = 2**18  # multiplications


def random_elements(count: int) -> UInt16[np.ndarray, " count"]:
    """Return independent uniform field elements from the operating system."""
    found = np.zeros(0, dtype=np.uint16)
    while len(found) < count:
        drawn = np.frombuffer(os.urandom(2 * (count - len(found)) + 16), dtype="<u2")
        found = np.concatenate([found, drawn[drawn < PRIME]])
    return found[:count]


def split(
    secrets: UInt16[np.ndarray, "E"], threshold: int, holders: int
) -> UInt16[np.ndarray, "holders E"]:
    """Share field elements among holders; row i is for the holder with the point i + 1.

    Raises:
        SecureSumError: Not 1 <= threshold <= holders <= 200.
    """
    if not 1 <= threshold <= holders <= MAX_HOLDERS:
        raise SecureSumError(
            f"expected 1 <= threshold <= holders <= {MAX_HOLDERS}, got {threshold} of {holders}"
        )
    random = random_elements((threshold - 1) * len(secrets)).reshape(threshold - 1, len(secrets))
    coefficients = np.concatenate([secrets[None, :], random]).astype(np.float64)
    return _product(_powers(threshold, holders), coefficients)


def combine(points: tuple[int, ...], shares: UInt16[np.ndarray, "T E"]) -> UInt16[np.ndarray, "E"]:
    """Restore field elements from exactly `threshold` holders' shares.

    Args:
        points: The holders' points: their rows in `split`, plus one.
        shares: One row a holder.

    Raises:
        SecureSumError: A point is out of range or given twice.
    """
    row = weights(points).astype(np.float64)[None, :]
    return _product(row, shares.astype(np.float64)).reshape(-1)


@lru_cache(maxsize=256)
def weights(points: tuple[int, ...]) -> Int[np.ndarray, "T"]:
    """Return the Lagrange weights at zero for a set of points.

    Raises:
        SecureSumError: A point is out of range or given twice.
    """
    if len(set(points)) != len(points) or not all(1 <= x <= MAX_HOLDERS for x in points):
        raise SecureSumError("the holders' points must differ and lie between 1 and 200")
    x = np.array(points, dtype=np.int64)
    result = np.ones(len(x), dtype=np.int64)
    for other in points:
        factor = np.where(x == other, 1, other * _inverses()[(other - x) % PRIME])
        result = np.remainder(result * factor, PRIME)
    result = np.asarray(result)
    result.setflags(write=False)  # it is kept for other callers
    return result


@lru_cache(maxsize=1)
def _inverses() -> Int[np.ndarray, "65521"]:
    """Return the inverse of every field element (of zero: zero)."""
    inverses = np.zeros(PRIME, dtype=np.int64)
    inverses[1] = 1
    for small in (*range(2, MAX_HOLDERS), *range(PRIME - MAX_HOLDERS, PRIME)):
        inverses[small] = pow(small, -1, PRIME)  # differences of points are no others
    return inverses


@lru_cache(maxsize=64)
def _powers(threshold: int, holders: int) -> Float[np.ndarray, "holders threshold"]:
    points = np.arange(1, holders + 1, dtype=np.int64)
    columns = [np.ones(holders, dtype=np.int64)]
    for _ in range(threshold - 1):
        columns.append(columns[-1] * points % PRIME)
    return np.stack(columns, axis=1).astype(np.float64)


def _product(
    left: Float[np.ndarray, "N T"], right: Float[np.ndarray, "T E"]
) -> UInt16[np.ndarray, "N E"]:
    """Return the product in the field; in pieces too small for BLAS to start threads for."""
    pieces = -(-left.size * right.shape[1] // _PIECE)
    exact = [piece @ right for piece in np.array_split(left, min(pieces, len(left)))]
    return (np.concatenate(exact).astype(np.int64) % PRIME).astype(np.uint16)
