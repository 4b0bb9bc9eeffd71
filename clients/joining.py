"""`merchant.toml` -> a worker that is ready to answer."""

from dataclasses import dataclass
from pathlib import Path

from clients.features import encode
from clients.merchant import Merchant, read_merchant
from clients.table import CustomerTable, read_table
from clients.worker import Customers, Worker, os_noise, seeded_noise
from common.contract import Contract, read_contract
from common.ledger import Budget, Ledger


def customers_of(table: CustomerTable, contract: Contract) -> Customers:
    """Return a table's customers as model inputs."""
    return Customers(encode(table, contract), table.labels, table.held_out)


def budget_of(merchant: Merchant) -> Budget:
    """Return the caps of a merchant's own policy."""
    policy = merchant.policy
    return Budget(policy.epsilon, policy.delta, policy.epsilon_towards_server)


@dataclass(frozen=True)
class Opened:
    """A merchant that is ready to take part."""

    worker: Worker
    table: CustomerTable
    seed: int | None  # of its noise; None for the operating system's


def open_worker(path: Path) -> Opened:
    """Read a merchant's file, its table and its contract.

    The contract is the `contract.toml` that lies in the merchant's folder or, where the
    merchants of a simulation share one, two folders up.

    Raises:
        HansaError: A file cannot be used; nothing is sent.
    """
    path = path.absolute()  # a relative path has no folders to go up to
    merchant = read_merchant(path)
    own = path.parent / "contract.toml"
    contract = read_contract(own if own.is_file() else path.parent.parent.parent / "contract.toml")
    table = read_table(merchant, contract)
    seed = merchant.simulation.seed
    worker = Worker(
        merchant.merchant.id,
        contract,
        customers_of(table, contract),
        Ledger(merchant.ledger.path, budget_of(merchant)),
        accept_unmasked_sums=merchant.policy.accept_unmasked_sums,
        noise_for=os_noise if seed is None else seeded_noise(seed, merchant.merchant.id),
    )
    return Opened(worker, table, seed)
