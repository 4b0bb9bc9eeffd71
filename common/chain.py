"""What a merchant's ledger, its witness and an auditor must agree on, byte for byte.

An entry is a JSON text, kept and hashed as the bytes that were written. Its link is
SHA-256(link before || SHA-256(body)); the link before the first entry is 32 zero bytes. The
merchant signs (its public key, the entry's number, the link) with Ed25519: since a link commits
to everything before it, the signature of the last entry vouches for all of them. Whoever knows
an earlier link can check with the bodies' hashes alone that a later head extends it; that is
how a witness follows a ledger whose entries it never reads.

A witness countersigns (public key, number, link, time).

A merchant that changes its key hands its ledger over with an entry `rekey`: signed with the old
key, it names the new one and holds that one's signature over the head before it. So nobody can
take up somebody else's ledger, or have one forced upon it. Docs: docs/evidence.md.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from common.errors import LedgerError, WireError
from common.masks import joined

NO_LINK = bytes(32)  # before the first entry
REKEY = "rekey"  # the kind of entry that hands a ledger over
_REKEY_MARK = b'"kind":"rekey"'  # is in the body of each of them, as `body_bytes` writes it
_LINK_BYTES, _KEY_BYTES, _SIGNATURE_BYTES, _NUMBER_BYTES = 32, 32, 64, 8
_JSON = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
_MOST = 2**63 - 1  # number of an entry; what SQLite can count to
_NO_COUNTERSIGNATURE = "field 'countersigned': is no countersignature"
_MOST_MADE_HERE = 4096
_made_here: dict[bytes, bytes] = {}  # signature -> what `_signed_by` gives


def body_bytes(document: Mapping[str, Any]) -> bytes:
    """Return an entry's body: ASCII JSON with sorted keys and no spaces."""
    return _JSON.encode(document).encode()


def link_after(link: bytes, body: bytes) -> bytes:
    """Return the link of an entry that follows `link`."""
    return extended(link, [hashlib.sha256(body).digest()])


def extended(link: bytes, digests: Sequence[bytes]) -> bytes:
    """Return the link after entries with these SHA-256 hashes of bodies."""
    for digest in digests:
        link = hashlib.sha256(link + digest).digest()
    return link


def signed_head(public: bytes, seq: int, link: bytes) -> bytes:
    """Return what a merchant signs for its entry number `seq`."""
    return joined(b"hansa ledger", public, seq.to_bytes(_NUMBER_BYTES, "big"), link)


def rekey_proof(old: bytes, new: bytes, seq: int, link: bytes) -> bytes:
    """Return what the new key signs to take a ledger over after entry `seq`."""
    return joined(b"hansa rekey", old, new, seq.to_bytes(_NUMBER_BYTES, "big"), link)


def sign(key: Ed25519PrivateKey, public: bytes, message: bytes) -> bytes:
    """Return an Ed25519 signature of 64 bytes (RFC 8032); `public` is the key's other half."""
    signature = key.sign(message)
    _made_here[signature] = _signed_by(public, message)
    while len(_made_here) > _MOST_MADE_HERE:
        with suppress(KeyError, RuntimeError):  # another thread was quicker
            del _made_here[next(iter(_made_here))]
    return signature


def _signed_by(public: bytes, message: bytes) -> bytes:
    """Return a hash of a key's 32 bytes and what it signed."""
    return hashlib.sha256(public + message).digest()


def is_signed(public: bytes, message: bytes, signature: bytes) -> bool:
    """Tell whether an Ed25519 signature fits.

    Of the last few thousand that this very process made it is known: in a simulation signer and
    checker are one process, and a check takes three times as long as a signature.
    """
    made = _made_here.get(signature) if type(signature) is bytes else None
    if made is not None and len(public) == _KEY_BYTES and made == _signed_by(public, message):
        return True
    try:
        _key(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


@lru_cache(maxsize=4096)
def _key(public: bytes) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(public)


@dataclass(frozen=True)
class Entry:
    """One entry as it is stored."""

    seq: int  # from 1, without gaps
    body: bytes
    link: bytes
    signature: bytes

    @property
    def document(self) -> dict[str, Any]:
        """Return the body's JSON object.

        Raises:
            LedgerError: The body is no JSON object.
        """
        try:
            document = json.loads(self.body)
        except (ValueError, RecursionError):
            document = None
        if not isinstance(document, dict):
            raise LedgerError(f"entry {self.seq} of the ledger is no JSON object")
        return document


def named_key(entry: Entry) -> bytes | None:
    """Return the key that an entry `open` or `rekey` names; None for every other entry.

    Raises:
        LedgerError: It names none.
    """
    if entry.seq != 1 and _REKEY_MARK not in entry.body:
        return None
    document = entry.document
    if document.get("kind") != ("open" if entry.seq == 1 else REKEY):
        return None
    return _from_hex(entry, document.get("key"))


def check_rekey(entry: Entry, keys: Sequence[bytes], link: bytes) -> None:
    """Check an entry `rekey`.

    Args:
        entry: The entry.
        keys: That signed the ledger so far, oldest first.
        link: Before the entry.

    Raises:
        LedgerError: The last of the keys did not sign it, the new key did not agree, or comes
            back.
    """
    old, new = keys[-1], named_key(entry)
    where = f"entry {entry.seq}, which hands the ledger over to another key,"
    if not is_signed(old, signed_head(old, entry.seq, entry.link), entry.signature):
        raise LedgerError(f"{where} is not signed with the key before")
    if new is None or new in keys:
        raise LedgerError(f"{where} names a key that was given up before")
    proof = _from_hex(entry, entry.document.get("proof"))
    if not is_signed(new, rekey_proof(old, new, entry.seq - 1, link), proof):
        raise LedgerError(f"{where} lacks the new key's signature over entry {entry.seq - 1}")


def _from_hex(entry: Entry, text: object) -> bytes:
    with suppress(ValueError):
        raw = bytes.fromhex(text) if isinstance(text, str) else b""
        if raw and raw.hex() == text:
            return raw
    raise LedgerError(f"entry {entry.seq} of the ledger names no key, or holds no proof of it")


@dataclass(frozen=True)
class Head:
    """A ledger's last entry as a witness gets it, and how it extends an earlier one."""

    seq: int
    link: bytes
    signature: bytes
    since: int  # entry that the receiver knows; `seq` where it knows none
    digests: tuple[bytes, ...]  # SHA-256 of the bodies since + 1 ... seq

    def to_bytes(self) -> bytes:
        """Return numbers, link, signature and digests, in this order."""
        numbers = [value.to_bytes(_NUMBER_BYTES, "big") for value in (self.seq, self.since)]
        return b"".join([*numbers, self.link, self.signature, *self.digests])

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Head":
        """Read a head back.

        Raises:
            WireError: The bytes are no head.
        """
        ends = (8, 16, 16 + _LINK_BYTES, 16 + _LINK_BYTES + _SIGNATURE_BYTES)
        seq, since = (int.from_bytes(raw[end - 8 : end], "big") for end in ends[:2])
        rest = raw[ends[3] :]
        if not (
            len(raw) >= ends[3]
            and 0 < seq <= _MOST
            and since <= seq
            and len(rest) == _LINK_BYTES * (seq - since)
        ):
            raise WireError("field 'head': is no head of a ledger")
        digests = tuple(rest[i : i + _LINK_BYTES] for i in range(0, len(rest), _LINK_BYTES))
        return cls(seq, raw[ends[1] : ends[2]], raw[ends[2] : ends[3]], since, digests)

    def is_of(self, public: bytes) -> bool:
        """Tell whether the merchant with this key signed the head."""
        return is_signed(public, signed_head(public, self.seq, self.link), self.signature)


@dataclass(frozen=True)
class Countersignature:
    """What a witness says of a head: I saw it, and it extends all that I saw before."""

    body: bytes  # JSON: at, key, link, seq
    signature: bytes

    @classmethod
    def statement(cls, public: bytes, seq: int, link: bytes, at: float) -> bytes:
        """Return the body of a countersignature."""
        return body_bytes({"at": at, "key": public.hex(), "link": link.hex(), "seq": seq})

    @staticmethod
    def signed(body: bytes) -> bytes:
        """Return what a witness signs."""
        return joined(b"hansa witness", body)

    def to_bytes(self) -> bytes:
        """Return signature and body, in this order."""
        return self.signature + self.body

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Countersignature":
        """Split signature and body; nothing is checked."""
        return cls(raw[_SIGNATURE_BYTES:], raw[:_SIGNATURE_BYTES])

    def opened(self, witness: bytes, public: bytes) -> "Seen":
        """Return what a witness saw of a merchant's ledger.

        Args:
            witness: The witness's public key, pinned.
            public: The merchant's.

        Raises:
            WireError: The witness did not sign this, it is of another ledger, or is no
                countersignature.
        """
        return self.opened_by([witness], [public])

    def opened_by(self, witnesses: Collection[bytes], publics: Collection[bytes]) -> "Seen":
        """Return the same where witness and merchant had several keys, one after the other.

        Raises:
            WireError: None of the witness's keys signed this, it is of no ledger of these keys,
                or is no countersignature.
        """
        message = self.signed(self.body)
        if not any(is_signed(witness, message, self.signature) for witness in witnesses):
            raise WireError("field 'countersigned': is not signed by the pinned witness")
        try:
            document = Entry(0, self.body, b"", b"").document
        except LedgerError:
            raise WireError(_NO_COUNTERSIGNATURE) from None
        if document.get("key") not in [public.hex() for public in publics]:
            raise WireError("field 'countersigned': is of another merchant's ledger")
        seq, at = document.get("seq"), document.get("at")
        if type(seq) is int and 0 < seq <= _MOST and isinstance(at, int | float):
            with suppress(KeyError, TypeError, ValueError, OverflowError):
                seen = Seen(seq, bytes.fromhex(document["link"]), float(at))
                if math.isfinite(seen.at):
                    return seen
        raise WireError(_NO_COUNTERSIGNATURE)


@dataclass(frozen=True)
class Seen:
    """A head that a witness saw."""

    seq: int
    link: bytes
    at: float  # seconds since 1970, by the witness's clock
