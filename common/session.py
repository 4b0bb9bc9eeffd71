"""What both halves of a secure sum must agree on, byte for byte.

A session is set up once (adverts, roster, first escrow) and carries many steps; a step is one
secure sum. `docs/secure-aggregation.md` has the protocol and why it is safe.

Positions count from 0 in the roster's order; the point of a position in secret sharing is the
position plus one. A set of members travels as a bitmap, so it has one form only.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from common.contract import MAX_COHORT
from common.errors import SecureSumError
from common.identity import MERCHANT_ID
from common.masks import digest, expand, joined
from common.network import parameters_sha256
from common.shares import SECRET_BYTES
from common.streams import KEY_BYTES

MIN_COHORT = 2
MAX_STEPS = 2**31 - 1
TAG_BYTES = 16  # of an authenticated box
BOX_BYTES = 2 * SECRET_BYTES + TAG_BYTES
MARK_BYTES = 8
CONFIRMATION_BYTES = 16
LINK_BYTES = 32
_FIXED = 2 * KEY_BYTES + LINK_BYTES + 64  # bytes of an advert behind the id


def threshold(members: int) -> int:
    """Return how many of a roster's members restore a secret: floor(2n / 3) + 1.

    Two sets of that size share more members than a third of the roster.

    >>> [threshold(n) for n in (2, 3, 5, 10, 200)]
    [2, 3, 4, 7, 134]
    """
    return 2 * members // 3 + 1


def session_context(run: str, number: int, contract: str) -> bytes:
    """Return the hash that names a session: the run's name, the session's number, the contract."""
    return digest(b"session", run.encode(), number.to_bytes(4, "big"), contract.encode())


@dataclass(frozen=True)
class Advert:
    """A merchant's keys for one session, signed by its identity."""

    merchant: str
    transport: bytes  # X25519 public key for boxes and confirmations
    masking: bytes  # X25519 public key for pair masks
    head: bytes  # link of the last entry of the merchant's ledger, which holds the reservation
    signature: bytes

    def signed(self, context: bytes) -> bytes:
        """Return what the signature is over."""
        name = self.merchant.encode()
        return joined(b"advert", context, name, self.transport, self.masking, self.head)

    def to_bytes(self) -> bytes:
        """Return id, keys, head and signature, in this order."""
        return b"".join(
            [self.merchant.encode(), self.transport, self.masking, self.head, self.signature]
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Advert":
        """Read an advert back.

        Raises:
            SecureSumError: The bytes are no advert.
        """
        name, rest = raw[:-_FIXED], raw[-_FIXED:]
        try:
            merchant = name.decode("ascii")
        except UnicodeDecodeError:
            merchant = ""
        if len(rest) != _FIXED or not re.fullmatch(MERCHANT_ID, merchant):
            raise SecureSumError("field 'advert': is no advert of a merchant")
        masking, head = 2 * KEY_BYTES, 2 * KEY_BYTES + LINK_BYTES
        return cls(
            merchant,
            rest[:KEY_BYTES],
            rest[KEY_BYTES:masking],
            rest[masking:head],
            rest[head:],
        )


@dataclass(frozen=True)
class Roster:
    """The members of a session, in the order of their ids.

    Raises:
        SecureSumError: Out of order, an id or a key twice, or the wrong number of members.
    """

    context: bytes
    adverts: tuple[Advert, ...]

    def __post_init__(self) -> None:
        names = [advert.merchant for advert in self.adverts]
        if not MIN_COHORT <= len(names) <= MAX_COHORT:
            raise SecureSumError(
                f"field 'roster': {len(names)} members; a secure sum needs {MIN_COHORT} to "
                f"{MAX_COHORT}"
            )
        if names != sorted(set(names)):
            raise SecureSumError("field 'roster': ids must be sorted and differ from each other")
        keys = {key for advert in self.adverts for key in (advert.transport, advert.masking)}
        if len(keys) != 2 * len(names):
            raise SecureSumError("field 'roster': two members have an equal key")

    @property
    def size(self) -> int:
        """Number of members, n."""
        return len(self.adverts)

    @property
    def threshold(self) -> int:
        """Return how many members restore a secret."""
        return threshold(self.size)

    @property
    def hash(self) -> bytes:
        """Return the hash that every key of the session depends on."""
        counts = [self.size.to_bytes(2, "big"), self.threshold.to_bytes(2, "big")]
        adverts = [advert.to_bytes() for advert in self.adverts]
        return digest(b"roster", self.context, *counts, *adverts)

    def names(self, positions: Iterable[int]) -> str:
        """Return the ids at some positions, for people."""
        return ", ".join(f"'{self.adverts[position].merchant}'" for position in sorted(positions))


@dataclass(frozen=True)
class Escrow:
    """What a member leaves with the others for one step, before that step.

    The box for a member holds that member's shares of the sender's two secrets of the step: the
    self-mask secret b and the row secret z. The row holds the sender's pair keys of the step,
    encrypted under z. Everything else lets the server find out who lied.
    """

    boxes: bytes  # [n, BOX_BYTES]; zeros where no box is due
    row: bytes  # [n, 32]
    marks: bytes  # [n, 8]: one of each pair key, to check the other's row
    digests: bytes  # [2, n, 8]: one of each share of b, then of z
    commitments: bytes  # [2, 32]: to b and z

    def to_bytes(self) -> bytes:
        """Return the parts one behind the other."""
        return self.boxes + self.row + self.marks + self.digests + self.commitments

    @classmethod
    def from_bytes(cls, raw: bytes, members: int) -> "Escrow":
        """Read an escrow back.

        Raises:
            SecureSumError: The length is not that for this number of members.
        """
        sizes = [BOX_BYTES, KEY_BYTES, MARK_BYTES, 2 * MARK_BYTES]
        ends = np.cumsum([size * members for size in sizes]).tolist()
        if len(raw) != ends[-1] + 2 * KEY_BYTES:
            raise SecureSumError(
                f"field 'escrow': expected {ends[-1] + 2 * KEY_BYTES} bytes for {members} members, "
                f"got {len(raw)}"
            )
        starts = [0, *ends]
        return cls(*(raw[a:b] for a, b in zip(starts, [*ends, len(raw)], strict=True)))

    def box(self, position: int) -> bytes:
        """Return the box for a member."""
        return self.boxes[BOX_BYTES * position : BOX_BYTES * (position + 1)]


def accusation(field: str, merchant: str, what: str) -> SecureSumError:
    """Return the refusal of something that another member sent; see `accused`."""
    return SecureSumError(f"field '{field}': '{merchant}' {what}")


def accused(refusal: str) -> str | None:
    """Return the member that a refusal accuses, whatever Flower wrote around it.

    >>> accused(str(accusation("boxes", "shop", "left a box that is not authentic")))
    'shop'
    """
    found = re.search(r"field '(?:boxes|confirmations)': '([^']{1,64})'", refusal)
    return found[1] if found else None


def step_context(roster_hash: bytes, step: int, occasion: bytes, active: frozenset[int]) -> bytes:
    """Return the hash that masks and confirmations of a step depend on.

    Args:
        roster_hash: Of the session.
        step: Number of the step in the session, from 1.
        occasion: Hash of what is summed: see `occasion_hash`.
        active: Positions of the members that are asked.
    """
    members = b"".join(position.to_bytes(2, "big") for position in sorted(active))
    return digest(b"step", roster_hash, step.to_bytes(4, "big"), occasion, members)


def occasion_hash(
    stage: str, number: int, attempt: int, customers_per_merchant: float, parameters: np.ndarray
) -> bytes:
    """Return the hash of what a step sums: stage, round, attempt, and the model that was shown."""
    return digest(
        b"occasion",
        stage.encode(),
        number.to_bytes(4, "big"),
        attempt.to_bytes(4, "big"),
        np.array([customers_per_merchant], dtype="<f8").tobytes(),
        bytes.fromhex(parameters_sha256(parameters)),
    )


def pair_secret_info(one: int, other: int, step: int) -> bytes:
    """Return the HKDF information of a pair's key for a step."""
    low, high = sorted((one, other))
    return b"pair" + low.to_bytes(2, "big") + high.to_bytes(2, "big") + step.to_bytes(4, "big")


def mask_key(secret: bytes, context: bytes) -> bytes:
    """Return the key of a mask stream: a step's pair key or self-mask secret, bound to the step."""
    return expand(secret, b"mask" + context)


def row_key(secret: bytes) -> bytes:
    """Return the key that a row of pair keys is encrypted under, from the row secret z."""
    return expand(secret, b"row")


def mark(pair_key: bytes) -> bytes:
    """Return what shows the server that a pair key is right, without telling it."""
    return hashlib.sha256(b"hansa pair mark" + pair_key).digest()[:MARK_BYTES]


def share_digest(share: bytes) -> bytes:
    """Return what shows the server that a share is the one that was dealt."""
    return hashlib.sha256(b"hansa share mark" + share).digest()[:MARK_BYTES]


def commitment(secret: bytes) -> bytes:
    """Return a commitment to a step's secret."""
    return digest(b"commitment", secret)


def survivors_statement(context: bytes, survivors: frozenset[int]) -> bytes:
    """Return what a confirmation is over: the step and the set of members in its sum."""
    members = b"".join(position.to_bytes(2, "big") for position in sorted(survivors))
    return digest(b"survivors", context, members)


def direction(label: bytes, sender: int, receiver: int) -> bytes:
    """Return the HKDF information of a key for one direction between two members."""
    return label + sender.to_bytes(2, "big") + receiver.to_bytes(2, "big")


def to_bitmap(positions: Iterable[int], members: int) -> bytes:
    """Return a set of positions as one bit each, the lowest first."""
    bits = np.zeros(members, dtype=np.uint8)
    bits[list(positions)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def from_bitmap(raw: bytes, members: int, field: str) -> frozenset[int]:
    """Read a set of positions.

    Raises:
        SecureSumError: Another length, or a bit beyond the last member; names the field.
    """
    if len(raw) != (members + 7) // 8:
        raise SecureSumError(f"field '{field}': expected a bitmap of {members} members")
    bits = np.unpackbits(np.frombuffer(raw, dtype=np.uint8), bitorder="little")
    if bits[members:].any():
        raise SecureSumError(f"field '{field}': names a position that no member has")
    return frozenset(np.flatnonzero(bits).tolist())


def parts(raw: bytes, size: int, count: int, field: str) -> Sequence[bytes]:
    """Cut bytes into `count` parts of `size`.

    Raises:
        SecureSumError: Another length; names the field.
    """
    if len(raw) != size * count:
        raise SecureSumError(f"field '{field}': expected {size * count} bytes, got {len(raw)}")
    return [raw[start : start + size] for start in range(0, len(raw), size)]
