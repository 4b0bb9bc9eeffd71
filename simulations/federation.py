"""The merchants of a simulation: from a built-in data set, or from a folder on disk."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from clients.joining import customers_of, open_worker
from clients.merchant import Columns, read_merchant
from clients.table import CustomerTable, make_table
from clients.worker import Worker
from common.contract import Contract, read_contract
from common.errors import DataError
from common.identity import read_members
from common.start import read_start
from simulations.datasets import Dataset
from simulations.members import Federation, Member, made_federation

_COLUMNS = Columns(customer="customer", person="person")


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
        DataError: A merchant's table cannot be used, or has more customers than there is room for.
    """
    tables = tables_of(dataset, contract)
    customers = {merchant: customers_of(table, contract) for merchant, table in tables.items()}
    made = made_federation(dataset.name, customers, contract, folder, seed, dataset.start)
    return replace(made, notes=(dataset.provenance,), tables=tables)


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
            o.worker,
            read_merchant(path).policy.min_cohort,
            partial(_reopened, path.absolute()),
        )
        for o, path in zip(opened, paths, strict=True)
    )
    seeds = {o.seed for o in opened if o.seed is not None}
    enrolled, seed = read_members(folder / "members.toml"), min(seeds, default=None)
    own = folder / "server"
    tables = {o.worker.merchant: o.table for o in opened}
    return Federation(
        str(folder), contract, members, enrolled, seed, (), own, start=start, tables=tables
    )


def _reopened(path: Path) -> Worker:
    return open_worker(path).worker
