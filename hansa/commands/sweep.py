"""`hansa sweep`: a grid of simulations, kept run by run; one table, one picture."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import DataError, RunError
from common.statements import epsilon_text
from hansa.commands.choose import (
    final_contract,
    refuse_single_merchant,
    starting_at,
    write_json,
)
from hansa.commands.tables import Column, show

if TYPE_CHECKING:
    from rich.console import Console

    from common.contract import Contract
    from simulations.sweep import OnRecord
    from simulations.sweep_cell import Cell, Record
    from simulations.sweep_findings import Group, Sweep

_EPSILONS = (0.5, 1.0, 2.0, 4.0)
_HEADINGS = {
    "merchants": "Merchants",
    "sampling_rate": "Sampling",
    "clip_norm": "Clip norm",
    "delta": "Delta",
}
_CAPTION = (
    "Accuracy is noisy: mean ± standard deviation over the finished runs; of a single one, of the "
    "noise in it. F1: mean of the noisy macro-F1. Spent: epsilon by the ledgers, the most of any "
    "run. s: mean seconds. MiB: peak memory of a run. Runs: that finished."
)


@dataclass(frozen=True)
class Choices:
    """The command's options, as typed; axes as lists of values between commas."""

    contract: Path | None
    data: str
    partition: str | None
    label: str | None
    preset: str | None
    merchants: Sequence[str]
    epsilons: Sequence[str]
    clip_norms: Sequence[str]
    sampling_rates: Sequence[str]
    delta: float | None
    mode: str | None
    rounds: int | None
    seeds: int
    seed: int | None
    data_seed: int
    insecure_plain_sums: bool
    workers: int | None
    out: Path
    keep: bool
    json: Path | None


def run(choices: Choices) -> None:
    """Run what is missing of the grid, write and print what the folder holds.

    Raises:
        HansaError: An option does not fit, or the folder cannot be used.
        RunError: Runs of the grid failed; everything else is kept and written.
    """
    from rich.console import Console

    console = Console(stderr=str(choices.json) == "-")
    numbers = _Axes.of(choices)
    with console.status("reading customers"):
        provenance, cells = _cells(choices, numbers)
        from simulations.sweep import sweep
        from simulations.sweep_findings import sweep_of
    with _progress(cells, choices, console) as on_record:
        records = sweep(
            cells,
            choices.out,
            workers=choices.workers or _cores(),
            keep=choices.keep,
            on_record=on_record,
        )
    found = sweep_of(cells, records.values(), provenance)
    _write(found, choices.out)
    _tell(found, choices.out, console)
    if choices.json is not None:
        from simulations.sweep_findings import sweep_document

        write_json(sweep_document(found), choices.json)
    if found.failed:
        raise RunError(
            f"{len(found.failed):,} of {len(found.asked):,} runs failed; the reasons are in the "
            "table's last lines, and the same command tries them again"
        )


def _cores() -> int:
    """Count the cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _Axes:
    """The values of the axes; an empty axis has the contract's own value."""

    merchants: tuple[int, ...]
    epsilons: tuple[float, ...]
    clip_norms: tuple[float, ...]
    sampling_rates: tuple[float, ...]

    @classmethod
    def of(cls, choices: Choices) -> "_Axes":
        """Read the values.

        Raises:
            DataError: One is no number; the message names the axis.
        """
        return cls(
            tuple(int(number) for number in _numbers("--merchants", choices.merchants, whole=True)),
            _numbers("--epsilon", choices.epsilons) or _EPSILONS,
            _numbers("--clip-norm", choices.clip_norms),
            _numbers("--sampling-rate", choices.sampling_rates),
        )


def _numbers(option: str, typed: Sequence[str], *, whole: bool = False) -> tuple[float, ...]:
    found = set()
    for text in ",".join(typed).split(",") if typed else ():
        try:
            found.add(int(text) if whole else float(text))
        except ValueError:
            kind = "whole numbers" if whole else "numbers"
            raise DataError(
                f"{option}: expected {kind} with commas between them, got '{text.strip()}'"
            ) from None
    return tuple(sorted(found))


def _cells(choices: Choices, axes: _Axes) -> "tuple[str, tuple[Cell, ...]]":
    """Return where the customers are from, and all cells, every contract validated."""
    counts: tuple[int | None, ...] = axes.merchants or (None,)
    plain = choices.insecure_plain_sums
    for count in counts:
        refuse_single_merchant(count, choices.contract, plain=plain)
    from simulations.sweep import Axes, grid
    from simulations.sweep_cell import Origin

    federations: list[tuple[Origin, Contract]] = []
    for count in counts:
        origin = Origin(
            choices.data,
            choices.partition,
            choices.label,
            choices.preset,
            count,
            choices.data_seed,
        )
        dataset = origin.load(plain=plain or count == 1)
        contract = final_contract(
            dataset,
            choices.contract,
            plain=plain,
            delta=choices.delta,
            mode=("training", choices.mode),
            rounds=("training", choices.rounds),
        )
        start = starting_at(dataset, choices.contract).start
        federations.append((replace(origin, start=start), contract))
    values = Axes(axes.epsilons, axes.clip_norms, axes.sampling_rates, choices.seeds)
    return dataset.provenance, grid(federations, values, choices.seed)


@contextmanager
def _progress(
    cells: "Sequence[Cell]", choices: Choices, console: "Console"
) -> "Iterator[OnRecord]":
    """Show the runs that come to an end: a bar on a terminal, a line each elsewhere."""
    from simulations.sweep_cell import read_records

    known = read_records(choices.out) if choices.out.is_dir() else {}
    finished = {key for key, record in known.items() if record.status == "done"}
    ended = sum(cell.key in finished for cell in cells)
    told = f"{len(cells):,} runs, {ended:,} of them finished already"
    console.print(told, highlight=False)
    try:
        with _bar(len(cells), ended, console) as advance:
            yield advance
    except KeyboardInterrupt:
        print(
            f"what is finished is kept in {choices.out}; the same command goes on with the rest",
            file=sys.stderr,
        )
        raise


@contextmanager
def _bar(total: int, ended: int, console: "Console") -> "Iterator[OnRecord]":
    if not console.is_terminal:
        yield _counting(total, ended)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("run {task.completed:.0f}/{task.total:.0f}"),
        BarColumn(bar_width=12),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("at work", total=total, completed=ended)

        def advance(cell: "Cell", record: "Record") -> None:
            progress.update(task, advance=1, description=f"{cell}: {_said(record)}")

        yield advance


def _counting(total: int, ended: int) -> "Callable[[Cell, Record], None]":
    def advance(cell: "Cell", record: "Record") -> None:
        nonlocal ended
        ended += 1
        print(f"{ended}/{total} {cell}: {_said(record)}", file=sys.stderr, flush=True)

    return advance


def _said(record: "Record") -> str:
    from simulations.wording import percent, plain

    if record.status == "failed":
        return f"failed: {plain(record.reason or '')}"
    if record.accuracy is None:
        return "accuracy too noisy to state"
    return f"noisy accuracy {percent(record.accuracy, record.accuracy_error)}"


def _write(found: "Sweep", out: Path) -> None:
    from simulations.pictures import write_whole
    from simulations.sweep_findings import comma_separated, parquet
    from simulations.sweep_picture import picture

    write_whole(out / "sweep.parquet", parquet(found))
    write_whole(out / "sweep.csv", comma_separated(found))
    for kind in ("png", "svg"):
        write_whole(out / f"sweep.{kind}", picture(found, kind))


def _tell(found: "Sweep", out: Path, console: "Console") -> None:
    from rich.text import Text

    from simulations.sweep_cell import axes_text
    from simulations.sweep_findings import cautions, headline, varied
    from simulations.wording import counted, plain

    varying, secure = varied(found.groups), found.shown[0].secure
    rows = [_cells_of(group, varying, secure=secure) for group in found.groups]
    console.print(Text(headline(found), style="bold"))
    show(console, "", _columns(varying, secure=secure), rows)
    console.print(Text(_CAPTION, style="dim"))
    for record in (record for record in found.shown if record.status == "failed"):
        told = f"Failed: {axes_text(record)}, split {record.split_seed}: {record.reason}"
        console.print(Text(plain(told), style="red"), soft_wrap=True)
    for caution in cautions(found):
        style = "bold red" if caution.grave else "yellow"
        console.print(Text(f"{caution.title}. {caution.text}", style=style))
    notes = {note for record in found.shown for note in record.notes}
    for note in sorted(notes):
        console.print(Text(plain(note), style="yellow"))
    console.print(Text(plain(found.provenance)))
    others = len(found.records) - len(found.shown)
    if others:
        console.print(
            f"{counted(others, 'run')} of other settings or other versions of Hansa in this folder "
            "are in sweep.parquet and sweep.csv only",
            highlight=False,
        )
    console.print(
        f"Picture {out / 'sweep.png'}\nTable   {out / 'sweep.parquet'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _columns(varying: Sequence[str], *, secure: bool) -> list[Column]:
    named = {name: heading for name, heading in _HEADINGS.items() if name in varying}
    towards = [] if secure else ["To server"]
    headings = ["Epsilon", *named.values(), "Spent", *towards, "Accuracy", "F1", "s", "MiB", "Runs"]
    return [Column(heading) for heading in headings]


def _cells_of(group: "Group", varying: Sequence[str], *, secure: bool) -> list[str]:
    from simulations.wording import NOTHING, number, percent

    first, accuracy = group.any, group.accuracy
    spent, server = (
        NOTHING if value is None else epsilon_text(value)
        for value in (group.most("epsilon_spent"), group.most("epsilon_server"))
    )
    unknown = len(group.done) - group.measured
    runs = [f"{len(group.done)}"]
    runs += [f"{len(group.failed)} failed"] if group.failed else []
    runs += [f"{unknown} too noisy"] if unknown else []
    return [
        f"{first.epsilon:g}",
        *(number(getattr(first, name)) for name in _HEADINGS if name in varying),
        spent,
        *([] if secure else [server]),
        percent(accuracy.mean, accuracy.sd),
        number(group.spread("macro_f1").mean),
        number(group.spread("seconds").mean),
        number(group.most("peak_mib")),
        ", ".join(runs),
    ]
