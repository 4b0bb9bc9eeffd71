"""The run: attest, census, training rounds, evaluations, profiles.

The coordinator sees noisy sums only (where the contract says `secure = false`, each merchant's
single noisy vector too). It never asks for, and never receives, an exact figure.

Between two sums everything that another process needs to go on is one checkpoint. What was
asked after it is asked again, word by word, and answered the same: a run that is taken up ends
in the same model.
"""

import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from common.accounting import RunningEpsilon, covers, epsilon
from common.contract import Contract
from common.errors import ArchiveError, RunError, SecureSumError
from common.events import Event, to_document
from common.fixed_point import Lattice, from_lattice
from common.identity import Members
from common.network import parameters_sha256
from common.plan import (
    CENSUS,
    EVALUATION,
    PROFILE,
    UPDATE,
    Release,
    evaluation_rounds,
    lattice_of,
    plan_of,
)
from common.start import starting_parameters
from common.wire import SumRequest
from server import checkpoint
from server.archive import Archive
from server.asking import LatticeSum, Run, Sums
from server.attendance import Attendance
from server.circumstances import SIMULATED, Circumstances, Stopped, go_on
from server.cohort import Cohort
from server.optimizers import Optimizer
from server.outcome import NoisySum, Outcome, RoundReport
from server.plain_sums import PlainSums
from server.stages import Grid, Patience
from server.sums import SecureSums

_NOTHING = ("", 0, 0)


class Coordinator:
    """One run over a Flower grid.

    Args:
        grid: Where the merchants' nodes are reached.
        contract: The contract of the run.
        on_round: Called after every training round.
        members: Who is enrolled, and pinned this coordinator as witness.
        archive: The coordinator's own folder.
        circumstances: Of a deployed run.
        start: What lies beside the contract, where it names parameters to start from.

    Raises:
        RunError: The members pinned another witness, or the run cannot be recorded.
        ContractError: `start` is not what the contract names.
    """

    def __init__(  # noqa: PLR0913, PLR0917  # the last two for the rare caller
        self,
        grid: Grid,
        contract: Contract,
        on_round: Callable[[RoundReport], None],
        members: Members,
        archive: Archive,
        circumstances: Circumstances = SIMULATED,
        start: bytes | None = None,
    ) -> None:
        archive.check_pinned(members)
        self._start = None if contract.model.start is None else start
        begin = starting_parameters(contract, start)
        self._contract = contract
        self._sha256 = contract.sha256
        self._on_round = on_round
        self._plan = plan_of(contract)
        self._running = RunningEpsilon(self._plan.events(), contract.privacy.delta)
        self._per_merchant = 0.0  # noisy training customers of a merchant, from the census
        self._most_customers = 0.0  # all that there may be, noise allowed for
        self._keeper, self._wait_s = circumstances.keeper, circumstances.wait_s
        run = secrets.token_hex(8) if self._keeper is None else self._keeper.run
        self._outcome = Outcome(run, begin, 0.0)
        self._optimizer = Optimizer(contract.training, self._outcome.parameters)
        self._asking = _NOTHING  # the attempt at a sum that is under way
        self._asked: set[str] = set()  # merchants that may have been asked in it
        self._done: set[tuple[str, int]] = set()  # sums that came about, or were given up
        self._cohort = Cohort(
            grid,
            Patience(contract.federation.round_timeout_s, circumstances.resend_s),
            archive.witness,
            members,
            refusals=self._outcome.refusals,
            failures=self._outcome.failures,
            on_wait=self._beat,
        )
        exchanged = archive.witness.exchanged(members.keys) if circumstances.enrolled.nodes else ()
        self._attendance = Attendance(
            self._cohort, contract, run, circumstances.enrolled, frozenset(exchanged)
        )
        known = None if self._keeper is None else self._keeper.checkpoint
        self._record = archive.record(run, goes_on=self._keeper is not None)
        common = Run(run, contract, self._cohort, self._take_late, self._save)
        self._sums: Sums = (
            SecureSums(common, self._record) if contract.aggregation.secure else PlainSums(common)
        )
        if known is not None:
            self._restore(checkpoint.from_bytes(known))

    def run(self) -> Outcome:
        """Carry out the whole contract, or what is left of it.

        Raises:
            RunError: Too few merchants take part or answer; the message says who and why.
        """
        training, outcome = self._contract.training, self._outcome
        if not outcome.merchants:
            self._begin()
        if self._is_due(CENSUS, 0):
            self._census()
        self._check_room()
        evaluated = set(evaluation_rounds(self._contract))
        for number in range(1, training.rounds + 1):
            self._round(number, evaluated)
        outcome.parameters = self._optimizer.published
        if self._plan.profile is not None and self._is_due(PROFILE, training.rounds):
            outcome.profile = self._sum_or_nothing(PROFILE, training.rounds, outcome.parameters)
            self._finish(PROFILE, training.rounds)
        if self._is_due("end", 0):
            self._record.end(parameters_sha256(outcome.parameters))
            self._finish("end", 0)
        return outcome

    def _is_due(self, stage: str, number: int) -> bool:
        return (stage, number) not in self._done

    def _finish(self, stage: str, number: int) -> None:
        self._done.add((stage, number))
        self._save()

    def _begin(self) -> None:
        """Find out who takes part."""
        outcome = self._outcome
        self._attendance.gather(self._wait_s, self._tell)
        outcome.repeatable = self._attendance.repeatable
        outcome.merchants = sorted(self._cohort.members.values())
        first = parameters_sha256(outcome.parameters)
        self._record.start(outcome.run, self._contract, outcome.merchants, first, self._start)
        self._save()

    def _take_late(self) -> None:
        """Take in merchants that came when the run was under way."""
        came = self._attendance.late()
        self._outcome.repeatable |= self._attendance.repeatable
        new = sorted({*came} - {*self._outcome.merchants})
        if new:
            self._outcome.merchants = sorted([*self._outcome.merchants, *new])
            self._record.late(new)

    def _census(self) -> None:
        outcome = self._outcome
        census = self._sum(CENSUS, 0, outcome.parameters)
        outcome.customers = max(float(census.total[0]), 1.0)
        most = float(census.total[0]) + 6 * census.stddev
        self._most_customers = most / (1 - self._contract.training.held_out)
        self._per_merchant = outcome.customers / len(census.merchants)
        self._finish(CENSUS, 0)

    def _round(self, number: int, evaluated: set[int]) -> None:
        """Carry out what is left of a training round."""
        outcome, optimizer, rounds = self._outcome, self._optimizer, self._contract.training.rounds
        update, evaluation = self._is_due(UPDATE, number), None
        if update:
            found = self._sum(UPDATE, number, optimizer.theta)
            optimizer.step(self._gradient(found))
            outcome.cohorts.append(len(found.merchants))
            self._finish(UPDATE, number)
        evaluate = number in {*evaluated, rounds} and self._is_due(EVALUATION, number)
        if evaluate:
            ask = self._sum if number == rounds else self._sum_or_nothing
            evaluation = ask(EVALUATION, number, optimizer.published)
            if evaluation is not None:
                outcome.evaluations.append(evaluation)
            self._finish(EVALUATION, number)
        if update or evaluate:
            cohort = outcome.cohorts[-1]
            self._on_round(RoundReport(number, rounds, cohort, self._spent(), evaluation))

    def _save(self) -> None:
        """Keep a checkpoint, then write down what was noted: it may be lost, never foretold."""
        if self._keeper is not None:
            outcome = self._outcome
            self._keeper.save(
                self._checkpoint(),
                round=self._optimizer.steps,
                epsilon=self._spent() if outcome.events else 0.0,
                cohort=len(self._cohort.members),
            )
            self._keeper.attendance(self._attendance.states())
        self._record.flush()

    def _checkpoint(self) -> bytes:
        optimizer = {name: checkpoint.to_text(one) for name, one in self._optimizer.state.items()}
        return checkpoint.to_bytes(
            {
                "contract": self._sha256,
                "outcome": self._outcome.document,
                "per_merchant": self._per_merchant,
                "most_customers": self._most_customers,
                "steps": self._optimizer.steps,
                "optimizer": optimizer,
                "done": sorted([stage, number] for stage, number in self._done),
                "members": {str(node): name for node, name in self._cohort.members.items()},
                "asking": list(self._asking),
                "paying": sorted(self._asked),
                "asked": sorted(self._attendance.asked),
                "pinned": self._attendance.pinned,
                "accusers": {name: sorted(by) for name, by in self._cohort.accusers.items()},
                "sums": self._sums.state,
                "record": self._record.pending,
            }
        )

    def _restore(self, document: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        if document["contract"] != self._sha256:
            raise RunError(
                f"run {self._outcome.run} was begun under contract {document['contract'][:16]}…, "
                f"the federation's is {self._sha256[:16]}… by now; start a new run"
            )
        self._outcome.restore(document["outcome"])
        self._per_merchant = float(document["per_merchant"])
        self._most_customers = float(document["most_customers"])
        arrays = {name: checkpoint.from_text(text) for name, text in document["optimizer"].items()}
        self._optimizer.restore(int(document["steps"]), arrays)
        self._done = {(stage, int(number)) for stage, number in document["done"]}
        self._asked = {*document["paying"], *document["members"].values()}
        enrolled = self._cohort.enrolled.keys
        self._cohort.members.update(
            {int(node): name for node, name in document["members"].items() if name in enrolled}
        )
        stage, number, attempt = document["asking"]
        self._asking = (stage, int(number), int(attempt))
        self._attendance.asked.update(document["asked"])
        self._attendance.pinned.update(document["pinned"])
        self._attendance.repeatable = self._outcome.repeatable
        for name, by in document["accusers"].items():
            self._cohort.accusers[name] = {*by}
        try:
            self._sums.restore(document["sums"])
        except SecureSumError as error:  # somebody was revoked meanwhile: set up a new session
            self._cohort.failures["the session of before"] = str(error)
        self._record.restore(document["record"])
        self._record.flush()

    def _tell(self, message: str) -> None:
        """Say what the run waits for.

        Raises:
            Stopped: It was asked to stop.
        """
        if self._keeper is not None:
            self._keeper.attendance(self._attendance.states())
            go_on(self._keeper, message)

    def _beat(self) -> None:
        """Say that the run goes on.

        Raises:
            Stopped: It was asked to stop.
        """
        if self._keeper is not None:
            go_on(self._keeper)

    def _sum_or_nothing(
        self, stage: str, number: int, parameters: Float[np.ndarray, " P"]
    ) -> NoisySum | None:
        """Ask for a sum that a run can do without; note why it is missing.

        Raises:
            ArchiveError: What was asked cannot be recorded: merchants may have been charged for
                a sum that no record tells of, so nothing of the run may be published.
        """
        try:
            return self._sum(stage, number, parameters)
        except (ArchiveError, Stopped):
            raise
        except RunError as error:
            self._outcome.failures[f"{stage} of round {number}"] = str(error)
            return None

    def _check_room(self) -> None:
        """End the run where sums could be larger than the ring.

        Raises:
            RunError: They could.
        """
        aggregation, customers = self._contract.aggregation, self._outcome.customers
        if self._most_customers > aggregation.max_customers:
            raise RunError(
                f"the federation has about {customers:,.0f} training customers (noisy); the "
                f"contract has room for {aggregation.max_customers:,} customers "
                "(aggregation.max_customers)"
            )

    def _sum(self, stage: str, number: int, parameters: Float[np.ndarray, " P"]) -> NoisySum:
        """Ask for one sum; where too few answer, it is asked for anew, with fresh noise."""
        release = self._plan.release_of(stage, number, self._contract.training.rounds)
        if release is None:
            raise RunError(f"the contract knows no stage '{stage}'")
        lattice = lattice_of(release, self._contract)
        for attempt in range(self._first(stage, number), self._contract.training.spare_rounds + 1):
            self._beat()
            again = self._asking == (stage, number, attempt)  # an earlier process may have asked
            if len(self._cohort.members) < self._contract.min_survivors and not again:
                break  # nobody pays for an attempt that cannot succeed
            self._check_affordable(stage, number, release.event)
            request = SumRequest(
                self._outcome.run,
                self._sha256,
                stage,
                number,
                attempt,
                self._per_merchant,
                0,
                0,
                b"",
                b"",
                b"",
                parameters,
            )
            if not again:
                self._announce(stage, number, attempt)
            self._asked |= {*self._cohort.members.values()}
            try:
                found = self._sums.ask(request, release.length, lattice)
            except SecureSumError as error:
                self._cohort.failures[f"{stage} of round {number}"] = str(error)
                if not again:
                    continue
                found = None  # merchants may have paid
            self._asked |= {*self._cohort.members.values()}  # and those that came meanwhile
            self._record_sum(request, release.event, found, lattice)
            self._outcome.events.append((stage, release.event))
            self._outcome.occasions.append((stage, number, attempt))
            self._outcome.survivors.append(None if found is None else found.fewest)
            self._asking = _NOTHING
            if found is not None:
                return self._decoded(release, number, found, lattice)
            self._save()
        raise RunError(
            f"{stage} of round {number}: too few merchants answered, the contract needs "
            f"{self._contract.min_survivors} (aggregation.min_survivors)"
            f"{self._cohort.reasons()}"
        )

    def _first(self, stage: str, number: int) -> int:
        """Return the first attempt at a sum that is not over."""
        if self._asking[:2] == (stage, number):
            return self._asking[2]
        over = [a for s, n, a in self._outcome.occasions if (s, n) == (stage, number)]
        return max(over, default=-1) + 1

    def _announce(self, stage: str, number: int, attempt: int) -> None:
        """Keep what is about to be asked."""
        self._asking, self._asked = (stage, number, attempt), set()
        if self._keeper is not None:
            self._save()

    def _record_sum(
        self,
        request: SumRequest,
        event: Event,
        found: LatticeSum | None,
        lattice: Lattice,
    ) -> None:
        self._record.sum(
            None if found is None else found.total,
            stage=request.stage,
            round=request.round,
            attempt=request.attempt,
            event=to_document(event),
            customers_per_merchant=request.customers_per_merchant,
            parameters=parameters_sha256(request.parameters),
            asked=sorted(self._asked),
            merchants=None if found is None else sorted(found.merchants),
            fewest=None if found is None else found.fewest,
            lattice_step=lattice.step,
        )

    def _check_affordable(self, stage: str, number: int, event: Event) -> None:
        """Refuse to ask for more than the contract promises, whatever merchants would pay."""
        promised, delta = self._contract.privacy.epsilon, self._contract.privacy.delta
        events = [*(event for _, event in self._outcome.events), event]
        if covers(self._plan.events(), events):
            return
        after = epsilon(events, delta)
        if after > promised * (1 + 1e-9):
            raise RunError(
                f"{stage} of round {number}: after failed attempts the run would reach epsilon "
                f"{after:.4g}, the contract promises {promised:.4g}{self._cohort.reasons()}"
            )

    def _decoded(
        self, release: Release, number: int, found: LatticeSum, lattice: Lattice
    ) -> NoisySum:
        share = release.event.noise_multiplier * release.sensitivity
        stddev = share * np.sqrt(len(found.merchants) / self._contract.noise_contributors)
        parts = {name: from_lattice(part, lattice.step) for name, part in found.parts.items()}
        total = from_lattice(found.total, lattice.step)
        return NoisySum(release.stage, number, total, float(stddev), found.merchants, parts)

    def _gradient(self, update: NoisySum) -> Float[np.ndarray, " P"]:
        """Return the averaged gradient that the optimizer follows."""
        if self._contract.training.mode == "distributed":
            return update.total / (self._per_merchant * len(update.merchants))
        return -update.total / len(update.merchants)

    def _spent(self) -> float:
        """Return an upper bound on epsilon so far; after the last round what will be claimed."""
        events = [event for _, event in self._outcome.events]
        if self._optimizer.steps >= self._contract.training.rounds:
            return epsilon(events, self._contract.privacy.delta)
        return self._running.bound(events)
