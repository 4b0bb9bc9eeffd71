"""Rotation of long-term keys: one statement, signed by the old key and by the new one.

Whoever knew the old key can check that its owner names the new one, and that whoever has the
new one agreed. A key that was given up never comes back. A merchant's ledger is handed over by
an entry of its own (`common.chain`); the statement tells everybody else: the operator's registry
and witness, the other merchants, and auditors. It lies in `members.toml`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from common.chain import is_signed
from common.errors import IdentityError
from common.files import write_atomically
from common.masks import joined

if TYPE_CHECKING:
    from common.identity import Identity, Members

WITNESS: Final = "@witness"  # in place of a merchant's id: the operator's own key; no id looks so
_BYTES: Final = {"old": 32, "new": 32, "by_old": 64, "by_new": 64}
_LATEST = 2**53  # seconds since 1970


@dataclass(frozen=True)
class Rotation:
    """A statement that one key takes the place of another.

    Made by `sign_rotation`, read by `from_document`; both give statements whose signatures fit.
    """

    merchant: str  # id, or WITNESS
    old: bytes
    new: bytes
    at: int  # seconds since 1970, by the owner's clock
    by_old: bytes  # signatures
    by_new: bytes

    def signed(self) -> bytes:
        """Return what both keys sign."""
        parts = (self.merchant.encode(), self.old, self.new, str(self.at).encode())
        return joined(b"hansa rotation", *parts)

    def check(self) -> None:
        """Raise an `IdentityError` unless both keys signed, and differ."""
        if self.old == self.new:
            raise IdentityError(f"rotation of '{self.merchant[:64]}': both keys are the same")
        for key, signature, which in (
            (self.old, self.by_old, "old"),
            (self.new, self.by_new, "new"),
        ):
            if not is_signed(key, self.signed(), signature):
                raise IdentityError(
                    f"rotation of '{self.merchant[:64]}': is not signed with its {which} key"
                )

    @property
    def document(self) -> dict[str, Any]:
        """Return the statement as JSON and TOML have it."""
        return {
            "merchant": self.merchant,
            "at": self.at,
            **{name: getattr(self, name).hex() for name in _BYTES},
        }

    @classmethod
    def from_document(cls, document: object) -> "Rotation":
        """Read a statement back.

        Raises:
            IdentityError: It is none, or a signature does not fit.
        """
        if not isinstance(document, dict) or set(document) != {"merchant", "at", *_BYTES}:
            raise IdentityError(f"expected a rotation with merchant, at, {', '.join(_BYTES)}")
        merchant, at = document["merchant"], document["at"]
        if not isinstance(merchant, str) or type(at) is not int or not 0 <= at < _LATEST:
            raise IdentityError("rotation: merchant is no text, or at is no time in seconds")
        values = {name: _bytes(document[name], name, size) for name, size in _BYTES.items()}
        rotation = cls(merchant=merchant, at=at, **values)
        rotation.check()
        return rotation


def _bytes(text: object, name: str, size: int) -> bytes:
    digits = set(text) if isinstance(text, str) else {""}
    if not isinstance(text, str) or len(text) != 2 * size or not digits <= set("0123456789abcdef"):
        raise IdentityError(f"rotation: {name}: expected {2 * size} hexadecimal digits")
    return bytes.fromhex(text)


def sign_rotation(merchant: str, old: "Identity", new: "Identity", at: int) -> Rotation:
    """Return the statement that the key of `new` takes the place of that of `old`.

    Args:
        merchant: The id, or `WITNESS`.
        old: Has the key that is given up.
        new: Has the one that takes over.
        at: Seconds since 1970.

    Raises:
        IdentityError: Both have the same key.
    """
    unsigned = Rotation(merchant, old.public, new.public, at, b"", b"")
    message = unsigned.signed()
    rotation = replace(unsigned, by_old=old.sign(message), by_new=new.sign(message))
    rotation.check()
    return rotation


def pending_rotation(path: Path) -> Rotation | None:
    """Return the rotation that was begun and not finished; None where there is none.

    Raises:
        IdentityError: The file is no statement.
    """
    try:
        return Rotation.from_document(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise IdentityError(f"{path}: cannot be read as a rotation ({error})") from None
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from None


def begin_rotation(path: Path, rotation: Rotation) -> None:
    """Write a rotation down before anything is changed, so that it can be finished later.

    Raises:
        IdentityError: It cannot be written.
    """
    try:
        write_atomically(path, json.dumps(rotation.document, indent=1).encode() + b"\n")
    except OSError as error:
        raise IdentityError(f"{path}: cannot be written ({error.strerror})") from None


def lineage(key: bytes, merchant: str, rotations: Iterable[Rotation]) -> tuple[bytes, ...]:
    """Return a key and those before it, oldest first."""
    before = {one.new: one.old for one in rotations if one.merchant == merchant}
    found = [key]
    while found[-1] in before and before[found[-1]] not in found:
        found.append(before[found[-1]])
    return tuple(reversed(found))


def check_rotations(rotations: Iterable[Rotation], in_use: Iterable[bytes]) -> None:
    """Raise an `IdentityError` where keys are taken over twice, or one that was given up is used.

    Args:
        rotations: Statements whose signatures fit.
        in_use: Keys of members and witness of today.
    """
    rotations = list(rotations)
    old, new = [one.old for one in rotations], [one.new for one in rotations]
    if len({*old}) < len(old) or len({*new}) < len(new):
        raise IdentityError("rotations: a key is given up, or takes over, twice")
    if {*old} & {*in_use}:
        raise IdentityError("rotations: a key that was given up is in use again")


def rotated(members: "Members", statement: Rotation) -> "Members":
    """Return the list of members after a rotation; the same if it was made before.

    Raises:
        IdentityError: A signature does not fit, the old key is not the one of today, or the new
            one is known already.
    """
    statement.check()
    if statement in members.rotations:
        return members
    owner, of_witness = statement.merchant, statement.merchant == WITNESS
    today = members.witness if of_witness else members.keys.get(owner, b"")
    if today != statement.old:
        raise IdentityError(f"rotation of '{owner[:64]}': the list names another key than its old")
    known = {*members.keys.values(), members.witness}
    if statement.new in known.union(*((one.old, one.new) for one in members.rotations)):
        raise IdentityError(f"rotation of '{owner[:64]}': its new key was used before")
    rotations = (*members.rotations, statement)
    if of_witness:
        return replace(members, witness=statement.new, rotations=rotations)
    return replace(members, keys={**members.keys, owner: statement.new}, rotations=rotations)
