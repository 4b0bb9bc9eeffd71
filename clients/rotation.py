"""A merchant changes its identity key; its ledger goes on, with all that was spent.

In this order, each step once, and none lost where the next one fails:

    identity.key.next        the new key, made here
    identity.rotation.json   the statement of both keys: from here on the rotation is under way
    the operator             takes the new key for the old one, in its list and as its witness
    ledger.sqlite            is handed over; the old key opens it no more
    identity.key             is the new key; the old one is kept as identity.key.<n>
    members.toml             names the new key, with the statement

What breaks off is finished by starting it again. Until then the merchant takes part in nothing.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clients.enrolment import ledger_of
from clients.merchant import Merchant, read_merchant
from clients.pinned import read_enrolment
from common.enrolment import parse_list
from common.errors import EnrolmentError, IdentityError, LedgerError
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
from common.ledger import Ledger
from common.rotation import Rotation, begin_rotation, pending_rotation, rotated, sign_rotation

FILE, PENDING = "merchant.toml", "identity.rotation.json"

Tell = Callable[[Rotation], None]


@dataclass(frozen=True)
class _Keys:
    """Both identities of a rotation; the old one is the new one where that is in place already."""

    old: Identity
    new: Identity


def rotate_identity(folder: Path, tell: Tell, now: Callable[[], float] = time.time) -> Rotation:
    """Give a merchant a new identity key, or finish a rotation that broke off.

    Args:
        folder: The merchant's, with its own `members.toml`.
        tell: Tells the operator, who may refuse; called again where a rotation is finished.
        now: Seconds since 1970.

    Returns:
        The statement of both keys.

    Raises:
        HansaError: A file cannot be used, or the operator refuses: then nothing was changed, but
            for the files of the rotation itself.
    """
    merchant = read_merchant(folder / FILE)
    listed = folder / "members.toml"
    members, pending = _own_list(listed), folder / PENDING
    rotation = pending_rotation(pending)
    keys = _keys(merchant, rotation)
    if rotation is None:
        name = merchant.merchant.id
        rotation = sign_rotation(name, keys.old, keys.new, int(now()))
        after = rotated(members, rotation)  # refuses where the list names another key
        begin_rotation(pending, rotation)
    else:
        after = rotated(members, rotation)
    ledger = _ledger(merchant, members, keys)
    try:
        tell(rotation)
        if ledger.identity.public != keys.new.public:
            ledger.rekey(keys.new)
    finally:
        ledger.close()
    if keys.old.public != keys.new.public:
        replace_identity(merchant.merchant.key)
    _finish(merchant, after, listed, pending)
    return rotation


def _own_list(path: Path) -> Members:
    if not path.is_file():
        raise IdentityError(
            f"{path}: there is none; a merchant that changes its key has a list of its own: enrol "
            "first, or put a copy of the list that you share here"
        )
    return read_members(path)


def _keys(merchant: Merchant, rotation: Rotation | None) -> _Keys:
    """Return the key of today and the new one, which is the same where it is in place already.

    Raises:
        IdentityError: A key is missing, or is none of the rotation that is under way.
    """
    name, path = merchant.merchant.id, merchant.merchant.key
    today = read_identity(name, path)
    if rotation is not None and today.public == rotation.new:
        return _Keys(today, today)
    new = following_identity(name, path)
    if rotation is not None and (today.public, new.public) != (rotation.old, rotation.new):
        raise IdentityError(
            f"{path}: is not the key of the rotation that was begun, or the new key beside it was "
            f"exchanged; if that rotation shall be given up, move {PENDING} and "
            f"{path.name}.next away"
        )
    return _Keys(today, new)


def _ledger(merchant: Merchant, members: Members, keys: _Keys) -> Ledger:
    """Open the ledger with the key that it has now; make it where there is none yet.

    A ledger tells of every rotation from the beginning, so that no second one can stand for it.
    """
    found: list[LedgerError] = []
    for identity in dict.fromkeys((keys.old, keys.new)):
        try:
            return ledger_of(merchant, identity, members)
        except LedgerError as error:
            found.append(error)
    raise found[0]


def _finish(merchant: Merchant, members: Members, listed: Path, pending: Path) -> None:
    try:
        write_atomically(listed, members_toml(members).encode())
        merchant.merchant.session.unlink(missing_ok=True)  # sealed with the old key
    except OSError as error:
        raise IdentityError(f"{error.filename}: cannot be written ({error.strerror})") from None
    with suppress(FileNotFoundError):
        pending.unlink()


def tell_operator(folder: Path) -> Tell:
    """Return what tells the operator that an enrolled merchant pinned.

    Raises:
        IdentityError: The merchant is not enrolled.
    """
    enrolment = read_enrolment(folder)

    def tell(rotation: Rotation) -> None:
        answer = enrolment.link.ask("identity", {"rotation": rotation.document})
        key = enrolment.operator_key
        listed = parse_list(answer.get("list"), answer.get("signature"), key)
        if listed.members.get(enrolment.merchant) != rotation.new:
            raise EnrolmentError("the operator's list of members does not hold your new key")

    return tell
