"""What a merchant pinned and allows, read from its folder; light, without rows or torch."""

from pathlib import Path

from clients.merchant import Merchant
from common.budget import Account, Budget
from common.errors import IdentityError
from common.identity import Identity, Members, read_identity, read_members
from common.ledger import Ledger
from common.ledger_entries import read_ledger


def budget_of(merchant: Merchant) -> Budget:
    """Return the caps of a merchant's own policy."""
    policy = merchant.policy
    return Budget(
        policy.epsilon,
        policy.delta,
        policy.epsilon_towards_server,
        policy.refresh_days,
        tuple(sorted(policy.purposes.items())),
    )


def pinned(folder: Path, name: str) -> Path:
    """Return where a file lies that a merchant pinned: beside its own or, shared, two up."""
    own = folder / name
    return own if own.is_file() else folder.parent.parent / name


def enrolment(merchant: Merchant, folder: Path) -> tuple[Identity, Members]:
    """Return a merchant's identity and the list of members that it pinned.

    Args:
        merchant: What its file says.
        folder: Where that file lies.

    Raises:
        IdentityError: Its key or the list is missing, or they do not agree.
    """
    identity = read_identity(merchant.merchant.id, merchant.merchant.key)
    listed = pinned(folder, "members.toml")
    members = read_members(listed)
    if members.keys.get(identity.merchant) != identity.public:
        raise IdentityError(
            f"{listed}: '{identity.merchant}' is not enrolled with the key in "
            f"{merchant.merchant.key}"
        )
    return identity, members


def ledger_of(merchant: Merchant, identity: Identity, members: Members) -> Ledger:
    """Open a merchant's ledger, with the witness that it pinned and that one's earlier keys.

    Raises:
        LedgerError: The file cannot be used, or is not of this key.
    """
    return Ledger(
        merchant.ledger.path,
        budget_of(merchant),
        identity,
        members.witness,
        previous=members.witnesses[:-1],
    )


def spent_by(merchant: Merchant) -> Account:
    """Return what a merchant's ledger adds up to; nothing is written.

    Raises:
        IdentityError: Its key cannot be used.
        LedgerError: The ledger was changed, or is another merchant's.
    """
    budget = budget_of(merchant)
    if not merchant.ledger.path.exists():
        return Account(budget)
    identity = read_identity(merchant.merchant.id, merchant.merchant.key)
    return read_ledger(merchant.ledger.path, budget, identity.public).account
