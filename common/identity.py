"""Long-term identities: an Ed25519 key a merchant, and the list of who is enrolled.

A merchant makes its key itself and keeps it in a file of mode 0600; what is enrolled is the
public half. Every merchant pins the list of members (`members.toml`): nobody takes part in a
secure sum who is not in it, whatever the coordinator says.
"""

import os
import re
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common import chain
from common.chain import is_signed
from common.errors import IdentityError, WireError
from common.masks import expand
from common.rotation import WITNESS, Rotation, check_rotations, lineage

MERCHANT_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Identity:
    """A merchant's id and its private key."""

    merchant: str
    key: Ed25519PrivateKey

    @classmethod
    def generate(cls, merchant: str) -> "Identity":
        """Return a new identity, keyed by the operating system."""
        return cls(merchant, Ed25519PrivateKey.generate())

    @classmethod
    def of(cls, merchant: str, private: bytes) -> "Identity":
        """Return the identity with the given 32 bytes of a private key."""
        return cls(merchant, Ed25519PrivateKey.from_private_bytes(private))

    @cached_property
    def public(self) -> bytes:
        """The 32 bytes that are enrolled."""
        return self.key.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> bytes:
        """Return a signature of 64 bytes (RFC 8032)."""
        return chain.sign(self.key, self.public, message)

    def sealing_key(self, purpose: bytes) -> bytes:
        """Return a secret key for this merchant's own files."""
        return expand(self.key.private_bytes_raw(), b"hansa sealing " + purpose)


@dataclass(frozen=True)
class Members:
    """Who is enrolled: merchant id -> public key, and the key of the witness of ledgers."""

    keys: dict[str, bytes]
    witness: bytes = b""  # empty: none is pinned, and nothing can be released
    rotations: tuple[Rotation, ...] = ()  # how keys of today came after earlier ones

    def keys_of(self, merchant: str) -> tuple[bytes, ...]:
        """Return all keys that a merchant had, oldest first; none for anybody else."""
        if merchant not in self.keys:
            return ()
        return lineage(self.keys[merchant], merchant, self.rotations)

    @property
    def witnesses(self) -> tuple[bytes, ...]:
        """Return all keys that the witness had, oldest first; the last one counts today."""
        return lineage(self.witness, WITNESS, self.rotations)

    def key_of(self, merchant: str) -> bytes:
        """Return an enrolled merchant's public key; raises `WireError` for anybody else."""
        if merchant not in self.keys:
            raise WireError(f"field 'merchant': '{merchant[:64]}' is not enrolled")
        return self.keys[merchant]

    def verify(self, merchant: str, message: bytes, signature: bytes) -> bool:
        """Tell whether an enrolled merchant signed the message."""
        key = self.keys.get(merchant)
        return key is not None and is_signed(key, message, signature)


def write_identity(identity: Identity, path: Path) -> None:
    """Write a private key, readable by its owner alone; never over a file that is there.

    Raises:
        IdentityError: The file exists or cannot be written.
    """
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as file:
            file.write(identity.key.private_bytes_raw().hex() + "\n")
            file.flush()
            os.fsync(handle)
    except FileExistsError:
        raise IdentityError(f"{path}: there is a key already; it is not overwritten") from None
    except OSError as error:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # half a key would be in the way of the next attempt
        raise IdentityError(f"{path}: cannot be written ({error.strerror})") from None


def read_identity(merchant: str, path: Path) -> Identity:
    """Read a merchant's private key.

    Raises:
        IdentityError: The file is missing, is no key, or can be read by others.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise IdentityError(
            f"{path}: there is no identity key; it signs the ledger and makes secure sums (a "
            "merchant's is named by merchant.key in merchant.toml)"
        ) from None
    except (OSError, UnicodeDecodeError):
        raise IdentityError(f"{path}: cannot be read as an identity key") from None
    if mode & 0o077:
        raise IdentityError(f"{path}: others can read this key; run chmod 600 on it")
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise IdentityError(f"{path}: is no identity key (expected 64 hexadecimal digits)")
    return Identity.of(merchant, bytes.fromhex(text))


def following_identity(merchant: str, path: Path) -> Identity:
    """Return the identity that will take the place of the one at `path`, made where there is none.

    It lies beside it until `replace_identity`, so that what breaks off goes on with the same key.

    Raises:
        IdentityError: It cannot be written or read.
    """
    following = path.with_name(f"{path.name}.next")
    if not following.exists():
        write_identity(Identity.generate(merchant), following)
    return read_identity(merchant, following)


def replace_identity(path: Path) -> Path:
    """Put the following identity in the place of the one at `path`; return where that is kept.

    There is a whole key at `path` at every moment.

    Raises:
        IdentityError: It cannot be written; the key is as it was.
    """
    try:
        kept = next(
            place
            for number in count(1)
            if not (place := path.with_name(f"{path.name}.{number}")).exists()
            or place.samefile(path)  # of an attempt that broke off here
        )
        if not kept.exists():
            os.link(path, kept)
        path.with_name(f"{path.name}.next").replace(path)
        handle = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be replaced ({error.strerror})") from None
    return kept


def members_toml(members: Members) -> str:
    """Write the list of members as TOML, sorted, without anybody's comments."""
    import tomli_w

    document: dict[str, Any] = {
        "members": {name: key.hex() for name, key in sorted(members.keys.items())}
    }
    if members.witness:
        document["witness"] = {"key": members.witness.hex()}
    previous = members.witnesses[:-1]
    if previous:
        document["witness"]["previous"] = [key.hex() for key in previous]
    if members.rotations:
        document["rotations"] = [rotation.document for rotation in members.rotations]
    return tomli_w.dumps(document)


def write_members(members: Members, path: Path) -> None:
    """Write the list of members.

    Raises:
        IdentityError: The file cannot be written.
    """
    try:
        path.write_text(members_toml(members), encoding="utf-8")
    except OSError as error:
        raise IdentityError(f"{path}: cannot be written ({error.strerror})") from None


def read_members(path: Path) -> Members:
    """Read `members.toml`: tables `members` (id -> public key) and `witness` (its `key`).

    Keys are in hexadecimal. Where keys were rotated, a table of `rotations` holds the signed
    statements, and `witness.previous` names the keys that the witness had before.

    Raises:
        IdentityError: The file is missing, is not TOML, or holds something else, a bad key, or
            one key twice, or what it says of earlier keys is not proven by rotations.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IdentityError(
            f"{path}: there is no list of members; it names the enrolled public keys and the "
            "witness"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise IdentityError(f"{path}: cannot be read as TOML ({error})") from None
    listed, witness = document.get("members"), document.get("witness", {"key": ""})
    known = {"members", "witness", "rotations"}
    if not {"members"} <= set(document) <= known or not isinstance(listed, dict):
        raise IdentityError(
            f'{path}: expected one table [members] of id = "public key" and one [witness] with key'
        )
    if not isinstance(witness, dict) or not {"key"} <= set(witness) <= {"key", "previous"}:
        raise IdentityError(f"{path}: witness: expected one entry, key, and maybe previous")
    keys: dict[str, bytes] = {}
    for name, text in listed.items():
        if not re.fullmatch(MERCHANT_ID, name):
            raise IdentityError(f"{path}: members: '{name[:64]}' is no merchant id")
        keys[name] = _public_key(text, f"{path}: members.{name}")
    witness_key = _public_key(witness["key"], f"{path}: witness.key") if witness["key"] else b""
    if len({*keys.values(), witness_key}) != len(keys) + 1:
        raise IdentityError(f"{path}: two members have the same public key")
    members = Members(keys, witness_key, _rotations(document.get("rotations", []), path))
    _check_previous(members, witness.get("previous", []), path)
    return members


def _rotations(listed: object, path: Path) -> tuple[Rotation, ...]:
    if not isinstance(listed, list):
        raise IdentityError(f"{path}: rotations: expected a list of tables")
    try:
        return tuple(map(Rotation.from_document, listed))
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from None


def _check_previous(members: Members, previous: object, path: Path) -> None:
    """Check that rotations prove what is said of earlier keys, and contradict nothing."""
    if previous != [key.hex() for key in members.witnesses[:-1]]:
        raise IdentityError(
            f"{path}: witness.previous: the rotations in this file do not prove these keys"
        )
    try:
        check_rotations(members.rotations, {*members.keys.values(), members.witness})
    except IdentityError as error:
        raise IdentityError(f"{path}: {error}") from None


def _public_key(text: object, where: str) -> bytes:
    if not isinstance(text, str) or not re.fullmatch(r"[0-9a-f]{64}", text):
        raise IdentityError(f"{where}: expected 64 hexadecimal digits")
    return bytes.fromhex(text)
