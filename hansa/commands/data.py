"""`hansa data`: the built-in data sets."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from common.errors import ContractError, DataError

app = typer.Typer(help="List, show and write the built-in data sets.", no_args_is_help=True)


@app.command("list")
def list_sets() -> None:
    """List the built-in data sets."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    from simulations.catalogue import CATALOGUE

    name = Column("Name", no_wrap=True)
    table = Table(name, "Partitions", "Labels", "Presets", "Rows", "Needs")
    for entry in CATALOGUE:
        table.add_row(
            entry.name,
            ", ".join(entry.partitions),
            ", ".join(entry.labels),
            ", ".join(entry.presets),
            ", ".join(f"{name} {rows:,}" for name, rows in entry.rows.items()),
            escape(entry.extra or ""),
        )
    Console().print(table)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name of the data set.")],
    partition: Annotated[str | None, typer.Option(help="How customers are divided.")] = None,
    label: Annotated[str | None, typer.Option(help="What the segments say.")] = None,
    preset: Annotated[str | None, typer.Option(help="Size of the synthetic set.")] = None,
    merchants: Annotated[int | None, typer.Option(min=1, help="Number of merchants.")] = None,
    data_seed: Annotated[int, typer.Option(min=0, help="Seed of generated customers.")] = 0,
) -> None:
    """Show one data set: where it is from, its merchants, its segments, its features."""
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from hansa.commands.choose import chosen_dataset

    dataset = chosen_dataset(
        name, partition=partition, label=label, preset=preset, merchants=merchants, seed=data_seed
    )
    console, segments = Console(), dataset.contract.segments
    console.print(f"{dataset.name}, {dataset.partition}, {dataset.label}: {dataset.description}")
    console.print(dataset.provenance, style="yellow")
    sizes = [len(frame) for frame in dataset.merchants.values()]
    labels = np.concatenate([f[segments.column].to_numpy() for f in dataset.merchants.values()])
    shares = np.bincount(labels, minlength=len(segments.names)) / len(labels)
    console.print(
        f"{len(sizes)} merchants, {sum(sizes):,} customers "
        f"({min(sizes)} to {max(sizes)} a merchant, median {np.median(sizes):g})",
        highlight=False,
    )
    parts = zip(segments.names, shares, strict=True)
    console.print(", ".join(f"{name} {share:.1%}" for name, share in parts), highlight=False)
    table = Table("Feature", "Kind", "Bounds", "Transform", "Unit", "Meaning")
    for f in dataset.contract.features:
        bounds = f"{f.low:g} to {f.high:g}" if f.kind == "number" else ", ".join(f.categories)
        table.add_row(f.name, f.kind, bounds, f.transform, f.unit, f.description)
    console.print(table)


@app.command()
def generate(  # noqa: PLR0913, PLR0917
    out: Annotated[Path, typer.Argument(help="New folder for the federation.")],
    data: Annotated[str, typer.Option(help="Name of the data set.")] = "synthetic",
    partition: Annotated[str | None, typer.Option(help="How customers are divided.")] = None,
    label: Annotated[str | None, typer.Option(help="What the segments say.")] = None,
    preset: Annotated[str | None, typer.Option(help="Size of the synthetic set.")] = None,
    merchants: Annotated[int | None, typer.Option(min=1, help="Number of merchants.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Each merchant's cap; default the contract's epsilon.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Training rounds; default as the data set's contract.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Makes the merchants' noise repeatable, hence guessable."),
    ] = None,
    data_seed: Annotated[int, typer.Option(min=0, help="Seed of generated customers.")] = 0,
) -> None:
    """Write a federation to disk: a contract, and a folder with a table for each merchant."""
    from hansa.commands.choose import chosen_dataset
    from simulations.datasets import write_federation

    if epsilon is not None and not 0 < epsilon <= 100:
        raise DataError(f"--epsilon: expected a number above 0 and up to 100, got {epsilon:g}")
    if merchants == 1:
        raise ContractError(
            "--merchants: a secure sum hides nothing of a single merchant; use 2 merchants or more"
        )
    dataset = chosen_dataset(
        data, partition=partition, label=label, preset=preset, merchants=merchants, seed=data_seed
    )
    if rounds is not None:
        contract = dataset.contract.revised(training={"rounds": rounds})
        dataset = replace(dataset, contract=contract)
    write_federation(dataset, out, epsilon=epsilon, seed=seed)
    typer.echo(f"{out}: {len(dataset.merchants)} merchants, {dataset.customers:,} customers")
