"""Keys that change: the operator's own, and a merchant's as the operator takes it over.

The witness learns of a rotation before the list of members does: else it would take the new
key's first head for a new ledger, and what was spent would be forgotten.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from common.contract import read_contract
from common.enrolment import contract_statement
from common.errors import IdentityError
from common.files import write_atomically
from common.identity import (
    Identity,
    Members,
    following_identity,
    members_toml,
    read_identity,
    read_members,
    replace_identity,
)
from common.rotation import (
    WITNESS,
    Rotation,
    begin_rotation,
    pending_rotation,
    rotated,
    sign_rotation,
)
from server.archive import COORDINATOR
from server.witness import Witness

KEY, PENDING = "server/identity.key", "server/identity.rotation.json"

Listed = Callable[[Rotation], None]  # writes a rotation into the list of members


def take_over(rotation: Rotation, members: Members, witness: Witness, listed: Listed) -> None:
    """Take a merchant's new key for its old one; once, later calls change nothing.

    The statement is all that is needed: nobody but the owner of both keys can make it.

    Args:
        rotation: The merchant's statement.
        members: The list of today.
        witness: Of the federation.
        listed: Writes the rotation into the list of members.

    Raises:
        IdentityError: A signature does not fit, or a key is not what the list says.
        ArchiveError: It cannot be written.
    """
    if rotation.merchant == WITNESS:
        raise IdentityError("this is a rotation of the operator's own key")
    rotated(members, rotation)
    witness.rotate(rotation)
    listed(rotation)


def list_in(path: Path) -> Listed:
    """Return what writes a rotation into a `members.toml` that no registry keeps."""

    def listed(rotation: Rotation) -> None:
        _write(path, members_toml(rotated(read_members(path), rotation)).encode())

    return listed


def rotate_operator(
    folder: Path, listed: Listed | None = None, now: Callable[[], float] = time.time
) -> Rotation:
    """Give the operator a new identity key, or finish a rotation that broke off.

    Nothing of the federation may run: a process with the old key countersigns nothing more.

    Args:
        folder: Of the federation.
        listed: Writes the rotation into the list of members; default: into `members.toml`.
        now: Seconds since 1970.

    Returns:
        The statement of both keys, which members need to trust the new one.

    Raises:
        HansaError: A file cannot be used or written; start again to finish.
    """
    path, pending = folder / KEY, folder / PENDING
    rotation, today = pending_rotation(pending), read_identity(COORDINATOR, path)
    new = _new_key(path, today, rotation)
    if rotation is None:
        rotation = sign_rotation(WITNESS, today, new, int(now()))
        rotated(
            read_members(folder / "members.toml"), rotation
        )  # refuses where members pinned another key
        begin_rotation(pending, rotation)
    Witness(folder / "server" / "witness.sqlite", today).rotate(rotation)
    (listed or list_in(folder / "members.toml"))(rotation)
    _sign_contract(folder, new)
    if today.public != new.public:
        replace_identity(path)
    with suppress(FileNotFoundError):
        pending.unlink()
    return rotation


def _new_key(path: Path, today: Identity, rotation: Rotation | None) -> Identity:
    """Return the new key; the one of today where it is in place already."""
    if rotation is not None and today.public == rotation.new:
        return today
    new = following_identity(COORDINATOR, path)
    if rotation is not None and (today.public, new.public) != (rotation.old, rotation.new):
        raise IdentityError(
            f"{path}: is not the key of the rotation that was begun, or the new key beside it was "
            "exchanged; put them back as they were"
        )
    return new


def _sign_contract(folder: Path, identity: Identity) -> None:
    """Sign the contract with the new key, where it was signed with the old one."""
    path = folder / "contract.sig"
    if path.is_file():
        statement = contract_statement(read_contract(folder / "contract.toml").sha256)
        _write(path, identity.sign(statement).hex().encode() + b"\n")


def _write(path: Path, content: bytes) -> None:
    try:
        write_atomically(path, content)
    except OSError as error:
        raise IdentityError(f"{path}: cannot be written ({error.strerror})") from None
