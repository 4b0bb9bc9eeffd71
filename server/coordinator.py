"""The run: attest, census, training rounds, evaluations, profiles.

The coordinator sees noisy sums only (where the contract says `secure = false`, each merchant's
single noisy vector too). It never asks for, and never receives, an exact figure.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.serverapp import Grid
from jaxtyping import Float

from common.accounting import epsilon
from common.contract import Contract
from common.errors import ArchiveError, RunError, SecureSumError, WireError
from common.events import Event, to_document
from common.fixed_point import Lattice, from_lattice, lattice_sensitivity
from common.identity import Members
from common.network import initial_parameters, parameters_sha256
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
from common.wire import Attest, Attested, SumRequest, pack, unpack
from server.archive import Archive
from server.cohort import Cohort
from server.optimizers import Optimizer
from server.sums import Ask, LatticeSum, PlainSums, SecureSums


@dataclass(frozen=True)
class NoisySum:
    """A decoded sum over the merchants that answered."""

    stage: str
    round: int
    total: Float[np.ndarray, " P"]
    stddev: float  # of the noise in each number of `total`
    merchants: tuple[str, ...]
    parts: dict[str, Float[np.ndarray, " P"]]  # merchant -> its noisy part; plain sums only


@dataclass(frozen=True)
class RoundReport:
    """What can be told about a round while the run goes on."""

    round: int
    rounds: int
    cohort: int
    epsilon: float  # spent so far by a merchant that answered everything
    evaluation: NoisySum | None


@dataclass
class Outcome:
    """What the coordinator knows at the end of a run."""

    run: str
    parameters: Float[np.ndarray, " P"]
    customers: float  # noisy number of training customers
    evaluations: list[NoisySum] = field(default_factory=list)
    profile: NoisySum | None = None
    cohorts: list[int] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)  # merchant -> reason
    failures: dict[str, str] = field(default_factory=dict)  # node or merchant -> what happened
    events: list[tuple[str, Event]] = field(default_factory=list)  # (stage, event) asked for
    occasions: list[tuple[str, int, int]] = field(default_factory=list)  # stage, round, attempt
    # merchants in the smallest part that was summed apart, event by event; None: none came of it
    survivors: list[int | None] = field(default_factory=list)
    merchants: list[str] = field(default_factory=list)
    repeatable: bool = False  # a merchant's noise was seeded: not for release


class Coordinator:
    """One run over a Flower grid.

    Args:
        grid: Where the merchants' nodes are reached.
        contract: The contract of the run.
        on_round: Called after every training round.
        members: Who is enrolled, and pinned this coordinator as witness.
        archive: The coordinator's own folder.

    Raises:
        RunError: The members pinned another witness, or the run cannot be recorded.
    """

    def __init__(
        self,
        grid: Grid,
        contract: Contract,
        on_round: Callable[[RoundReport], None],
        members: Members,
        archive: Archive,
    ) -> None:
        archive.check_pinned(members)
        self._contract = contract
        self._sha256 = contract.sha256
        self._on_round = on_round
        self._plan = plan_of(contract)
        self._per_merchant = 0.0  # noisy training customers of a merchant, from the census
        self._outcome = Outcome(secrets.token_hex(8), initial_parameters(contract), 0.0)
        self._cohort = Cohort(
            grid,
            contract.federation.round_timeout_s,
            archive.witness,
            members,
            refusals=self._outcome.refusals,
            failures=self._outcome.failures,
        )
        self._record = archive.record(self._outcome.run)
        self._ask: Ask = PlainSums(self._cohort, contract, self._outcome.run).ask
        if contract.aggregation.secure:
            self._ask = SecureSums(self._cohort, contract, self._outcome.run, self._record).ask

    def run(self) -> Outcome:
        """Carry out the whole contract.

        Raises:
            RunError: Too few merchants take part or answer; the message says who and why.
        """
        training, outcome = self._contract.training, self._outcome
        self._attest()
        census = self._sum(CENSUS, 0, outcome.parameters)
        outcome.customers = max(float(census.total[0]), 1.0)
        self._check_room(census)
        self._per_merchant = outcome.customers / len(census.merchants)
        optimizer = Optimizer(training, outcome.parameters)
        evaluated = set(evaluation_rounds(self._contract))
        for number in range(1, training.rounds + 1):
            update = self._sum(UPDATE, number, optimizer.theta)
            optimizer.step(self._gradient(update))
            evaluation = None
            if number == training.rounds:
                evaluation = self._sum(EVALUATION, number, optimizer.published)
            elif number in evaluated:
                evaluation = self._sum_or_nothing(EVALUATION, number, optimizer.published)
            if evaluation is not None:
                outcome.evaluations.append(evaluation)
            outcome.cohorts.append(len(update.merchants))
            self._on_round(
                RoundReport(
                    number, training.rounds, len(update.merchants), self._spent(), evaluation
                )
            )
        outcome.parameters = optimizer.published
        if self._plan.profile is not None:
            outcome.profile = self._sum_or_nothing(PROFILE, training.rounds, outcome.parameters)
        self._record.end(parameters_sha256(outcome.parameters))
        return outcome

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
        except ArchiveError:
            raise
        except RunError as error:
            self._outcome.failures[f"{stage} of round {number}"] = str(error)
            return None

    def _check_room(self, census: NoisySum) -> None:
        """End the run where sums could be larger than the ring."""
        aggregation, held_out = self._contract.aggregation, self._contract.training.held_out
        if (census.total[0] + 6 * census.stddev) / (1 - held_out) > aggregation.max_customers:
            raise RunError(
                f"the federation has about {census.total[0]:,.0f} training customers (noisy); the "
                f"contract has room for {aggregation.max_customers:,} customers "
                "(aggregation.max_customers)"
            )

    def _attest(self) -> None:
        """Ask every node whether it takes part; keep those that do."""
        cohort = self._cohort
        nodes = sorted(cohort.grid.get_node_ids())
        content = pack(Attest(self._outcome.run, self._sha256))
        refusals: dict[int, Attested] = {}
        for node, record in cohort.ask("query.attest", dict.fromkeys(nodes, content)).items():
            try:
                answer = unpack(Attested, record)
            except WireError as error:
                cohort.failures[f"node {node}"] = str(error)
                continue
            if answer.refusal:
                refusals[node] = answer
            elif answer.merchant in cohort.members.values():
                cohort.failures[f"node {node}"] = (
                    f"a second node called itself '{answer.merchant}'; it was left out"
                )
            elif len(cohort.members) == self._contract.max_merchants:
                cohort.failures[f"node {node}"] = (
                    f"the contract has room for {self._contract.max_merchants} merchants; it was "
                    "left out"
                )
            else:
                cohort.members[node] = answer.merchant
                self._outcome.repeatable |= answer.repeatable
        self._note_refusals(refusals)
        needed = self._contract.min_survivors
        if len(cohort.members) < needed:
            raise RunError(
                f"{len(cohort.members)} of {len(nodes)} merchants take part, the contract needs "
                f"{needed} (aggregation.min_survivors){cohort.reasons()}"
            )
        outcome = self._outcome
        outcome.merchants = sorted(cohort.members.values())
        first = parameters_sha256(outcome.parameters)
        self._record.start(outcome.run, self._contract, outcome.merchants, first)

    def _note_refusals(self, refusals: dict[int, Attested]) -> None:
        """Keep the reasons; a refusal in the name of one that takes part is its node's own."""
        for node, answer in refusals.items():
            if answer.merchant in self._cohort.members.values():
                self._cohort.failures[f"node {node}"] = (
                    f"refused in the name of '{answer.merchant}', which takes part"
                )
            else:
                self._cohort.refusals[answer.merchant] = answer.refusal

    def _sum(self, stage: str, number: int, parameters: Float[np.ndarray, " P"]) -> NoisySum:
        """Ask for one sum; where too few answer, it is asked for anew, with fresh noise."""
        release = self._plan.release_of(stage, number, self._contract.training.rounds)
        if release is None:
            raise RunError(f"the contract knows no stage '{stage}'")
        lattice = lattice_of(release, self._contract)
        for attempt in range(self._contract.training.spare_rounds + 1):
            if len(self._cohort.members) < self._contract.min_survivors:
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
            asked = sorted(self._cohort.members.values())
            try:
                found = self._ask(request, release.length, lattice)
            except SecureSumError as error:
                self._cohort.failures[f"{stage} of round {number}"] = str(error)
                continue
            self._record_sum(request, release.event, asked, found, lattice)
            self._outcome.events.append((stage, release.event))
            self._outcome.occasions.append((stage, number, attempt))
            self._outcome.survivors.append(None if found is None else found.fewest)
            if found is not None:
                return self._decoded(release, number, found, lattice)
        raise RunError(
            f"{stage} of round {number}: too few merchants answered, the contract needs "
            f"{self._contract.min_survivors} (aggregation.min_survivors)"
            f"{self._cohort.reasons()}"
        )

    def _record_sum(
        self,
        request: SumRequest,
        event: Event,
        asked: list[str],
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
            asked=asked,
            merchants=None if found is None else sorted(found.merchants),
            fewest=None if found is None else found.fewest,
            lattice_step=lattice.step,
        )

    def _check_affordable(self, stage: str, number: int, event: Event) -> None:
        """Refuse to ask for more than the contract promises, whatever merchants would pay."""
        promised, delta = self._contract.privacy.epsilon, self._contract.privacy.delta
        after = epsilon([*(event for _, event in self._outcome.events), event], delta)
        if after > promised * (1 + 1e-9):
            raise RunError(
                f"{stage} of round {number}: after failed attempts the run would reach epsilon "
                f"{after:.4g}, the contract promises {promised:.4g}{self._cohort.reasons()}"
            )

    def _decoded(
        self, release: Release, number: int, found: LatticeSum, lattice: Lattice
    ) -> NoisySum:
        sensitivity = lattice_sensitivity(release.event.sensitivity, release.length, release.steps)
        share = release.event.noise_multiplier * sensitivity
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
        return epsilon([event for _, event in self._outcome.events], self._contract.privacy.delta)
