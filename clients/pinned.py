"""What a merchant pinned when it enrolled: `enrolment.json`, beside contract and members."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from clients.operator_link import Operator
from common.enrolment import is_gateway_url
from common.errors import IdentityError
from common.files import write_together

NAME = "enrolment.json"
_FIELDS: dict[str, type] = {
    "format": int,
    "url": str,
    "ca_pem": str,
    "operator": str,
    "contract": str,
    "members_version": int,
    "merchant": str,
    "enrolled_at": float,
}


@dataclass(frozen=True)
class Enrolment:
    """What `enrolment.json` holds: no secret."""

    url: str
    ca_pem: str  # the authority, and while it is replaced the one that follows
    operator: str  # public key, hexadecimal
    contract: str  # SHA-256
    members_version: int
    merchant: str
    enrolled_at: float

    def content(self) -> bytes:
        """Return the file's content."""
        return json.dumps({"format": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @property
    def operator_key(self) -> bytes:
        """Return the operator's public key."""
        return bytes.fromhex(self.operator)

    @property
    def link(self) -> Operator:
        """Return the way to the operator."""
        return Operator(self.url, self.ca_pem)


def read_enrolment(folder: Path) -> Enrolment:
    """Read what a merchant pinned of its operator.

    Raises:
        IdentityError: It is not enrolled, or the file was changed.
    """
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise IdentityError(
            f"{path}: there is none: not enrolled yet; ask the operator for a token, then run "
            "hansa merchant enrol"
        ) from None
    except (OSError, ValueError, RecursionError):
        raise IdentityError(f"{path}: cannot be read as JSON") from None
    if (
        not isinstance(found, dict)
        or set(found) != set(_FIELDS)
        or not all(isinstance(found[name], kind) for name, kind in _FIELDS.items())
        or found.pop("format") != 1
        or not is_gateway_url(found["url"])
    ):
        raise IdentityError(f"{path}: does not hold what an enrolment holds")
    return Enrolment(**found)


def pin(contents: dict[Path, bytes]) -> None:
    """Write files into a merchant's folder, all or none.

    Raises:
        IdentityError: One cannot be written; all are as they were.
    """
    try:
        write_together(contents)
    except OSError as error:
        where = error.filename or next(iter(contents))
        raise IdentityError(f"{where}: cannot be written ({error.strerror})") from None
