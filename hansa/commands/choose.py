"""From the options of a command to data and a contract."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.contract import Contract, read_contract
from common.errors import ContractError
from common.start import read_start

if TYPE_CHECKING:
    from simulations.datasets import Dataset


def chosen_dataset(  # noqa: PLR0913  # all but the first by name
    name: str,
    *,
    partition: str | None,
    label: str | None,
    preset: str | None,
    merchants: int | None,
    seed: int,
    plain: bool = False,
) -> "Dataset":
    """Load a built-in data set."""
    from simulations.datasets import load

    return load(
        name,
        partition=partition,
        label=label,
        preset=preset,
        merchants=merchants,
        seed=seed,
        plain=plain,
        warm=True,
    )


def refuse_single_merchant(merchants: int | None, path: Path | None, *, plain: bool) -> None:
    """Refuse secure sums over the only merchant there is, before customers are read.

    Raises:
        ContractError: Says what to do instead.
    """
    if merchants == 1 and not plain and (path is None or read_contract(path).aggregation.secure):
        raise ContractError(
            "--merchants: a secure sum hides nothing of a single merchant; use 2 merchants or "
            "more, or --insecure-plain-sums"
        )


def chosen_contract(dataset: "Dataset", path: Path | None, *, plain: bool) -> Contract:
    """Return the contract of a file, or the data set's own, for the data set's merchants.

    Args:
        dataset: Whose customers are to be learned from.
        path: The contract file; None for the data set's own.
        plain: Sum without masks, whatever the contract says.

    Raises:
        ContractError: The file does not fit the data set.
    """
    if path is None:
        contract = dataset.contract
    else:
        contract = read_contract(path)
        frame = next(iter(dataset.merchants.values()))
        wanted = {f"features: {feature.name}": feature.name for feature in contract.features}
        wanted["segments.column"] = contract.segments.column
        for key, column in wanted.items():
            if column not in frame.columns:
                raise ContractError(
                    f"{path}: {key}: data set {dataset.name} has no column '{column}'"
                )
    changes: dict[str, Any] = {"federation": {"min_merchants": len(dataset.merchants)}}
    if plain:
        return contract.revised("--insecure-plain-sums", aggregation={"secure": False}, **changes)
    return contract.revised(**changes)


def starting_at(dataset: "Dataset", path: Path | None) -> "Dataset":
    """Return the data set with what a contract's file starts from; without a file its own.

    Raises:
        ContractError: The file names parameters, and they do not lie beside it.
    """
    if path is None:
        return dataset
    return replace(dataset, start=read_start(path, read_contract(path)))


def with_options(contract: Contract, **options: tuple[str, Any]) -> Contract:
    """Return the contract with the stated options, given as key=(section, value)."""
    for key, (section, value) in options.items():
        if value is not None:
            contract = contract.revised(source=f"--{key}", **{section: {key: value}})
    return contract


def final_contract(
    dataset: "Dataset",
    path: Path | None,
    *,
    plain: bool,
    delta: float | None,
    **options: tuple[str, Any],
) -> Contract:
    """Return what merchants of a data set agree on, as `chosen_contract` and `with_options`.

    Args:
        dataset: Whose customers are to be learned from.
        path: The contract file; None for the data set's own.
        plain: Sum without masks, whatever the contract says.
        delta: None for the file's; without a file, for 1 / N^1.1.
        options: key=(section, value).

    Raises:
        ContractError: The file does not fit the data set, or an option the contract.
    """
    from simulations.federation import public_delta, tables_of, training_customers

    contract = with_options(chosen_contract(dataset, path, plain=plain), **options)
    if delta is None and path is None:
        delta = public_delta(training_customers(list(tables_of(dataset, contract).values())))
    return with_options(contract, delta=("privacy", delta))


def write_json(document: dict[str, Any], path: Path) -> None:
    """Write a result for machines, whole or not at all; `-` is the terminal."""
    import json
    import sys

    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    if str(path) == "-":
        sys.stdout.write(text)
        return
    from simulations.pictures import write_whole

    write_whole(path, text.encode())
