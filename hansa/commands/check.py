"""`hansa merchant check`: could this merchant take part, and if not, what is to be done."""

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from clients.enrolment import pinned
from clients.merchant import read_merchant
from common.contract import read_contract
from common.errors import ContractError

if TYPE_CHECKING:
    from clients.merchant import Merchant
    from common.contract import Contract


def run(path: Path, contract: Path | None) -> None:
    """Print what was found; end with exit code 1 where something would stop a run.

    Raises:
        HansaError: The merchant's file, table, contract or keys cannot be used.
    """
    file = path / "merchant.toml" if path.is_dir() else path
    folder = file.absolute().parent
    merchant = read_merchant(file)
    agreed = read_contract(_contract(folder, contract))
    stopped = _tell_findings(folder, merchant, agreed)
    _check_table(merchant, agreed)
    _tell_cost(merchant, agreed)
    if not agreed.aggregation.secure and not merchant.policy.accept_unmasked_sums:
        typer.echo("your policy refuses this contract: its sums are not masked")
        raise typer.Exit(1)
    _check_enrolled(merchant, folder, agreed)
    if agreed.aggregation.secure:
        _check_secure(merchant, agreed)
    _check_budget(merchant, agreed)
    if stopped:
        typer.echo("but what is marked STOP above would stop a run")
        raise typer.Exit(1)


def _contract(folder: Path, stated: Path | None) -> Path:
    if stated is not None:
        return stated
    found = pinned(folder, "contract.toml")
    if not found.is_file():
        raise ContractError(
            f"{folder}: has pinned no contract yet; name one with --contract, or enrol first"
        )
    return found


def _tell_findings(folder: Path, merchant: "Merchant", contract: "Contract") -> bool:
    """Print how an enrolled merchant stands; return whether anything would stop a run."""
    from clients.checking import Level, findings
    from clients.pinned import NAME

    if not (folder / NAME).is_file():
        return False
    found = findings(folder, merchant, contract)
    for finding in found:
        typer.echo(f"{finding.level:<5} {finding.what}")
        if finding.do:
            typer.echo(f"      -> {finding.do}")
    return any(finding.level is Level.STOP for finding in found)


def _check_table(merchant: "Merchant", contract: "Contract") -> None:
    """Read the table as a run would and say what is in it."""
    from clients.table import read_table

    table = read_table(merchant, contract)
    known = int((table.labels >= 0).sum())
    typer.echo(
        f"{len(table.labels):,} customers, {known:,} with a segment, "
        f"{int((table.held_out & (table.labels >= 0)).sum()):,} of them held out"
    )
    for feature, customers in table.out_of_bounds.items():
        if customers:
            typer.echo(f"{feature}: {customers:,} customers outside the contract's bounds, clipped")


def _tell_cost(merchant: "Merchant", contract: "Contract") -> None:
    """Say what a run costs, towards whom, and what the merchant allows."""
    from common.plan import planned_epsilon, planned_epsilon_towards_server
    from common.statements import epsilon_text

    sums, policy = epsilon_text(planned_epsilon(contract)), merchant.policy
    server = epsilon_text(planned_epsilon_towards_server(contract))
    cap = policy.epsilon_towards_server
    towards = (
        f"{sums} towards whoever sees sums, the server included"
        if contract.aggregation.secure
        else f"{sums} towards whoever sees sums and {server} towards the server"
    )
    typer.echo(
        f"a run under this contract costs epsilon {towards}, at delta {contract.privacy.delta:.3g}"
    )
    typer.echo(
        f"your cap over all runs is epsilon {policy.epsilon:.4g} towards whoever sees sums and "
        f"{'not stated' if cap is None else f'{cap:.4g}'} towards the server, at delta "
        f"{policy.delta:.3g}"
    )


def _check_enrolled(merchant: "Merchant", folder: Path, contract: "Contract") -> None:
    """End with exit code 1 where no witness is pinned, without whom nothing is released.

    Raises:
        IdentityError: Its key or the list of members cannot be used, or they do not agree.
    """
    from clients.enrolment import enrolment
    from simulations.wording import counted

    _, members = enrolment(merchant, folder)
    counted_on = contract.federation.min_merchants
    short = "" if len(members.keys) >= counted_on else f"; the contract counts on {counted_on:,}"
    typer.echo(
        f"its sums are {'masked' if contract.aggregation.secure else 'not masked'}; your key is "
        f"enrolled, in a list of {counted(len(members.keys), 'merchant')}{short}"
    )
    if not members.witness:
        typer.echo(
            "your list of members has no [witness] key: you would release nothing; ask the "
            "coordinator for it (hansa server init writes it into members.toml)"
        )
        raise typer.Exit(1)


def _check_secure(merchant: "Merchant", contract: "Contract") -> None:
    """End with exit code 1 where this merchant would help to unmask no sum."""
    from common.contract import MAX_COHORT

    asked, counted_on = merchant.policy.min_cohort, contract.federation.min_merchants
    largest = -(-counted_on // -(-counted_on // MAX_COHORT))
    if asked > largest:
        typer.echo(
            f"your policy refuses this contract: you help to unmask sums over at least {asked} "
            f"merchants (policy.min_cohort), it counts on {largest}"
        )
        raise typer.Exit(1)
    typer.echo(
        f"you help to unmask sums over at least {max(asked, contract.min_survivors)} merchants; "
        "this hides your part as long as fewer than a third of them collude with the server"
    )


def _check_budget(merchant: "Merchant", contract: "Contract") -> None:
    """End with exit code 1 where a run would pass a cap, with all that was spent before."""
    import time

    from clients.enrolment import spent_by
    from clients.forecast import Spending
    from common.plan import plan_of

    charges = plan_of(contract).charges(contract.exposed_contributors)
    refusal = Spending(spent_by(merchant), time.time()).refusal_of(charges)
    if refusal:
        typer.echo(f"your ledger refuses this contract: the run {refusal}")
        raise typer.Exit(1)
    typer.echo("a run under this contract would be accepted")
