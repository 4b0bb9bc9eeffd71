"""`hansa compare`: every method on the same customers, one table and one picture."""

import sys
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from hansa.commands.choose import (
    chosen_contract,
    chosen_dataset,
    refuse_single_merchant,
    starting_at,
    write_json,
)


@dataclass(frozen=True)
class Choices:
    """The command's options, as typed."""

    contract: Path | None
    data: str
    partition: str | None
    label: str | None
    preset: str | None
    merchants: int | None
    epsilons: tuple[float, ...]
    seeds: int
    data_seed: int
    insecure_plain_sums: bool
    out: Path | None
    json: Path | None


def run(choices: Choices) -> None:
    """Measure, print the table and the verdict, write what was asked for."""
    from rich.console import Console

    for epsilon in choices.epsilons:
        if not 0 < epsilon <= 100:
            raise DataError(f"--epsilon: expected a number above 0 and up to 100, got {epsilon:g}")
    refuse_single_merchant(choices.merchants, choices.contract, plain=choices.insecure_plain_sums)
    console = Console(stderr=str(choices.json) == "-")
    with console.status("reading customers") as status:
        dataset = chosen_dataset(
            choices.data,
            partition=choices.partition,
            label=choices.label,
            preset=choices.preset,
            merchants=choices.merchants,
            seed=choices.data_seed,
            plain=choices.insecure_plain_sums or choices.merchants == 1,
        )
        contract = chosen_contract(dataset, choices.contract, plain=choices.insecure_plain_sums)
        dataset = starting_at(dataset, choices.contract)
        from simulations.compare import Question, compare
        from simulations.documents import comparison_document
        from simulations.report import write_comparison, write_comparison_picture
        from simulations.tables import comparison_lines, comparison_table, sizes_table

        epsilons = tuple(sorted(set(choices.epsilons)))

        def tell(step: str) -> None:
            if console.is_terminal:
                status.update(step)
            else:
                print(step, file=sys.stderr, flush=True)

        comparison = compare(Question(dataset, contract, epsilons, choices.seeds), tell)
    console.print(comparison_table(comparison))
    console.print(sizes_table(comparison))
    for line in comparison_lines(comparison):
        console.print(line)
    if choices.out is not None:
        choices.out.mkdir(parents=True, exist_ok=True)
        write_comparison(comparison, choices.out / "comparison.html")
        write_comparison_picture(comparison, choices.out / "comparison.png")
        console.print(f"Page    {choices.out / 'comparison.html'}", highlight=False, markup=False)
    if choices.json is not None:
        write_json(comparison_document(comparison), choices.json)
