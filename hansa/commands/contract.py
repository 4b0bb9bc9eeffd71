"""`hansa contract`: check a contract and show what a run under it would release."""

from pathlib import Path

from common.contract import read_contract
from common.plan import plan_of, planned_epsilon, planned_epsilon_towards_server
from common.start import read_start, start_path
from common.statements import epsilon_text


def run(path: Path) -> None:
    """Print hash, shape, releases and epsilon of a contract.

    Raises:
        ContractError: The contract is not valid, or what lies beside it is not what it names.
    """
    from rich.console import Console
    from rich.table import Table

    contract = read_contract(path)
    plan, console = plan_of(contract), Console()
    console.print(f"{path}: valid", markup=False)
    console.print(f"SHA-256 {contract.sha256}", highlight=False)
    console.print(
        f"{contract.inputs} inputs, {len(contract.segments.names)} segments, "
        f"{plan.update.length} parameters, at least {contract.min_survivors} merchants a sum",
        highlight=False,
    )
    if contract.model.start is not None:
        beside = start_path(path)
        there = beside.exists()
        if there:
            read_start(path, contract)
        state = "fits" if there else "is not there; a coordinator needs it"
        console.print(f"starts from {contract.model.start}", highlight=False)
        console.print(f"{beside} {state}", highlight=False, markup=False, soft_wrap=True)
    table = Table("Release", "Numbers", "Noise / sensitivity", "Times")
    for release in plan.releases():
        sigma = f"{release.event.noise_multiplier:.4g}"
        last = " (last)" if release is plan.final_evaluation else ""
        table.add_row(release.stage + last, str(release.length), sigma, str(release.times))
    console.print(table)
    told = [
        f"Everything together, at delta {contract.privacy.delta:.3g}:",
        f"epsilon {epsilon_text(planned_epsilon(contract))} towards whoever sees sums",
    ]
    if contract.aggregation.secure:
        told[-1] += ", the server included"
        told.append(
            f"Sums are masked: the server sees them over at least {contract.min_survivors} "
            "merchants, and no single\nmessage, if fewer than a third of the merchants of a sum "
            "collude with it."
        )
    else:
        server = epsilon_text(planned_epsilon_towards_server(contract))
        told.append(f"epsilon {server} towards the server (sums are not masked)")
    console.print("\n".join(told), highlight=False)
