"""What merchant and operator say to each other when a merchant enrols; no file, no network.

A **token** is what the operator gives to one merchant by another way: where to go, which
certificate authority, operator and contract to expect there, and a secret that is good once.
Everything that the operator says later is signed by its identity, which is also the witness's:
the contract, and the **list** of members, whose version rises by one with every change. What a
merchant asks is signed by the merchant's identity. Statements are joined parts with lengths, so
that a signature for one purpose never fits another.
"""

import base64
import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any
from urllib.parse import urlsplit

from common.chain import body_bytes, is_signed
from common.errors import EnrolmentError, IdentityError
from common.identity import MERCHANT_ID, Members
from common.masks import joined
from common.rotation import WITNESS, Rotation, check_rotations, lineage

PREFIX = "hansa1-"
PATH = "/v1/fleet/hansa"  # where the gateway answers, beside Flower's own paths
CLOCK_WINDOW_S = 300  # how far a request's time may be from the operator's clock
MAX_BODY = 64 * 1024  # bytes of a request
MAX_ANSWER = 16 * 1024 * 1024  # bytes of an answer: a list of thousands of members
_MAX_TOKEN = 4096
_VERSION = 1
_HEX = re.compile(r"[0-9a-f]{64}")
_SIGNATURE = re.compile(r"[0-9a-f]{128}")


def grouped(digits: str) -> str:
    """Return hexadecimal digits in groups of four, for people to compare.

    >>> grouped("0011aabbccdd")
    '0011 aabb ccdd'
    """
    return " ".join(digits[start : start + 4] for start in range(0, len(digits), 4))


def fingerprint(content: bytes) -> str:
    """Return the SHA-256 of some bytes, for people to compare."""
    return grouped(hashlib.sha256(content).hexdigest())


@dataclass(frozen=True)
class Token:
    """An invitation of one merchant; hexadecimal except `url` and `merchant`."""

    url: str
    ca: str  # SHA-256 of the certificate authority's certificate, DER
    operator: str  # public key
    contract: str  # SHA-256
    merchant: str
    secret: str  # 32 random bytes

    @property
    def secret_sha256(self) -> str:
        """Return what the operator keeps of the secret."""
        return secret_sha256(self.secret)

    def text(self) -> str:
        """Return the token as it is given away: one word."""
        body = body_bytes({"v": _VERSION, **asdict(self)})
        return PREFIX + base64.urlsafe_b64encode(body).decode().rstrip("=")


def secret_sha256(secret: str) -> str:
    """Return the SHA-256 of a secret that is written in hexadecimal."""
    return hashlib.sha256(bytes.fromhex(secret)).hexdigest()


def parse_token(text: str) -> Token:
    """Read a token.

    Raises:
        EnrolmentError: It is none, or was cut or changed; the secret is not in the message.
    """
    text = text.strip()
    if len(text) > _MAX_TOKEN or not re.fullmatch(PREFIX + r"[A-Za-z0-9_-]+", text):
        raise EnrolmentError(f"this is no token: expected one word that starts with {PREFIX}")
    body = text.removeprefix(PREFIX)
    try:
        fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (ValueError, RecursionError):
        raise EnrolmentError("this token cannot be read: was it copied whole?") from None
    if not isinstance(fields, dict) or fields.pop("v", None) != _VERSION:
        raise EnrolmentError("this token is of another version of Hansa; is yours the newest?")
    if set(fields) != {"url", "ca", "operator", "contract", "merchant", "secret"}:
        raise EnrolmentError("this token does not hold what a token holds; ask for another")
    _check_token(fields)
    return Token(**fields)


def _check_token(fields: dict[str, Any]) -> None:
    for name in ("ca", "operator", "contract", "secret"):
        if not isinstance(fields[name], str) or not _HEX.fullmatch(fields[name]):
            raise EnrolmentError(f"this token's {name} is not 64 hexadecimal digits")
    if not isinstance(fields["merchant"], str) or not re.fullmatch(MERCHANT_ID, fields["merchant"]):
        raise EnrolmentError("this token's merchant is no merchant id")
    if not isinstance(fields["url"], str) or not is_gateway_url(fields["url"]):
        raise EnrolmentError("this token's url is not like https://host:port")


def is_gateway_url(text: str) -> bool:
    """Tell whether a text is `https://host:port` and nothing more."""
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    if not parts.hostname or port is None or not re.fullmatch(r"[!-~]+", text):
        return False
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return text.lower() == f"https://{host}:{port}"


def contract_statement(contract: str) -> bytes:
    """Return what the operator signs for a contract, given its SHA-256."""
    return joined(b"hansa contract", bytes.fromhex(contract))


def authority_statement(pem: str, next_pem: str) -> bytes:
    """Return what the operator signs for its certificate authorities, now and next."""
    return joined(b"hansa authority", pem.encode(), next_pem.encode())


@dataclass(frozen=True)
class Enrolling:
    """What a merchant sends with its token."""

    merchant: str
    identity: bytes  # public key, 32 bytes
    node: bytes  # public key, PEM
    secret_sha256: str

    def statement(self, operator: bytes) -> bytes:
        """Return what proves that the merchant has the identity's private key."""
        secret = bytes.fromhex(self.secret_sha256)
        parts = (operator, self.merchant.encode(), self.identity, self.node, secret)
        return joined(b"hansa enrol", *parts)


def members_statement(operator: bytes, merchant: str, at: int) -> bytes:
    """Return what a merchant signs to see the list; `at` in seconds since 1970."""
    return joined(b"hansa members", operator, merchant.encode(), str(at).encode())


def rotate_statement(operator: bytes, merchant: str, node: bytes, at: int) -> bytes:
    """Return what a merchant signs to replace its node's public key (PEM)."""
    return joined(b"hansa rotate", operator, merchant.encode(), node, str(at).encode())


@dataclass(frozen=True)
class SignedList:
    """The members at one version."""

    version: int
    members: dict[str, bytes]  # id -> identity's public key
    added: dict[str, int]  # id -> version that added it, or its key of today
    revoked: dict[str, int]  # id -> version that revoked it
    witness: bytes  # the operator's public key
    rotations: tuple[Rotation, ...] = ()  # how keys of today came after earlier ones

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "version": self.version,
            "members": {name: key.hex() for name, key in self.members.items()},
            "added": self.added,
            "revoked": self.revoked,
            "witness": self.witness.hex(),
            "rotations": [rotation.document for rotation in self.rotations],
        }

    def canonical(self) -> bytes:
        """Return the bytes that the operator signs."""
        return body_bytes(self.document())

    def pinned(self) -> Members:
        """Return it as `members.toml` has it."""
        return Members(self.members, self.witness, self.rotations)


def parse_list(document: object, signature: object, operator: bytes) -> SignedList:
    """Read and check a signed list.

    An operator that changed its key signs with the new one; the list then has the statements of
    both keys, one for each change, that lead there from the key that was pinned.

    Raises:
        EnrolmentError: It is no list, or the operator did not sign it.
    """
    if not isinstance(document, dict) or set(document) != {
        "version", "members", "added", "revoked", "witness", "rotations",
    }:  # fmt: skip
        raise EnrolmentError("the operator's answer holds no list of members")
    version = document["version"]
    if not _is_version(version, at_least=0):
        raise EnrolmentError("the list of members has no version")
    members = {name: _key(key) for name, key in _mapping(document, "members").items()}
    added, revoked = (_versions(document, name, version) for name in ("added", "revoked"))
    if set(added) != set(members) or set(members) & set(revoked):
        raise EnrolmentError("the list of members contradicts itself")
    rotations = _rotations(document["rotations"])
    listed = SignedList(version, members, added, revoked, _key(document["witness"]), rotations)
    if len({*members.values(), listed.witness}) != len(members) + 1:
        raise EnrolmentError("the list of members holds one key twice")
    known = operator in lineage(listed.witness, WITNESS, rotations)
    if not known or not signed(listed.witness, listed.canonical(), signature):
        raise EnrolmentError("the operator whose key was pinned did not sign the list of members")
    try:
        check_rotations(rotations, {*members.values(), listed.witness})
    except IdentityError as error:
        raise EnrolmentError(f"the list of members: {error}") from None
    return listed


def _rotations(listed: object) -> tuple[Rotation, ...]:
    if not isinstance(listed, list):
        raise EnrolmentError("the list of members: 'rotations' is no list")
    try:
        return tuple(map(Rotation.from_document, listed))
    except IdentityError as error:
        raise EnrolmentError(f"the list of members: {error}") from None


def signed(key: bytes, message: bytes, signature: object) -> bool:
    """Tell whether a key signed a message; the signature in hexadecimal, as JSON has it."""
    if not isinstance(signature, str) or not _SIGNATURE.fullmatch(signature):
        return False
    return is_signed(key, message, bytes.fromhex(signature))


def _is_version(value: object, at_least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and at_least <= value < 2**53


def _mapping(document: dict[str, Any], name: str) -> dict[str, Any]:
    found = document[name]
    if not isinstance(found, dict) or not all(re.fullmatch(MERCHANT_ID, key) for key in found):
        raise EnrolmentError(f"the list of members: '{name}' does not map ids of merchants")
    return found


def _versions(document: dict[str, Any], name: str, most: int) -> dict[str, int]:
    found = _mapping(document, name)
    if not all(_is_version(value) and value <= most for value in found.values()):
        raise EnrolmentError(f"the list of members: '{name}' holds something else than versions")
    return found


def _key(text: object) -> bytes:
    if not isinstance(text, str) or not _HEX.fullmatch(text):
        raise EnrolmentError("the list of members holds a key that is not 64 hexadecimal digits")
    return bytes.fromhex(text)


@dataclass(frozen=True)
class Difference:
    """What a newer list says that the pinned one did not."""

    added: dict[str, bytes]
    removed: dict[str, bytes]
    changed: dict[str, tuple[bytes, bytes]]  # id -> pinned key, new key: nothing proves it
    rotated: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)  # signed by both keys
    operator: tuple[bytes, bytes] | None = None  # its pinned key and its new one, which both sign

    def __bool__(self) -> bool:
        merchants = self.added or self.removed or self.changed or self.rotated
        return bool(merchants or self.operator)


def difference(pinned: Members, version: int, listed: SignedList) -> Difference:
    """Compare a signed list with the pinned one.

    Args:
        pinned: The members that were accepted last.
        version: The version of the list that they came from.
        listed: The operator's list, whose signature was checked.

    Raises:
        EnrolmentError: It is older, another one of the same version, or names another witness.
    """
    if listed.version < version:
        raise EnrolmentError(
            f"the operator's list of members has version {listed.version}, older than the pinned "
            f"{version}: somebody shows you the past"
        )
    old, new, after = pinned.keys, listed.members, listed.pinned()
    if pinned.witness not in after.witnesses:
        raise EnrolmentError("the operator's list of members names another witness")
    others = {name: (old[name], new[name]) for name in new if new[name] != old.get(name, new[name])}
    rotated = {name: keys for name, keys in others.items() if keys[0] in after.keys_of(name)}
    found = Difference(
        {name: key for name, key in new.items() if name not in old},
        {name: key for name, key in old.items() if name not in new},
        {name: keys for name, keys in others.items() if name not in rotated},
        rotated,
        None if listed.witness == pinned.witness else (pinned.witness, listed.witness),
    )
    if found and listed.version == version:
        raise EnrolmentError(
            f"the operator's list of members is another one than the pinned, of the same version "
            f"{version}: ask the others which one they have"
        )
    return found
