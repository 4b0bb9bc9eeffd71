"""A grid of simulations, every cell in a process of its own, kept one by one and resumable."""

import itertools
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from common.contract import Contract
from common.errors import ContractError, DataError
from common.service_lock import locked
from simulations.interrupts import deaf_to_interrupts
from simulations.sweep_cell import (
    Cell,
    Origin,
    Record,
    attempt,
    failed,
    read_records,
    record_path,
    write_record,
)

_LOCK, _RUNNING = ".lock", ".running-"
# imported once, before runs are forked
_AHEAD = ["simulations.sweep_cell", "simulations.federation", "simulations.run"]
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

OnRecord = Callable[[Cell, Record], None]


@dataclass(frozen=True)
class Axes:
    """The values of a grid; an empty axis has the contract's own value."""

    epsilons: tuple[float, ...] = ()
    clip_norms: tuple[float, ...] = ()
    sampling_rates: tuple[float, ...] = ()
    repetitions: int = 1


def grid(
    federations: Sequence[tuple[Origin, Contract]], axes: Axes, seed: int | None
) -> tuple[Cell, ...]:
    """Return every cell, all contracts validated; the first repetition of all comes first.

    Args:
        federations: One for each number of merchants, with the contract that the axes vary.
        axes: The other axes.
        seed: Of the noise of the first repetition; the others count on. None: fresh noise.

    Repetition i holds out the customers that `training.split_seed` + i chooses.

    Raises:
        ContractError: A value does not fit; the message names its axis.
    """
    cells = []
    for number in range(axes.repetitions):
        noise = None if seed is None else seed + number
        for origin, contract in federations:
            split = {"split_seed": contract.training.split_seed + number}
            for point in itertools.product(
                axes.epsilons or (contract.privacy.epsilon,),
                axes.clip_norms or (contract.privacy.clip_norm,),
                axes.sampling_rates or (contract.training.sampling_rate,),
            ):
                varied = _at(contract, *point).revised(training=split)
                cells.append(Cell(origin, varied, noise))
    return tuple({cell.key: cell for cell in cells}.values())


def _at(contract: Contract, epsilon: float, clip_norm: float, sampling_rate: float) -> Contract:
    if sampling_rate != 1.0 and contract.training.mode != "local":
        raise ContractError(
            f"sampling_rate {sampling_rate:g}: mode '{contract.training.mode}' takes all "
            "customers; sampling rates below 1 need mode 'local'"
        )
    for section, key, value in (
        ("privacy", "epsilon", epsilon),
        ("privacy", "clip_norm", clip_norm),
        ("training", "sampling_rate", sampling_rate),
    ):
        contract = contract.revised(f"{key} {value:g}", **{section: {key: value}})
    return contract


def sweep(
    cells: Sequence[Cell], out: Path, *, workers: int, keep: bool, on_record: OnRecord
) -> dict[str, Record]:
    """Run the cells of which `out` has no finished record; return all of its records, by key.

    Every finished cell is kept at once. Whatever ends this process ends the runs too, and the
    next call goes on with the cells that are missing or have failed.

    Args:
        cells: As `grid` returns them.
        out: New, empty, or the folder of an earlier sweep. Gets `cells/<key>.json`; for a process
            that died `logs/<key>.log`; with `keep` every run's folder, `runs/<key>/`.
        workers: Runs at a time, each in one thread of a process of its own.
        keep: Whether to keep the runs' folders, ledgers included.
        on_record: Told of every cell that came to an end, in the order in which they do.

    Raises:
        DataError: The folder holds something else, or a record that cannot be read.
        ServiceError: Another sweep runs there.
        HansaError: A record cannot be written.
    """
    if workers < 1:
        raise DataError(f"expected workers >= 1, got {workers}")
    _prepare(out)
    with locked(out, _LOCK):
        for left in out.glob(f"{_RUNNING}*"):
            shutil.rmtree(left, ignore_errors=True)  # of a sweep that was killed
        known = read_records(out)
        missing = [c for c in cells if c.key not in known or known[c.key].status != "done"]
        if missing:
            with tempfile.TemporaryDirectory(prefix=_RUNNING, dir=out) as running:
                places = Places(out, Path(running), keep)
                with closing(_run_all(missing, places, workers, known)) as ended:
                    for cell, record in ended:
                        known[cell.key] = record
                        on_record(cell, record)
    return known


def _prepare(out: Path) -> None:
    try:
        used = out.exists() and any(path.name != _LOCK for path in out.iterdir())
        if used and not (out / "cells").is_dir():
            raise DataError(f"{out}: holds something else than a sweep; choose another --out")
        (out / "cells").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be used as a folder ({error.strerror})") from None


@dataclass(frozen=True)
class Places:
    """Where the runs of a sweep work, and where they leave what is kept."""

    out: Path
    running: Path
    keep: bool

    def folder(self, cell: Cell) -> Path:
        """Return where a cell's run works."""
        return self.running / cell.key

    def running_log(self, cell: Cell) -> Path:
        """Return where a run's process writes what it has to say."""
        return self.running / f"{cell.key}.log"

    def kept_log(self, cell: Cell) -> Path:
        """Return where that is kept of a process that died."""
        return self.out / "logs" / f"{cell.key}.log"


def _run_all(
    cells: Sequence[Cell], places: Places, workers: int, known: dict[str, Record]
) -> Generator[tuple[Cell, Record], None, None]:
    context = _fork_server()
    waiting, at_work = deque(cells), dict[Any, tuple[Cell, ForkServerProcess]]()
    try:
        while waiting or at_work:
            while waiting and len(at_work) < workers:
                cell = waiting.popleft()
                before = known[cell.key].attempts if cell.key in known else 0
                process = context.Process(target=_work, args=(cell, places, before), daemon=True)
                process.start()
                at_work[process.sentinel] = cell, process
            for sentinel in connection.wait(list(at_work)):
                cell, process = at_work.pop(sentinel)
                process.join()
                before = known[cell.key].attempts if cell.key in known else 0
                yield cell, _outcome(cell, process.exitcode or 0, places, before)
    finally:
        for _, process in at_work.values():
            process.kill()
        for _, process in at_work.values():
            process.join()


def _work(cell: Cell, places: Places, before: int) -> None:
    """Run one cell and keep its record; the target of a process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with places.running_log(cell).open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    folder = places.folder(cell)
    folder.mkdir()
    record = attempt(cell, folder)
    if places.keep:
        kept = places.out / "runs" / cell.key
        shutil.rmtree(kept, ignore_errors=True)  # of an attempt that failed
        kept.parent.mkdir(exist_ok=True)
        folder.replace(kept)
    else:
        shutil.rmtree(folder)
    write_record(record.model_copy(update={"attempts": before + 1}), places.out)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _outcome(cell: Cell, exit_code: int, places: Places, before: int) -> Record:
    """Return the record that a process left; if it died first, keep one that says so."""
    if exit_code == 0:
        places.kept_log(cell).unlink(missing_ok=True)
        return read_record(places.out, cell)
    log, kept = places.running_log(cell), places.kept_log(cell)
    said = log.read_text(encoding="utf-8", errors="replace").strip() if log.exists() else ""
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(f"{said}\n", encoding="utf-8")
    how = f"with exit code {exit_code}"
    if exit_code < 0:
        how = f"by {signal.Signals(-exit_code).name}"
        how += ", as when memory runs out" if exit_code == -signal.SIGKILL else ""
    last = f": {said.splitlines()[-1][:200]}" if said else ""
    record = failed(cell, f"its process was ended {how}{last} (all that it said: {kept})")
    record = record.model_copy(update={"attempts": before + 1})
    write_record(record, places.out)
    return record


def read_record(out: Path, cell: Cell) -> Record:
    """Read the record of a cell that was kept."""
    return Record.model_validate_json(record_path(out, cell.key).read_bytes())


def _fork_server() -> ForkServerContext:
    """Return what starts processes: each is forked from one that has imported everything.

    Its environment is set while it starts: one thread a run, this interpreter's modules (which
    Python 3.11 does not hand down to what is imported ahead), and no ear for Ctrl-C, which is
    this process' to hear.
    """
    from multiprocessing import forkserver

    context = get_context("forkserver")
    context.set_forkserver_preload(_AHEAD)
    own = {**dict.fromkeys(_THREADS, "1"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with _environment(own), deaf_to_interrupts():
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
