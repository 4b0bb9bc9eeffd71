"""From the options of a command to data and a contract."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.contract import Contract, read_contract
from common.errors import ContractError

if TYPE_CHECKING:
    from simulations.datasets import Dataset


def chosen_dataset(
    name: str,
    *,
    partition: str | None,
    label: str | None,
    preset: str | None,
    merchants: int | None,
    seed: int,
) -> "Dataset":
    """Load a built-in data set."""
    from simulations.datasets import load

    return load(
        name, partition=partition, label=label, preset=preset, merchants=merchants, seed=seed
    )


def chosen_contract(dataset: "Dataset", path: Path | None) -> Contract:
    """Return the contract of a file, or the data set's own, for the data set's merchants.

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
    return contract.revised(federation={"min_merchants": len(dataset.merchants)})


def with_options(contract: Contract, **options: tuple[str, Any]) -> Contract:
    """Return the contract with the stated options, given as key=(section, value)."""
    for key, (section, value) in options.items():
        if value is not None:
            contract = contract.revised(source=f"--{key}", **{section: {key: value}})
    return contract


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
