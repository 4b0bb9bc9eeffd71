"""`hansa audit empirical`: measure the code that a merchant runs, and say PASS or FAIL."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ContractError
from common.statements import epsilon_text

if TYPE_CHECKING:
    from rich.console import Console

    from audit.empirical import Empirical
    from common.contract import Contract

_EXAMPLE: dict[str, Any] = {
    "federation": {"name": "an example", "min_merchants": 6},
    "features": [
        {"name": "spend", "high": 5000.0, "transform": "log1p"},
        {"name": "visits", "high": 200.0, "transform": "sqrt"},
        {"name": "channel", "kind": "category", "categories": ["shop", "web"]},
    ],
    "segments": {"names": ["low", "middle", "high"]},
    "privacy": {"epsilon": 1.0, "delta": 1e-5},
}


def empirical(  # noqa: PLR0913, PLR0917
    contract: Annotated[
        Path | None,
        typer.Argument(help="The contract to audit under; default a small example."),
    ] = None,
    merchant: Annotated[
        Path | None,
        typer.Option(
            "--merchant",
            help="A merchant.toml: audit under the contract that lies beside it. Its customers "
            "and its ledger are not touched.",
        ),
    ] = None,
    epsilon: Annotated[
        float | None, typer.Option("--epsilon", help="Claim another epsilon than the contract.")
    ] = None,
    canaries: Annotated[
        int | None,
        typer.Option(
            "--canaries",
            min=100,
            max=2048,
            help="Planted customers; default 1,000, from epsilon 6 on 2,000.",
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only test the mechanism; train nothing.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Makes the audit repeatable; the real source of noise is then not tested.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option("--json", help="Also write the result as JSON; - for the terminal."),
    ] = None,
) -> None:
    """Measure the real training code on generated customers: does it keep what epsilon claims?

    Exit code 0: PASS, 1: FAIL, 2: wrong use.
    """
    run(_contract(contract, merchant, epsilon), canaries, quick=quick, seed=seed, json=json)


def run(
    contract: "Contract",
    canaries: int | None = None,
    *,
    quick: bool = False,
    seed: int | None = None,
    json: Path | None = None,
) -> None:
    """Audit, print the verdict, write the JSON.

    Raises:
        typer.Exit: The verdict is FAIL (code 1).
        HansaError: The audit cannot be made.
    """
    from rich.console import Console

    console = Console(stderr=str(json) == "-")
    with console.status("loading the training code") as status:
        from audit.empirical import document_of, empirical_audit
        from simulations.audited import RealSubject

        with RealSubject() as subject:
            audit = empirical_audit(
                subject,
                contract,
                canaries,
                mechanism_only=quick,
                seed=seed,
                on_stage=status.update,
            )
    _show(audit, console)
    if json is not None:
        from hansa.commands.choose import write_json

        write_json(document_of(audit), json)
    if audit.failures:
        raise typer.Exit(1)


def _contract(path: Path | None, merchant: Path | None, epsilon: float | None) -> "Contract":
    """Return what is claimed.

    Raises:
        ContractError: Both a contract and a merchant are named, or a file cannot be used.
    """
    if path is not None and merchant is not None:
        raise ContractError("--merchant: names the contract already; leave the other one out")
    if merchant is not None:
        from clients.enrolment import pinned
        from clients.merchant import read_merchant

        read_merchant(merchant.absolute())
        path = pinned(merchant.absolute().parent, "contract.toml")
    from common.contract import parse_contract, read_contract

    contract = parse_contract(_EXAMPLE, source="example") if path is None else read_contract(path)
    if epsilon is None:
        return contract
    return contract.revised("--epsilon", privacy={"epsilon": epsilon})


def _show(audit: "Empirical", console: "Console") -> None:
    from rich.text import Text

    from audit.empirical import LIMITS, SEEDED
    from hansa.commands.tables import Column, show

    rows = [
        (
            check.name,
            f"{check.statistic:.6g}",
            f"{'at most ' if check.p_value is None else ''}{check.expected:.6g}",
            "" if check.p_value is None else f"{check.p_value:.2g}",
            "ok" if check.passed else Text("FAIL", style="red"),
        )
        for check in audit.checks
    ]
    figures = map(Column, ("Found", "Expected", "p-value", "Result"))
    show(console, "Tests of the mechanism", [Column("Test", figures=False), *figures], rows)
    for text in _told(audit):
        console.print(text, highlight=False, markup=False)
    colour = "red" if audit.failures else "green"
    console.print(f"[bold {colour}]{audit.verdict}[/bold {colour}]")
    console.print(LIMITS if not audit.seeded else f"{LIMITS} {SEEDED}", highlight=False)


def _told(audit: "Empirical") -> list[str]:
    """Return the bound, and what failed."""
    from audit.bench import FALSE_ALARM

    privacy, one_run = audit.contract.privacy, audit.one_run
    lines = [
        f"{sum(check.passed for check in audit.checks)} of {len(audit.checks)} tests passed in "
        f"{audit.seconds[0]:.1f} s; chance of a false alarm {FALSE_ALARM:g}"
    ]
    if one_run is not None:
        lines += [
            f"Claimed      epsilon {epsilon_text(privacy.epsilon)} at delta {privacy.delta:.3g}",
            f"Lower bound  epsilon {one_run.bound.epsilon:.2f}, with confidence "
            f"{one_run.confidence:.0%}: {one_run.canaries:,} canaries in {one_run.rounds} rounds, "
            f"{one_run.bound.right} of {one_run.bound.guesses} guesses right",
        ]
    return [*lines, *(f"FAIL  {failure}" for failure in audit.failures)]
