"""Merchants that exist in a simulation alone: model inputs -> workers that speak for them.

Nothing here knows where customers come from. `simulations.federation` makes them of tables;
whoever has arrays needs neither tables nor what reads them.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clients.secure_party import SecureParty
from clients.session_store import FileStore, MemoryStore, SessionStore
from clients.worker import Customers, Worker, os_noise, seeded_noise, too_many
from common.budget import Budget
from common.contract import Contract
from common.errors import DataError
from common.identity import MERCHANT_ID, Identity, Members
from common.ledger import Ledger
from common.start import starting_parameters
from server.archive import make_archive

if TYPE_CHECKING:
    from clients.table import CustomerTable

SESSION = "session.sealed"  # beside the ledger, where a made merchant's session is in a file


@dataclass(frozen=True)
class Member:
    """One simulated merchant, and the worker that speaks for it."""

    merchant: str
    worker: Worker
    min_cohort: int  # of its own policy
    elsewhere: Callable[[], Worker]  # picklable: makes the worker again, in another process


@dataclass(frozen=True)
class Federation:
    """All merchants of a simulation, under one contract.

    Attributes:
        tables: What each merchant's customers were made of, for those whose customers are to be
            assigned.
    """

    data: str
    contract: Contract
    members: tuple[Member, ...]
    enrolled: Members
    seed: int | None
    notes: tuple[str, ...]
    server: Path  # the coordinator's own folder
    durable: bool = True  # false where the merchants exist in this simulation alone
    start: bytes | None = None  # the parameters that the contract names, if it does
    tables: Mapping[str, "CustomerTable"] = field(default_factory=dict)


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


def made_federation(
    name: str,
    customers: Mapping[str, Customers],
    contract: Contract,
    folder: Path,
    seed: int | None,
    start: bytes | None = None,
) -> Federation:
    """Make merchants of their customers; every merchant's cap is the contract's epsilon.

    Args:
        name: What the whole is called.
        customers: Of each merchant.
        contract: What they agreed on, final.
        folder: New; gets `merchants/<merchant>/ledger.sqlite` and `server/`.
        seed: Makes the noise repeatable and guessable; None for the operating system's.
        start: The parameters that the contract names, if it does.

    Raises:
        ContractError: `start` does not hold the parameters that the contract starts from.
        DataError: An id is none, a merchant's arrays are not what the contract's model takes, or
            it has more customers than the contract has room for. Nothing is made.
    """
    starting_parameters(contract, start, f"{name}, what it starts from")
    for merchant, own in customers.items():
        if not re.fullmatch(MERCHANT_ID, merchant):
            raise DataError(
                f"{name}: expected ids of up to 64 letters, digits, dots, underscores and hyphens, "
                f"got '{merchant[:64]}'"
            )
        _check(own, contract, f"{name}/{merchant}")
    identities = {merchant: Identity.generate(merchant) for merchant in customers}
    keys = {merchant: identity.public for merchant, identity in identities.items()}
    enrolled = Members(keys, make_archive(folder / "server").public)
    seats = [
        _Seat(
            merchant,
            contract,
            own,
            (folder / "merchants" / merchant).absolute(),
            identities[merchant].key.private_bytes_raw(),
            enrolled,
            seed,
        )
        for merchant, own in customers.items()
    ]
    members = tuple(
        Member(seat.merchant, seat.worker(in_memory=True), contract.min_survivors, seat.worker)
        for seat in seats
    )
    return Federation(
        name,
        contract,
        members,
        enrolled,
        seed,
        notes=(),
        server=folder / "server",
        durable=False,
        start=None if contract.model.start is None else start,
    )


def _check(customers: Customers, contract: Contract, source: str) -> None:
    """Raise a DataError unless customers are what the contract's model takes."""
    labels, segments = customers.labels, len(contract.segments.names)
    rows = len(labels)
    reason = too_many(rows, contract)
    if reason:
        raise DataError(f"{source}: {reason}")
    shapes = customers.inputs.shape, labels.shape, customers.held_out.shape
    if shapes != ((rows, contract.inputs), (rows,), (rows,)):
        raise DataError(
            f"{source}: expected {contract.inputs} inputs, one label and one side of the split for "
            f"each customer, got the shapes {', '.join(map(str, shapes))}"
        )
    kinds = customers.inputs.dtype.kind, labels.dtype.kind, customers.held_out.dtype.kind
    if kinds not in {("f", "i", "b"), ("f", "u", "b")}:
        raise DataError(f"{source}: expected inputs as float, labels as integer, held_out as bool")
    if not (np.abs(customers.inputs) <= 1.0).all():  # true of no NaN
        raise DataError(f"{source}: expected inputs between -1 and 1, as `clients.features` makes")
    if not ((labels >= -1) & (labels < segments)).all():
        raise DataError(f"{source}: expected labels from 0 to {segments - 1}, or -1 if not known")
