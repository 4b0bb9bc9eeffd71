"""`merchant.toml` -> a worker that is ready to answer."""

from dataclasses import dataclass
from pathlib import Path

from clients.enrolment import enrolment, ledger_of, pinned
from clients.features import encode
from clients.merchant import read_merchant
from clients.secure_party import SecureParty
from clients.session_store import FileStore, MemoryStore
from clients.table import CustomerTable, read_table
from clients.worker import Customers, Worker, os_noise, seeded_noise
from common.contract import Contract, read_contract
from common.errors import IdentityError


def customers_of(table: CustomerTable, contract: Contract) -> Customers:
    """Return a table's customers as model inputs."""
    return Customers(encode(table, contract), table.labels, table.held_out)


@dataclass(frozen=True)
class Opened:
    """A merchant that is ready to take part."""

    worker: Worker
    table: CustomerTable
    seed: int | None  # of its noise; None for the operating system's


def open_worker(path: Path, *, in_memory: bool = False) -> Opened:
    """Read a merchant's file, its table, its contract and the list of members.

    The contract is the `contract.toml` that lies in the merchant's folder or, where the
    merchants of a simulation share one, two folders up; so is `members.toml`.

    Args:
        path: The `merchant.toml`.
        in_memory: Keep the state of secure sums in this process, for simulations, whose
            merchants live in one.

    Raises:
        HansaError: A file cannot be used; nothing is sent.
    """
    path = path.absolute()  # a relative path has no folders to go up to
    merchant = read_merchant(path)
    contract = read_contract(pinned(path.parent, "contract.toml"))
    identity, members = enrolment(merchant, path.parent)
    if not members.witness:
        raise IdentityError(
            f"{pinned(path.parent, 'members.toml')}: has no [witness] key; nothing is released "
            "without a witness of the ledger"
        )
    secure = None
    if contract.aggregation.secure:
        store = MemoryStore() if in_memory else FileStore(merchant.merchant.session, identity)
        minimum = max(contract.min_survivors, merchant.policy.min_cohort)
        secure = SecureParty(identity, members, minimum, store)
    table = read_table(merchant, contract)
    seed = merchant.simulation.seed
    worker = Worker(
        merchant.merchant.id,
        contract,
        customers_of(table, contract),
        ledger_of(merchant, identity, members),
        accept_unmasked_sums=merchant.policy.accept_unmasked_sums,
        secure=secure,
        noise_for=os_noise if seed is None else seeded_noise(seed, merchant.merchant.id),
        members_version=_members_version(path.parent),
    )
    return Opened(worker, table, seed)


def _members_version(folder: Path) -> int:
    """Return the version of the list of members that a merchant pinned; 0 if it did not enrol."""
    from clients.pinned import NAME, read_enrolment

    return read_enrolment(folder).members_version if (folder / NAME).is_file() else 0
