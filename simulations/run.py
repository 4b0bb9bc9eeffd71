"""Contract and merchants -> a finished run: rounds through Flower, bundle, assignments, result."""

import math
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from audit.epsilon import DP_ACCOUNTING, OPACUS, opinions
from clients.assignment import write_assignments
from clients.batches import in_batches
from clients.evidence import Books, write_books
from common import statements
from common.accounting import PRV_ERROR, assess, epsilon
from common.budget import Charge, RunAccount
from common.bundle import read_bundle
from common.errors import AccountingError, DataError, RunError
from common.events import Event, merged, to_document
from common.ledger_entries import read_ledger
from common.start import START
from server.archive import Archive, open_archive
from server.evidence import coordinator_evidence
from server.outcome import NoisySum, Outcome, RoundReport
from server.publishing import accuracy_of, epsilon_by_stage, publish
from simulations.engines import COHORT, Computing
from simulations.grid import FIRST_NODE, Fault
from simulations.members import SESSION, Federation, Member
from simulations.result import (
    Achieved,
    Collusion,
    MerchantRecord,
    RoundRecord,
    SegmentRecord,
    SimulationResult,
)
from simulations.rounds import run_rounds

_OWN_NAMES = frozenset(
    {
        "contract.toml",
        START,
        "members.toml",
        "merchants",
        "bundle",
        "bundle.partial",
        "server",
        "evidence",
        "report.html",
        "result.json",
    }
)
_AGREEMENT = 0.02  # relative difference between two accountants that is let pass

OnRound = Callable[[RoundRecord, int], None]  # (round, rounds of the contract)


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Make an empty folder for a simulation.

    Raises:
        DataError: The folder holds something; with `overwrite`, something other than an earlier
            simulation.
    """
    try:
        if out.exists() and any(out.iterdir()):
            if not overwrite:
                raise DataError(f"{out}: is not empty; choose another --out, or add --overwrite")
            if not _is_earlier_simulation(out):
                raise DataError(
                    f"{out}: holds something else than an earlier simulation; it is not "
                    "overwritten, choose another --out"
                )
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{out}: cannot be used as a folder ({error.strerror})") from None


def _is_earlier_simulation(out: Path) -> bool:
    """Tell whether all that the folder holds is what a simulation, finished or not, leaves.

    A federation's folder may hold a contract and a bundle too; its merchants' tables, files and
    ledgers must never be deleted, nor the key and the records of its coordinator, whose folder
    has no merchants' ledgers beside it.
    """
    if out.is_symlink() or not (out / "contract.toml").is_file():
        return False
    if (out / "server").exists() and not any(out.glob("merchants/*/ledger.sqlite")):
        return False
    if not {path.name for path in out.iterdir()} <= _OWN_NAMES:
        return False
    return all(path.is_dir() for path in out.glob("merchants/*")) and all(
        path.name.startswith(
            ("ledger.sqlite", "assignments.", ".assignments.", SESSION, f".{SESSION}.")
        )
        for path in out.glob("merchants/*/*")
    )


def simulate(
    federation: Federation,
    out: Path,
    on_round: OnRound,
    fault: Fault | None = None,
    computing: Computing = COHORT,
) -> SimulationResult:
    """Run the federation and write bundle, evidence and assignments under `out`.

    Merchants that were made of arrays have no tables, and assign nobody.

    Raises:
        DataError: No merchant has a customer to train on.
        RunError: Too few merchants take part or answer, or the coordinator counts merchants in a
            sum that did not confirm it.
        AccountingError: Two accountants disagree on what was spent.
    """
    began = time.monotonic()
    contract = federation.contract
    if not any(member.worker.training_customers for member in federation.members):
        hint = f"; is segments.column = '{contract.segments.column}' right?"
        raise DataError(
            f"{federation.data}: no merchant has a customer with a known segment to train on"
            f"{hint if federation.tables else ''}"
        )
    records: list[RoundRecord] = []

    def report(round_report: RoundReport) -> None:
        records.append(_round_record(round_report, len(contract.segments.names)))
        on_round(records[-1], round_report.rounds)

    outcome = run_rounds(federation, out, report, fault, computing)
    if contract.aggregation.secure:
        _check_survivors(federation, outcome)
    merchants, spending = _spending(federation, outcome)  # may refuse to claim an epsilon
    archive = open_archive(federation.server)
    documents = publish(outcome, contract, out / "bundle", archive.identity.key)
    archive.keep_bundle(outcome.run, out / "bundle")
    _write_evidence(federation, archive, outcome.run, out / "evidence")
    _assign_everywhere(federation, out)
    metrics, privacy = documents["metrics.json"], documents["privacy.json"]
    return SimulationResult(
        run=outcome.run,
        data=federation.data,
        contract=contract,
        seed=federation.seed,
        rounds=tuple(records),
        merchants=merchants,
        confusion=tuple(tuple(row) for row in metrics["confusion"]),
        metrics={
            name: metrics[name]
            for name in ("accuracy", "accuracy_error", "macro_f1")
            if metrics[name] is not None
        },
        segments=_segment_records(documents["segments.json"]["segments"]),
        epsilon=spending.epsilon,
        epsilon_server=spending.server,
        epsilon_recomputed=spending.recomputed,
        epsilon_opacus=spending.opacus,
        achieved=Achieved(**privacy["achieved"]),
        colluders=tuple(
            Collusion(told["colluders"], math.inf if told["epsilon"] is None else told["epsilon"])
            for told in privacy["colluders"]
        ),
        delta=contract.privacy.delta,
        spent=epsilon_by_stage(outcome, contract.privacy.delta),
        secure=contract.aggregation.secure,
        bundle=out / "bundle",
        seconds=time.monotonic() - began,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        notes=(*federation.notes, *_seed_notes(outcome), *spending.notes, *_failure_notes(outcome)),
    )


def _round_record(report: RoundReport, segments: int) -> RoundRecord:
    accuracy = None
    if report.evaluation is not None:
        counts = report.evaluation.total.reshape(segments, segments)
        accuracy = accuracy_of(counts, report.evaluation.stddev)
    return RoundRecord(
        report.round,
        report.cohort,
        report.epsilon,
        accuracy[0] if accuracy else None,
        accuracy[1] if accuracy else None,
    )


def _assign_everywhere(federation: Federation, out: Path) -> None:
    """Let every merchant that has a table assign its customers, also those that did not train."""
    bundle = read_bundle(out / "bundle")
    for merchant, table in federation.tables.items():
        write_assignments(bundle, in_batches(table), out / "merchants" / merchant)


def _write_evidence(federation: Federation, archive: Archive, run: str, folder: Path) -> None:
    """Write what an audit reads: the coordinator's evidence and every merchant's.

    The run is over: a merchant that did not settle it, because its sums are plain or it missed
    the last one, does so now.
    """
    contract = federation.contract
    coordinator_evidence(archive, federation.enrolled, folder / "server.zip")
    for member in federation.members:
        ledger, own = member.worker.ledger, _account_of(member, run)
        if own is not None and not own.settled:
            ledger.settle(run)
        stored = read_ledger(ledger.path, ledger.budget, ledger.identity.public)
        books = Books(stored, federation.enrolled, (contract,), member.min_cohort)
        write_books(books, ledger.identity, folder / "merchants" / f"{member.merchant}.zip")


def _account_of(member: Member, run: str) -> RunAccount | None:
    """Return what a merchant's ledger says of a run."""
    return member.worker.ledger.account().runs.get(run)


def _check_survivors(federation: Federation, outcome: Outcome) -> None:
    """Hold the coordinator's counts against what every merchant noted when it helped to unmask.

    Raises:
        RunError: The coordinator counts more merchants in a sum than one of them confirmed, or
            nobody confirmed a sum.
    """
    runs = {m.merchant: _account_of(m, outcome.run) for m in federation.members}
    noted = {name: {} if own is None else own.survivors for name, own in runs.items()}
    for (stage, number, attempt), claimed in zip(outcome.occasions, outcome.survivors, strict=True):
        if claimed is None:
            continue  # nothing was unmasked; counted as the fewest that the contract allows
        confirmed = {
            name: own[stage, number, attempt]
            for name, own in noted.items()
            if (stage, number, attempt) in own
        }
        fewest = min(confirmed, key=lambda name: confirmed[name], default="")
        if not fewest or claimed > confirmed[fewest]:
            told = f"'{fewest}' confirmed {confirmed[fewest]}" if fewest else "nobody confirmed it"
            raise RunError(
                f"{stage} of round {number}: the coordinator counts {claimed} merchants in the "
                f"sum, {told}; nothing is claimed"
            )


@dataclass(frozen=True)
class _Spending:
    """Epsilon of the merchant that spent most, as three accountants see it."""

    epsilon: float
    server: float
    recomputed: float
    opacus: float
    notes: tuple[str, ...]  # what the accountants have to say

    def check(self) -> None:
        """Claim nothing that another accountant says is more.

        Raises:
            AccountingError: An accountant finds more by 2 %, beside the 0.01 that Opacus adds by
                design.
        """
        for name, other, allowance in (
            ("dp-accounting", self.recomputed, 0.0),
            ("Opacus", self.opacus, PRV_ERROR),
        ):
            allowed = allowance + _AGREEMENT * max(self.epsilon, 0.5)
            if math.isfinite(other) and not other - self.epsilon <= allowed:
                raise AccountingError(
                    f"accountants disagree: epsilon {self.epsilon:.4f} here, {other:.4f} by "
                    f"{name}; nothing is claimed"
                )


def _spending(
    federation: Federation, outcome: Outcome
) -> tuple[tuple[MerchantRecord, ...], _Spending]:
    """Return the merchants' records and the epsilon of the whole run.

    Read from the merchants' own ledgers, not from what the coordinator believes.
    """
    delta = federation.contract.privacy.delta
    records, worst_events, worst = [], tuple[Event, ...](), 0.0
    for node, member in enumerate(federation.members, start=FIRST_NODE):
        own = _account_of(member, outcome.run)
        charged = [] if own is None else list(own.released.values())
        absent = None if member.merchant in outcome.merchants else _absence(outcome, node)
        record = _merchant_record(member, outcome, charged, delta, absent)
        records.append(record)
        if record.epsilon > worst:
            worst, worst_events = record.epsilon, merged(charge.event for charge in charged)
    said = opinions([to_document(event) for event in worst_events], delta)
    failed = [f"{name} {what}" for name, what in said.items() if isinstance(what, str)]
    values = {name: math.inf if isinstance(v, str) else v for name, v in said.items()}
    spending = _Spending(
        worst,
        max((record.epsilon_server for record in records), default=0.0),
        values[DP_ACCOUNTING],
        values[OPACUS],
        (*assess(worst_events, delta).notes, *failed),
    )
    spending.check()
    return tuple(records), spending


def _merchant_record(
    member: Member, outcome: Outcome, charged: list[Charge], delta: float, absent: str | None
) -> MerchantRecord:
    member.worker.ledger.close()
    accuracy = _own_accuracy(member, outcome.evaluations[-1])
    return MerchantRecord(
        id=member.merchant,
        customers=member.worker.customers,
        epsilon=epsilon([charge.event for charge in charged], delta),
        epsilon_server=epsilon([charge.towards_server for charge in charged], delta),
        accuracy=accuracy[0] if accuracy else None,
        accuracy_error=accuracy[1] if accuracy else None,
        refused=outcome.refusals.get(member.merchant, absent),
    )


def _absence(outcome: Outcome, node: int) -> str:
    """Say why a node that did not refuse is not among the merchants of a run."""
    return outcome.failures.get(f"node {node}", "it gave no usable answer")


def _own_accuracy(member: Member, evaluation: NoisySum) -> tuple[float, float] | None:
    """Return accuracy as the merchant's own noisy message tells it, if it tells anything."""
    part = evaluation.parts.get(member.merchant)
    if part is None:
        return None
    segments = len(member.worker.contract.segments.names)
    stddev = evaluation.stddev / len(evaluation.merchants) ** 0.5
    return accuracy_of(part.reshape(segments, segments), stddev)


def _segment_records(segments: list[dict[str, object]]) -> tuple[SegmentRecord, ...]:
    return tuple(
        SegmentRecord(
            id=segment["id"],  # type: ignore[arg-type]
            name=segment["name"],  # type: ignore[arg-type]
            share=segment.get("share"),  # type: ignore[arg-type]
            share_error=segment.get("share_error"),  # type: ignore[arg-type]
            action=segment["action"],  # type: ignore[arg-type]
            profile=segment.get("profile", {}),  # type: ignore[arg-type]
        )
        for segment in segments
    )


def _seed_notes(outcome: Outcome) -> tuple[str, ...]:
    return (statements.NOT_FOR_RELEASE,) if outcome.repeatable else ()


def _failure_notes(outcome: Outcome) -> tuple[str, ...]:
    return tuple(f"{who}: {what}" for who, what in sorted(outcome.failures.items()))
