"""`hansa simulate`: a whole federation, live on the terminal, then a report."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import ContractError
from common.statements import epsilon_text
from hansa.commands.choose import (
    chosen_dataset,
    final_contract,
    refuse_single_merchant,
    starting_at,
    write_json,
)

if TYPE_CHECKING:
    from rich.console import Console

    from simulations.members import Federation
    from simulations.result import RoundRecord


@dataclass(frozen=True)
class Choices:
    """The command's options, as typed."""

    contract: Path | None
    data: str
    partition: str | None
    label: str | None
    preset: str | None
    merchants: int | None
    epsilon: float | None
    delta: float | None
    mode: str | None
    rounds: int | None
    seed: int | None
    data_seed: int
    insecure_plain_sums: bool
    engine: Literal["cohort", "process", "ray"]
    processes: int
    out: Path | None
    overwrite: bool
    json: Path | None


def run(choices: Choices) -> None:
    """Simulate, write everything under the output folder, print what came out."""
    from rich.console import Console

    console = Console(stderr=str(choices.json) == "-")
    out = choices.out or Path("out") / datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
    with console.status("reading customers"):
        prepare = _prepared(choices)  # what is mistyped is told before torch is imported
        from simulations.documents import simulation_document
        from simulations.engines import Computing
        from simulations.report import write_report
        from simulations.run import prepare_folder, simulate
        from simulations.tables import merchants_table, summary_lines

        prepare_folder(out, overwrite=choices.overwrite)
        federation = prepare(out)
    _announce(federation, console)
    with _progress(federation, console) as on_round:
        computing = Computing(choices.engine, choices.processes)
        result = simulate(federation, out, on_round, computing=computing)
    report = out / "report.html"
    with console.status("writing the report"):
        write_report(result, report)
    console.print(merchants_table(result))
    for line in summary_lines(result):
        console.print(line)
    console.print(
        f"Bundle  {result.bundle}\nReport  {report}\nAudit   hansa audit verify {out / 'evidence'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    document = simulation_document(result, report)
    write_json(document, out / "result.json")
    if choices.json is not None:
        write_json(document, choices.json)


def _prepared(choices: Choices) -> "Callable[[Path], Federation]":
    """Check every choice; return what makes the federation once its folder is there."""
    if choices.engine == "ray":
        from simulations.ray_engine import refuse_without_ray

        refuse_without_ray(choices.processes)
    if _is_folder(choices.data):
        _refuse_overrides(choices)
        from simulations.federation import open_federation

        federation = open_federation(Path(choices.data))
        return lambda _out: federation
    plain = choices.insecure_plain_sums
    refuse_single_merchant(choices.merchants, choices.contract, plain=plain)
    dataset = chosen_dataset(
        choices.data,
        partition=choices.partition,
        label=choices.label,
        preset=choices.preset,
        merchants=choices.merchants,
        seed=choices.data_seed,
        plain=plain or choices.merchants == 1,
    )
    contract = final_contract(
        dataset,
        choices.contract,
        plain=plain,
        delta=choices.delta,
        epsilon=("privacy", choices.epsilon),
        mode=("training", choices.mode),
        rounds=("training", choices.rounds),
    )
    dataset = starting_at(dataset, choices.contract)
    from simulations.federation import assemble

    return lambda out: assemble(dataset, contract, out, choices.seed)


def _is_folder(data: str) -> bool:
    """Tell a folder from a built-in data set, whose name comes first."""
    from simulations.catalogue import CATALOGUE

    if data in {entry.name for entry in CATALOGUE}:
        return False
    return "/" in data or "\\" in data or data in {".", ".."} or Path(data).is_dir()


def _refuse_overrides(choices: Choices) -> None:
    """A federation on disk has its contract and its merchants' policies; nothing overrides them.

    Raises:
        ContractError: An option would change what the merchants agreed on.
    """
    if choices.data_seed:
        raise ContractError(
            f"--data-seed: the customers of the federation in {choices.data} are there already"
        )
    if choices.insecure_plain_sums:
        raise ContractError(
            f"--insecure-plain-sums: the federation in {choices.data} has its own contract and "
            "policies; whether its sums are secure stands in contract.toml (aggregation.secure)"
        )
    for name in (
        "contract", "partition", "label", "preset", "merchants", "epsilon", "delta", "mode",
        "rounds", "seed",
    ):  # fmt: skip
        if getattr(choices, name) is not None:
            raise ContractError(
                f"--{name}: the federation in {choices.data} has its own contract and policies; "
                f"change contract.toml (and [simulation] seed in each merchant.toml) instead"
                if name != "contract"
                else f"{choices.contract}: the federation in {choices.data} has its own contract"
            )


def _announce(federation: "Federation", console: "Console") -> None:
    from simulations.wording import plain

    contract = federation.contract
    console.print(
        f"{plain(contract.federation.name)}: {len(federation.members)} merchants, "
        f"{contract.training.rounds} rounds, mode {contract.training.mode}, "
        f"epsilon {contract.privacy.epsilon:g} at delta {contract.privacy.delta:.3g}, "
        f"sums {'masked' if contract.aggregation.secure else 'not masked'}",
        highlight=False,
        markup=False,
    )


@contextmanager
def _progress(
    federation: "Federation", console: "Console"
) -> "Iterator[Callable[[RoundRecord, int], None]]":
    """Show the rounds: a live line on a terminal, a line an evaluation elsewhere."""
    cap = federation.contract.privacy.epsilon
    if not console.is_terminal:
        yield lambda record, rounds: _print_round(record, rounds, cap)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("round {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=12),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    accuracy = "not measured yet"
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("asking merchants", total=federation.contract.training.rounds)

        def show(record: "RoundRecord", _rounds: int) -> None:
            nonlocal accuracy
            accuracy = _accuracy(record) or accuracy
            spent = epsilon_text(record.epsilon, digits=3)
            told = f"{record.cohort} merchants, epsilon {spent}/{cap:g}, {accuracy}"
            progress.update(task, completed=record.round, description=told)

        yield show


def _print_round(record: "RoundRecord", rounds: int, cap: float) -> None:
    accuracy = _accuracy(record)
    if accuracy or record.round == rounds:
        print(
            f"round {record.round}/{rounds}: {record.cohort} merchants, "
            f"epsilon {epsilon_text(record.epsilon, digits=3)} of {cap:g}, "
            f"{accuracy or 'accuracy too noisy to state'}",
            file=sys.stderr,
            flush=True,
        )


def _accuracy(record: "RoundRecord") -> str:
    if record.accuracy is None or record.accuracy_error is None:
        return ""
    return f"noisy accuracy {record.accuracy:.3f} ± {record.accuracy_error:.3f}"
