"""One cell of a sweep: what decides it, its run, and the record that is kept of it."""

import hashlib
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from common import statements
from common.contract import Contract
from common.errors import AccountingError, DataError, HansaError
from common.events import to_document
from common.plan import plan_of
from common.versions import code_sha256, hansa_version
from simulations.catalogue import CATALOGUE
from simulations.datasets import Dataset, load
from simulations.pictures import write_whole
from simulations.result import SimulationResult

_KEY_LENGTH = 24  # hexadecimal digits: 96 bits
# What the axes set, and what follows from the number of merchants and customers.
_MOVED = {
    "federation": ("min_merchants",),
    "training": ("sampling_rate", "split_seed"),
    "privacy": ("epsilon", "delta", "clip_norm"),
    "aggregation": ("max_customers",),
}


@dataclass(frozen=True)
class Origin:
    """Where customers come from, as `simulations.datasets.load` takes it."""

    name: str
    partition: str | None
    label: str | None
    preset: str | None
    merchants: int | None
    seed: int
    start: bytes | None = None  # what a contract's file starts from; None: the data set's own

    def load(self, *, plain: bool) -> Dataset:
        """Load or generate the customers; `plain` lets a single merchant pass.

        Raises:
            HansaError: As `simulations.datasets.load`; a stated number of merchants is named.
        """
        try:
            dataset = load(
                self.name,
                partition=self.partition,
                label=self.label,
                preset=self.preset,
                merchants=self.merchants,
                seed=self.seed,
                plain=plain,
                warm=True,
            )
            return replace(dataset, start=self.start or dataset.start)
        except HansaError as error:
            if self.merchants is None:
                raise
            raise type(error)(f"merchants {self.merchants}: {error}") from None

    def named(self) -> dict[str, Any]:
        """Return what decides the customers beside their merchants, defaults filled in."""
        entry = next(entry for entry in CATALOGUE if entry.name == self.name)
        return {
            "data": self.name,
            "partition": self.partition or next(iter(entry.partitions)),
            "label": self.label or next(iter(entry.labels)),
            "preset": self.preset or next(iter(entry.presets), None),
            "data_seed": self.seed,
        }


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; `seed` makes its noise repeatable, None draws it afresh."""

    origin: Origin
    contract: Contract
    seed: int | None

    @property
    def key(self) -> str:
        """Name the cell by everything that decides its result."""
        return self._digest(contract=self.contract.sha256, seed=self.seed)

    @property
    def configuration(self) -> str:
        """Name what all repetitions of this cell share: everything but split and seed."""
        whole = self.contract.model_dump(mode="json")
        del whole["training"]["split_seed"]
        return self._digest(contract=whole, seeded=self.seed is not None)

    @property
    def study(self) -> str:
        """Name what all cells of one table and picture share: everything but the axes."""
        whole = self.contract.model_dump(mode="json")
        for section, keys in _MOVED.items():
            for key in keys:
                del whole[section][key]
        return self._digest(contract=whole, seeded=self.seed is not None)

    def __str__(self) -> str:
        """Name the cell for people."""
        return f"{axes_text(self.record())}, split {self.contract.training.split_seed}"

    def record(self, **found: Any) -> "Record":
        """Return a record of this cell; without findings, of one that failed."""
        contract = self.contract
        document = {
            "key": self.key,
            "study": self.study,
            "configuration": self.configuration,
            "version": hansa_version(),
            **self.origin.named(),
            "merchants": contract.federation.min_merchants,
            "mode": contract.training.mode,
            "secure": contract.aggregation.secure,
            "epsilon": contract.privacy.epsilon,
            "delta": contract.privacy.delta,
            "clip_norm": contract.privacy.clip_norm,
            "sampling_rate": contract.training.sampling_rate,
            "split_seed": contract.training.split_seed,
            "seed": self.seed,
            "status": "failed",
        }
        return Record.model_validate({**document, **found})

    def _digest(self, **others: Any) -> str:
        document = {
            **self.origin.named(),
            **others,
            "version": hansa_version(),
            "code": code_sha256(),
        }
        text = json.dumps(document, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_LENGTH]


class Record(BaseModel):
    """What is kept of a cell: one small JSON file. What was not found is None."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1] = 1
    key: str
    study: str
    configuration: str
    version: str
    data: str
    partition: str
    label: str
    preset: str | None
    data_seed: int
    merchants: int
    mode: str
    secure: bool
    epsilon: float  # the contract's: no merchant releases more in the run
    delta: float
    clip_norm: float
    sampling_rate: float
    split_seed: int  # of the contract: which customers are held out
    seed: int | None  # of the noise; None: drawn afresh
    status: Literal["done", "failed"]
    reason: str | None = None  # why it failed, in one sentence
    attempts: int = 1  # runs that came to an end, failed ones counted
    epsilon_spent: float | None = None  # by the ledgers, the most of any merchant
    epsilon_server: float | None = None  # the same towards the coordinator
    epsilon_achieved: float | None = None  # by the noise that the sums really held
    accuracy: float | None = None  # noisy; None also where the noise drowns it
    accuracy_error: float | None = None  # one standard deviation of the noise in it
    macro_f1: float | None = None
    rounds: int | None = None
    refused: int | None = None  # merchants that refused, or left
    seconds: float | None = None
    peak_mib: float | None = None
    notes: list[str] = []
    events: list[dict[str, Any]] = []  # everything that the plan of one attempt pays for


def axes_text(record: Record) -> str:
    """Name a record's place on the axes for people."""
    return (
        f"epsilon {record.epsilon:g}, clip norm {record.clip_norm:g}, "
        f"{record.merchants} merchants, sampling rate {record.sampling_rate:g}"
    )


def attempt(cell: Cell, folder: Path) -> Record:
    """Simulate a cell in an empty folder; an error that a person can put right is its reason."""
    from simulations.federation import assemble
    from simulations.run import simulate

    try:
        dataset = cell.origin.load(plain=not cell.contract.aggregation.secure)
        federation = assemble(dataset, cell.contract, folder, cell.seed)
        result = simulate(federation, folder, lambda _record, _rounds: None)
    except HansaError as error:
        return failed(cell, str(error))
    told = (*federation.notes, statements.NOT_FOR_RELEASE)  # the sweep says both itself
    return _finished(cell, result, told)


def failed(cell: Cell, reason: str) -> Record:
    """Return the record of a cell that failed, with what its plan would have released."""
    return cell.record(reason=" ".join(reason.split()), events=_planned(cell.contract))


def _finished(cell: Cell, result: SimulationResult, known: tuple[str, ...]) -> Record:
    return cell.record(
        status="done",
        epsilon_spent=_finite(result.epsilon),
        epsilon_server=_finite(result.epsilon_server),
        epsilon_achieved=_finite(result.achieved.epsilon),
        accuracy=_finite(result.metrics.get("accuracy")),
        accuracy_error=_finite(result.metrics.get("accuracy_error")),
        macro_f1=_finite(result.metrics.get("macro_f1")),
        rounds=len(result.rounds),
        refused=sum(merchant.refused is not None for merchant in result.merchants),
        seconds=result.seconds,
        peak_mib=result.peak_mib,
        notes=[note for note in result.notes if note not in known],
        events=_planned(cell.contract),
    )


def _planned(contract: Contract) -> list[dict[str, Any]]:
    try:
        return [to_document(event) for event in plan_of(contract).events()]
    except AccountingError:
        return []  # without a plan no merchant computes anything


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def record_path(out: Path, key: str) -> Path:
    """Return where a cell's record is kept."""
    return out / "cells" / f"{key}.json"


def write_record(record: Record, out: Path) -> None:
    """Keep a record, whole or not at all.

    Raises:
        HansaError: It cannot be written.
    """
    text = record.model_dump_json(indent=2) + "\n"
    write_whole(record_path(out, record.key), text.encode())


def read_records(out: Path) -> dict[str, Record]:
    """Read every record of a sweep's folder, by key.

    Raises:
        DataError: A file of it is no record.
    """
    found = {}
    for path in sorted((out / "cells").glob("*.json")):
        try:
            record = Record.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            what = error.strerror if isinstance(error, OSError) else "it is no whole record"
            raise DataError(
                f"{path}: cannot be read ({what}); delete it, and its run is made again"
            ) from None
        if record.key != path.stem:
            raise DataError(f"{path}: holds the record of another cell; delete it")
        found[record.key] = record
    return found
