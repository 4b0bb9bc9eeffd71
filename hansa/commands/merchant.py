"""`hansa merchant`: what a merchant does with its own customers, on its own machine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from clients.merchant import Merchant
    from common.contract import Contract

app = typer.Typer(help="Check your table, assign your customers.", no_args_is_help=True)

FileArgument = Annotated[Path, typer.Argument(help="Your merchant.toml.")]


@app.command()
def check(
    merchant_file: FileArgument,
    contract: Annotated[Path, typer.Option(help="The federation's contract.")],
) -> None:
    """Read your table as a run would, say what was found and whether you could take part.

    Nothing is sent. Exit code 1 where a run would be refused by your policy or your ledger.
    """
    from clients.merchant import read_merchant
    from clients.table import read_table
    from common.contract import read_contract
    from common.plan import planned_epsilon

    agreed = read_contract(contract)
    merchant = read_merchant(merchant_file)
    table = read_table(merchant, agreed)
    known = int((table.labels >= 0).sum())
    typer.echo(
        f"{len(table.labels):,} customers, {known:,} with a segment, "
        f"{int((table.held_out & (table.labels >= 0)).sum()):,} of them held out"
    )
    for feature, customers in table.out_of_bounds.items():
        if customers:
            typer.echo(f"{feature}: {customers:,} customers outside the contract's bounds, clipped")
    typer.echo(
        f"a run under this contract costs epsilon {planned_epsilon(agreed):.4g} at delta "
        f"{agreed.privacy.delta:.3g}; your cap is epsilon {merchant.policy.epsilon:.4g} at delta "
        f"{merchant.policy.delta:.3g}"
    )
    if not agreed.aggregation.secure and not merchant.policy.accept_unmasked_sums:
        typer.echo("your policy refuses this contract: its sums are not masked")
        raise typer.Exit(1)
    _check_budget(merchant, agreed)


def _check_budget(merchant: "Merchant", contract: "Contract") -> None:
    """Say what is left, and end with exit code 1 where a run would pass the cap."""
    from common.accounting import epsilon
    from common.errors import BudgetRefusal
    from common.ledger import Budget, Ledger
    from common.plan import plan_of

    cap, delta, events = merchant.policy.epsilon, merchant.policy.delta, plan_of(contract).events()
    if not merchant.ledger.path.exists():  # a check makes no file
        after = epsilon(events, delta)
        if after <= cap * (1 + 1e-9):
            return
        typer.echo(f"your policy refuses this contract: at your delta it costs epsilon {after:.4g}")
        raise typer.Exit(1)
    ledger = Ledger(merchant.ledger.path, Budget(cap, delta))
    try:
        ledger.check_affordable(events)
    except BudgetRefusal as refusal:
        typer.echo(f"your ledger refuses this contract: {refusal}")
        raise typer.Exit(1) from None
    finally:
        ledger.close()


@app.command()
def assign(
    bundle: Annotated[Path, typer.Argument(help="The published bundle.")],
    merchant_file: FileArgument,
    out: Annotated[Path, typer.Option(help="Folder for assignments.parquet and .csv.")],
) -> None:
    """Assign your customers to segments with a published model. Nothing is sent."""
    from clients.assignment import assign as assign_customers
    from clients.assignment import write_assignments
    from clients.merchant import read_merchant
    from clients.table import read_table
    from common.bundle import read_bundle

    published = read_bundle(bundle)
    table = read_table(read_merchant(merchant_file), published.contract)
    write_assignments(assign_customers(published, table), out)
    typer.echo(f"{len(table.labels):,} customers assigned, in {out}")
