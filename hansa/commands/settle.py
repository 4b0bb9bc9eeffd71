"""`hansa merchant settle`: close a run that broke off."""

import time
from pathlib import Path

import typer

from clients.enrolment import enrolment, ledger_of, spent_by
from clients.forecast import Spending, freed_by_settling
from clients.merchant import read_merchant
from common.errors import LedgerError
from common.statements import epsilon_text
from simulations.wording import counted


def run(path: Path, name: str, *, yes: bool) -> None:
    """Say what would be free again, ask, and settle.

    Raises:
        IdentityError: The key or the list of members cannot be used.
        LedgerError: There is no such run, or the ledger was changed.
    """
    path = path.absolute()
    merchant = read_merchant(path)
    identity, members = enrolment(merchant, path.parent)
    spending = Spending(spent_by(merchant), time.time())
    own = spending.account.runs.get(name)
    if own is None:
        raise LedgerError(f"{merchant.ledger.path}: nothing is reserved for a run '{name[:64]}'")
    if own.settled:
        typer.echo(f"run {name} is settled already; nothing is freed")
        return
    before, after = freed_by_settling(spending, name)
    typer.echo(
        f"run {name} reserved epsilon {epsilon_text(spending.epsilon(own.reserved))} and wrote "
        f"{counted(len(own.released), 'release')} of epsilon "
        f"{epsilon_text(spending.epsilon(own.released.values()))} into the ledger"
    )
    typer.echo(
        f"settled, what counts goes from {epsilon_text(before)} to {epsilon_text(after)}; the run "
        "can release nothing more, even if it goes on elsewhere"
    )
    if not yes:
        typer.confirm("settle it?", abort=True)
    ledger = ledger_of(merchant, identity, members)
    try:
        ledger.settle(name)
    finally:
        ledger.close()
    spent = Spending(spent_by(merchant), time.time())
    counts, cap = epsilon_text(spent.epsilon(spent.counted)), merchant.policy.epsilon
    typer.echo(f"settled: epsilon {counts} of {epsilon_text(cap)} is spent")
