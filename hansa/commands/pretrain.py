"""`hansa pretrain`: a contract that starts from parameters trained on generated customers."""

from pathlib import Path

import typer

from common.contract import contract_toml, read_contract
from common.errors import ContractError
from common.files import write_together
from common.start import START, starting_from, to_bytes


def run(path: Path, out: Path, seed: int) -> None:
    """Write contract and starting parameters.

    Raises:
        ContractError: No customers can be generated for the contract, or `out` holds one already.
    """
    contract = read_contract(path)
    targets = (out / START, out / "contract.toml")
    for target in targets:
        if target.exists():
            raise ContractError(f"{target}: is there already; choose another --out")
    from simulations.pretraining import pretrained

    found = pretrained(contract.revised(model={"start": None}), seed)
    start = to_bytes(found.parameters)
    started = starting_from(contract, start)
    contents = (start, contract_toml(started).encode())
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_together(dict(zip(targets, contents, strict=True)))
    except OSError as error:
        raise ContractError(f"{out}: cannot be written ({error.strerror})") from None
    typer.echo(f"{targets[1]}, {targets[0]}: written")
    typer.echo(
        f"{found.customers:,} generated customers: right about {found.accuracy:.1%} of those of "
        f"other shops, {found.majority:.1%} by always naming the most common segment"
    )
    if found.unknown:
        typer.echo(f"not generated, start with weight zero: {', '.join(found.unknown)}")
    if started.training.learning_rate != contract.training.learning_rate:
        typer.echo(f"training.learning_rate is {started.training.learning_rate:g} now")
    typer.echo(f"starts from SHA-256 {started.model.start}")
    typer.echo(f"contract    SHA-256 {started.sha256}")
