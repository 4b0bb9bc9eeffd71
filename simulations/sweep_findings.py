"""What a sweep found: groups of repetitions, what all runs cost together, table, JSON."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common import statements
from common.accounting import epsilon, rdp_upper_bound
from common.errors import AccountingError
from common.events import GaussianSum, from_document
from simulations.result import Spread
from simulations.sweep_cell import Cell, Record, axes_text
from simulations.wording import Caution, counted, number, plain

_SYNTHETIC = "synthetic"
AXES: dict[str, Callable[[Record], str]] = {  # beside epsilon; delta may follow the merchants
    "merchants": lambda record: counted(record.merchants, "merchant"),
    "sampling_rate": lambda record: f"sampling rate {number(record.sampling_rate)}",
    "clip_norm": lambda record: f"clip norm {number(record.clip_norm)}",
    "delta": lambda record: f"delta {number(record.delta)}",
}
_HIDDEN = {"format", "study", "configuration", "events"}  # of a record, not for tables


@dataclass(frozen=True)
class Group:
    """All repetitions of one configuration; at least one, all alike on the axes."""

    records: tuple[Record, ...]

    @property
    def any(self) -> Record:
        """Return one of them, for what they share."""
        return self.records[0]

    @property
    def done(self) -> tuple[Record, ...]:
        """Return those that finished."""
        return tuple(record for record in self.records if record.status == "done")

    @property
    def failed(self) -> tuple[Record, ...]:
        """Return those that failed."""
        return tuple(record for record in self.records if record.status == "failed")

    @property
    def measured(self) -> int:
        """Count the runs whose noise left an accuracy to state."""
        return sum(record.accuracy is not None for record in self.records)

    @property
    def accuracy(self) -> Spread:
        """Return the noisy accuracy; the error of a single run is that of its noise."""
        known = [record for record in self.records if record.accuracy is not None]
        if len(known) == 1:
            return Spread(known[0].accuracy or 0.0, known[0].accuracy_error or math.nan)
        return self.spread("accuracy")

    def spread(self, name: str) -> Spread:
        """Return mean and sample standard deviation of a number over the finished runs."""
        values = self.values(name)
        return Spread(
            float(np.mean(values)) if values else math.nan,
            float(np.std(values, ddof=1)) if len(values) > 1 else math.nan,
        )

    def most(self, name: str) -> float | None:
        """Return the largest value of a number."""
        return max(self.values(name), default=None)

    def values(self, name: str) -> list[float]:
        """Return the known values of a number."""
        found = (getattr(record, name) for record in self.records)
        return [float(value) for value in found if value is not None]


@dataclass(frozen=True)
class Sweep:
    """All that a folder holds, seen from the grid that was asked for."""

    records: tuple[Record, ...]  # every one of the folder
    groups: tuple[Group, ...]  # of the grid, and of earlier grids that differ in their axes alone
    asked: frozenset[str]  # keys of the grid
    provenance: str

    @property
    def shown(self) -> tuple[Record, ...]:
        """Return the records that table and picture show."""
        return tuple(record for group in self.groups for record in group.records)

    @property
    def failed(self) -> tuple[Record, ...]:
        """Return the runs of the grid that failed."""
        return tuple(r for r in self.shown if r.status == "failed" and r.key in self.asked)


def sweep_of(cells: Sequence[Cell], records: Iterable[Record], provenance: str) -> Sweep:
    """Sort a folder's records by the grid that was asked for."""
    every = tuple(sorted(records, key=_place))
    studies = {cell.study for cell in cells}
    groups: dict[str, list[Record]] = {}
    for record in every:
        if record.study in studies:
            groups.setdefault(record.configuration, []).append(record)
    asked = frozenset(cell.key for cell in cells)
    return Sweep(every, tuple(Group(tuple(found)) for found in groups.values()), asked, provenance)


def varied(groups: Sequence[Group]) -> list[str]:
    """Return the names of the axes, beside epsilon, on which groups differ."""
    return [name for name in AXES if len({getattr(group.any, name) for group in groups}) > 1]


def headline(sweep: Sweep) -> str:
    """Say what all runs that are shown share."""
    first = sweep.shown[0]
    where = [
        plain(part) for part in (first.data, first.preset, first.partition, first.label) if part
    ]
    shared = [tell(first) for name, tell in AXES.items() if name not in varied(sweep.groups)]
    sums = "sums masked" if first.secure else "sums not masked"
    return ", ".join([*where, f"mode {first.mode}", *shared, sums])


def _place(record: Record) -> tuple[Any, ...]:
    return (
        record.data,
        record.study,
        record.merchants,
        record.sampling_rate,
        record.clip_norm,
        record.epsilon,
        record.delta,
        record.configuration,
        record.split_seed,
        -1 if record.seed is None else record.seed,
    )


def epsilon_together(records: Sequence[Record], delta: float) -> float | None:
    """Return an upper bound on epsilon at `delta` for all attempts of all records together.

    Every attempt counts with everything that its plan pays for. Exact for sums over all
    customers; with sampled sums the Renyi bound, as a rule too large.

    Guarantee: for a customer of one merchant in all of the runs, as the module
    `common.accounting` has it; the plans were fixed beforehand. Nothing holds for seeded runs.

    Returns:
        None where no bound can be given.
    """
    events = [
        from_document({**document, "count": document["count"] * record.attempts})
        for record in records
        for document in record.events
    ]
    bound = epsilon if all(isinstance(e, GaussianSum) for e in events) else rdp_upper_bound
    try:
        value = bound(events, delta)
    except AccountingError:
        return None
    return value if math.isfinite(value) else None


def cautions(sweep: Sweep) -> list[Caution]:
    """List what a reader must know before choosing anything by a sweep, the gravest first."""
    found = []
    first = sweep.shown[0]
    if not first.secure:
        found.append(
            Caution("The sums were not masked", statements.NOT_MASKED_SWEPT[first.mode], True)
        )
    if first.data == _SYNTHETIC:
        found.append(Caution("Synthetic customers", statements.SWEPT_SYNTHETIC, False))
    else:
        found.append(
            Caution("Choosing by this table spends privacy", _choosing(sweep, first), True)
        )
    if first.seed is not None:
        found.append(
            Caution("Repeatable runs: the noise can be guessed", statements.SWEPT_SEEDED, False)
        )
    return found


def _choosing(sweep: Sweep, first: Record) -> str:
    """Say what choosing by the figures of real customers costs, all runs of the folder counted."""
    runs = [record for record in sweep.records if record.data == first.data]
    attempts = sum(record.attempts for record in runs)
    if any(record.seed is not None for record in runs):
        return statements.swept(attempts, None, 0.0, seeded=True)
    delta = max(record.delta for record in runs)
    return statements.swept(attempts, epsilon_together(runs, delta), delta, seeded=False)


def columns() -> dict[str, str]:
    """Return the columns of the tables in order: name -> string, int64 or double."""
    kinds = {"str": "string", "int": "int64", "float": "double", "bool": "bool"}
    found = {}
    for name, field in Record.model_fields.items():
        if name not in _HIDDEN:
            told = getattr(field.annotation, "__name__", str(field.annotation))
            found[name] = kinds.get(str(told).removesuffix(" | None"), "string")
    return found


def rows(sweep: Sweep) -> list[dict[str, Any]]:
    """Return every record of the folder as a row of the tables."""
    return [
        {
            name: " ".join(record.notes) if name == "notes" else getattr(record, name)
            for name in columns()
        }
        for record in sweep.records
    ]


def parquet(sweep: Sweep) -> bytes:
    """Return every record of the folder as a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    types = {name: pyarrow.type_for_alias(kind) for name, kind in columns().items()}
    table = pyarrow.Table.from_pylist(rows(sweep), schema=pyarrow.schema(types))
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    return buffer.getvalue()


def comma_separated(sweep: Sweep) -> bytes:
    """Return every record of the folder as a CSV file; what is not known is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(columns()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows(sweep))
    return buffer.getvalue().encode()


def sweep_document(sweep: Sweep) -> dict[str, Any]:
    """Turn a sweep into the document that `hansa sweep --json` prints."""
    first = sweep.shown[0]
    named = {key: getattr(first, key) for key in ("data", "partition", "label", "preset")}
    return {
        "schema": "hansa/sweep/1",
        **named,
        "mode": first.mode,
        "secure": first.secure,
        "rows": [_row(group) for group in sweep.groups],
        "failed": [
            {"cell": f"{axes_text(r)}, split {r.split_seed}", "key": r.key, "reason": r.reason}
            for r in sweep.shown
            if r.status == "failed"
        ],
        "notes": [sweep.provenance, *(caution.text for caution in cautions(sweep))],
    }


def _row(group: Group) -> dict[str, Any]:
    first = group.any
    shared = ("epsilon", "clip_norm", "merchants", "sampling_rate", "delta")
    return {
        **{name: getattr(first, name) for name in shared},
        "done": len(group.done),
        "failed": len(group.failed),
        "measured": group.measured,
        "epsilon_spent": group.most("epsilon_spent"),
        "epsilon_server": group.most("epsilon_server"),
        "accuracy": _spread(group.accuracy),
        "macro_f1": _spread(group.spread("macro_f1")),
        "rounds": group.spread("rounds").mean if group.done else None,
        "seconds": group.spread("seconds").mean if group.done else None,
        "peak_mib": group.most("peak_mib"),
    }


def _spread(spread: Spread) -> dict[str, float | None]:
    return {
        "mean": spread.mean if math.isfinite(spread.mean) else None,
        "sd": spread.sd if math.isfinite(spread.sd) else None,
    }
