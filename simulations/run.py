"""Contract and merchants -> a finished run: rounds through Flower, bundle, assignments, result."""

import math
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Context

from audit.epsilon import recompute
from clients.app import create_app as create_client_app
from clients.assignment import assign, write_assignments
from clients.worker import Worker
from common import statements
from common.accounting import PRV_ERROR, epsilon, opacus_epsilon
from common.bundle import read_bundle
from common.contract import Contract, contract_toml
from common.errors import AccountingError, DataError, RunError
from common.events import Event, merged, to_document
from common.identity import write_members
from common.ledger import Entry
from server.app import create_app as create_server_app
from server.coordinator import NoisySum, Outcome, RoundReport
from server.publishing import accuracy_of, epsilon_by_stage, publish
from simulations.federation import Federation, Member, training_customers
from simulations.grid import FIRST_NODE, Fault, run_in_process
from simulations.result import (
    Achieved,
    Collusion,
    MerchantRecord,
    RoundRecord,
    SegmentRecord,
    SimulationResult,
)

_OWN_NAMES = frozenset(
    {
        "contract.toml",
        "members.toml",
        "merchants",
        "bundle",
        "bundle.partial",
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
    ledgers must never be deleted.
    """
    if out.is_symlink() or not (out / "contract.toml").is_file():
        return False
    if not {path.name for path in out.iterdir()} <= _OWN_NAMES:
        return False
    return all(path.is_dir() for path in out.glob("merchants/*")) and all(
        path.name.startswith(("ledger.sqlite", "assignments.", ".assignments."))
        for path in out.glob("merchants/*/*")
    )


def simulate(
    federation: Federation, out: Path, on_round: OnRound, fault: Fault | None = None
) -> SimulationResult:
    """Run the federation and write bundle and assignments under `out`.

    Raises:
        DataError: No merchant has a customer to train on.
        RunError: Too few merchants take part or answer, or the coordinator counts merchants in a
            sum that did not confirm it.
        AccountingError: Two accountants disagree on what was spent.
    """
    began = time.monotonic()
    contract = federation.contract
    if not training_customers([member.table for member in federation.members]):
        raise DataError(
            f"{federation.data}: no merchant has a customer with a known segment to train on; is "
            f"segments.column = '{contract.segments.column}' right?"
        )
    records: list[RoundRecord] = []

    def report(round_report: RoundReport) -> None:
        records.append(_round_record(round_report, len(contract.segments.names)))
        on_round(records[-1], round_report.rounds)

    outcome = run_rounds(federation, out, report, fault)
    if contract.aggregation.secure:
        _check_survivors(federation, outcome)
    merchants, spending = _spending(federation, outcome)  # may refuse to claim an epsilon
    documents = publish(outcome, contract, out / "bundle", Ed25519PrivateKey.generate())
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
        notes=(*federation.notes, *_seed_notes(outcome), *_failure_notes(outcome)),
    )


def run_rounds(
    federation: Federation,
    out: Path,
    on_round: Callable[[RoundReport], None],
    fault: Fault | None = None,
) -> Outcome:
    """Carry out the contract through Flower, publish nothing.

    Raises:
        RunError: Too few merchants take part or answer.
    """
    outcomes: list[Outcome] = []
    (out / "contract.toml").write_text(contract_toml(federation.contract), encoding="utf-8")
    write_members(federation.enrolled, out / "members.toml")

    def finish(outcome: Outcome, _contract: Contract, _folder: Path) -> None:
        outcomes.append(outcome)

    def worker_of(context: Context) -> Worker:
        return federation.members[int(context.node_config["partition-id"])].worker

    run_in_process(
        create_server_app(on_round, finish),
        create_client_app(worker_of),
        len(federation.members),
        {"contract": str(out / "contract.toml"), "out": str(out / "bundle")},
        fault,
    )
    return outcomes[0]


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
    """Let every merchant assign its own customers, also those that refused to train."""
    bundle = read_bundle(out / "bundle")
    for member in federation.members:
        write_assignments(assign(bundle, member.table), out / "merchants" / member.merchant)


def _check_survivors(federation: Federation, outcome: Outcome) -> None:
    """Hold the coordinator's counts against what every merchant noted when it helped to unmask.

    Raises:
        RunError: The coordinator counts more merchants in a sum than one of them confirmed, or
            nobody confirmed a sum.
    """
    noted = {m.merchant: m.worker.ledger.survivors(outcome.run) for m in federation.members}
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

    def check(self) -> None:
        """Claim nothing that the other accountants do not confirm.

        Raises:
            AccountingError: An accountant disagrees by more than 2 %, beside the 0.01 that
                Opacus adds by design.
        """
        for name, other, allowance in (
            ("dp-accounting", self.recomputed, 0.0),
            ("Opacus", self.opacus, PRV_ERROR),
        ):
            allowed = allowance + _AGREEMENT * max(self.epsilon, 0.5)
            if not abs(other - self.epsilon) <= allowed:
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
        charged = [e for e in member.worker.ledger.entries(outcome.run) if e.kind == "charge"]
        absent = None if member.merchant in outcome.merchants else _absence(outcome, node)
        record = _merchant_record(member, outcome, charged, delta, absent)
        records.append(record)
        if record.epsilon > worst:
            worst, worst_events = record.epsilon, merged(entry.event for entry in charged)
    spending = _Spending(
        worst,
        max((record.epsilon_server for record in records), default=0.0),
        recompute([to_document(event) for event in worst_events], delta),
        opacus_epsilon(worst_events, delta),
    )
    spending.check()
    return tuple(records), spending


def _merchant_record(
    member: Member, outcome: Outcome, charged: list[Entry], delta: float, absent: str | None
) -> MerchantRecord:
    member.worker.ledger.close()
    accuracy = _own_accuracy(member, outcome.evaluations[-1])
    return MerchantRecord(
        id=member.merchant,
        customers=len(member.table.labels),
        epsilon=epsilon([entry.event for entry in charged], delta),
        epsilon_server=epsilon([entry.towards_server for entry in charged], delta),
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
