"""The merchants of a simulation: from a built-in data set, or from a folder on disk."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from clients.joining import customers_of, open_worker
from clients.merchant import Columns, read_merchant
from clients.secure_party import SecureParty
from clients.session_store import FileStore, MemoryStore, SessionStore
from clients.table import CustomerTable, make_table
from clients.worker import Customers, Worker, os_noise, seeded_noise
from common.budget import Budget
from common.contract import Contract, read_contract
from common.errors import DataError
from common.identity import Identity, Members, read_members
from common.ledger import Ledger
from common.start import read_start, starting_parameters
from server.archive import make_archive
from simulations.datasets import Dataset

SESSION = "session.sealed"  # beside the ledger, where a made merchant's session is in a file
_COLUMNS = Columns(customer="customer", person="person")


@dataclass(frozen=True)
class Member:
    """One simulated merchant: its table, and the worker that speaks for it."""

    merchant: str
    table: CustomerTable
    worker: Worker
    min_cohort: int  # of its own policy
    elsewhere: Callable[[], Worker]  # picklable: makes the worker again, in another process


@dataclass(frozen=True)
class Federation:
    """All merchants of a simulation, under one contract."""

    data: str
    contract: Contract
    members: tuple[Member, ...]
    enrolled: Members
    seed: int | None
    notes: tuple[str, ...]
    server: Path  # the coordinator's own folder
    durable: bool = True  # false where the merchants exist in this simulation alone
    start: bytes | None = None  # the parameters that the contract names, if it does


@dataclass(frozen=True)
class _Seat:
    """All that the worker of a made merchant is made of; any process can make it again."""

    merchant: str
    contract: Contract
    customers: Customers
    folder: Path  # of the ledger, absolute: other processes may be at home elsewhere
    private: bytes = field(repr=False)
    enrolled: Members
    seed: int | None

    def worker(self, *, in_memory: bool = False) -> Worker:
        """Return the worker; between two messages it keeps its session in memory, or in a file."""
        contract = self.contract
        identity = Identity.of(self.merchant, self.private)
        store: SessionStore = MemoryStore()
        if not in_memory:
            store = FileStore(self.folder / SESSION, identity)
        return Worker(
            self.merchant,
            contract,
            self.customers,
            Ledger(
                self.folder / "ledger.sqlite",
                Budget(contract.privacy.epsilon, contract.privacy.delta),
                identity,
                self.enrolled.witness,
                durable=False,
            ),
            accept_unmasked_sums=not contract.aggregation.secure,
            secure=SecureParty(identity, self.enrolled, contract.min_survivors, store),
            noise_for=os_noise if self.seed is None else seeded_noise(self.seed, self.merchant),
        )


def tables_of(dataset: Dataset, contract: Contract) -> dict[str, CustomerTable]:
    """Return every merchant's validated table."""
    return {
        merchant: make_table(frame, contract, source=f"{dataset.name}/{merchant}", columns=_COLUMNS)
        for merchant, frame in dataset.merchants.items()
    }


def training_customers(tables: Sequence[CustomerTable]) -> int:
    """Return the pooled number of training customers, N: known to a simulator only."""
    return sum(int(((~table.held_out) & (table.labels >= 0)).sum()) for table in tables)


def public_delta(customers: int) -> float:
    """Return delta = 1 / N^1.1, at most 0.01, rounded down to one digit.

    The contract is published, and all digits of delta would tell N to the customer.

    >>> public_delta(4443)
    9e-05
    """
    delta = min(0.01, max(customers, 2) ** -1.1)
    digit = 10.0 ** math.floor(math.log10(delta))
    return float(f"{math.floor(delta / digit * (1 + 1e-9)) * digit:.0e}")


def assemble(dataset: Dataset, contract: Contract, folder: Path, seed: int | None) -> Federation:
    """Make a federation of a data set; every merchant's cap is the contract's epsilon.

    Args:
        dataset: The merchants' customers.
        contract: What they agreed on, final.
        folder: New; gets `merchants/<merchant>/ledger.sqlite` and `server/`.
        seed: Makes the noise repeatable and guessable; None for the operating system's.

    Raises:
        ContractError: The data set does not hold the parameters that the contract starts from.
    """
    starting_parameters(contract, dataset.start, f"{dataset.name}, what it starts from")
    tables = tables_of(dataset, contract)
    identities = {merchant: Identity.generate(merchant) for merchant in tables}
    keys = {merchant: identity.public for merchant, identity in identities.items()}
    enrolled = Members(keys, make_archive(folder / "server").public)
    seats = [
        _Seat(
            merchant,
            contract,
            customers_of(table, contract),
            (folder / "merchants" / merchant).absolute(),
            identities[merchant].key.private_bytes_raw(),
            enrolled,
            seed,
        )
        for merchant, table in tables.items()
    ]
    members = tuple(
        Member(
            seat.merchant,
            tables[seat.merchant],
            seat.worker(in_memory=True),
            contract.min_survivors,
            seat.worker,
        )
        for seat in seats
    )
    notes = (dataset.provenance,)
    server = folder / "server"
    return Federation(
        dataset.name,
        contract,
        members,
        enrolled,
        seed,
        notes,
        server,
        durable=False,
        start=None if contract.model.start is None else dataset.start,
    )


def open_federation(folder: Path) -> Federation:
    """Open `contract.toml` and `merchants/*/merchant.toml` as their files say.

    Ledgers are the merchants' own and stay where they are: budgets are spent for good.

    Raises:
        DataError: The folder holds no federation.
        HansaError: A file of it cannot be used.
    """
    paths = sorted(folder.glob("merchants/*/merchant.toml"))
    if not paths or not (folder / "contract.toml").is_file():
        raise DataError(
            f"{folder}: holds no federation; expected contract.toml and "
            "merchants/<id>/merchant.toml, as `hansa data generate` writes them"
        )
    contract = read_contract(folder / "contract.toml")
    start = read_start(folder / "contract.toml", contract)
    opened = [open_worker(path, in_memory=True) for path in paths]
    names = [o.worker.merchant for o in opened]
    for name, path in zip(names, paths, strict=True):
        if names.count(name) > 1:
            raise DataError(f"{path}: the id '{name}' is used by another merchant too; change one")
    members = tuple(
        Member(
            o.worker.merchant,
            o.table,
            o.worker,
            read_merchant(path).policy.min_cohort,
            partial(_reopened, path.absolute()),
        )
        for o, path in zip(opened, paths, strict=True)
    )
    seeds = {o.seed for o in opened if o.seed is not None}
    enrolled, seed = read_members(folder / "members.toml"), min(seeds, default=None)
    own = folder / "server"
    return Federation(str(folder), contract, members, enrolled, seed, (), own, start=start)


def _reopened(path: Path) -> Worker:
    return open_worker(path).worker
