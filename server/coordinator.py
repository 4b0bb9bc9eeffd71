"""The run: attest, census, training rounds, evaluations, profiles.

The coordinator sees noisy sums only (and, until secure aggregation lands, each merchant's
single noisy vector). It never asks for, and never receives, an exact figure.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from flwr.serverapp import Grid
from jaxtyping import Float, Int

from common.accounting import epsilon
from common.contract import Contract
from common.errors import RunError, WireError
from common.events import Event
from common.fixed_point import from_lattice, lattice_step
from common.network import initial_parameters
from common.plan import (
    CENSUS,
    EVALUATION,
    LOCAL_STEP,
    PROFILE,
    UPDATE,
    Release,
    evaluation_rounds,
    plan_of,
)
from common.wire import (
    Attest,
    Attested,
    SumAnswer,
    SumRequest,
    pack,
    unpack_attested,
    unpack_sum_answer,
)
from server.optimizers import Optimizer
from server.stages import run_stage

MESSAGE_TYPES = {
    CENSUS: "query.census",
    UPDATE: "train.update",
    EVALUATION: "evaluate.confusion",
    PROFILE: "query.profile",
}
_LIMIT = 2**53  # of a number in an answer, in lattice steps


@dataclass(frozen=True)
class NoisySum:
    """A decoded sum over the merchants that answered, and the parts it was made of."""

    stage: str
    round: int
    total: Float[np.ndarray, " P"]
    stddev: float  # of the noise in each number of `total`
    parts: dict[str, Float[np.ndarray, " P"]]  # merchant -> its noisy part


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
    merchants: list[str] = field(default_factory=list)
    repeatable: bool = False  # a merchant's noise was seeded: not for release


class Coordinator:
    """One run over a Flower grid.

    Args:
        grid: Where the merchants' nodes are reached.
        contract: The contract of the run.
        on_round: Called after every training round.
    """

    def __init__(
        self, grid: Grid, contract: Contract, on_round: Callable[[RoundReport], None]
    ) -> None:
        self._grid = grid
        self._contract = contract
        self._sha256 = contract.sha256
        self._on_round = on_round
        self._plan = plan_of(contract)
        self._members: dict[int, str] = {}  # node -> merchant
        self._per_merchant = 0.0  # noisy training customers of a merchant, from the census
        self._outcome = Outcome(secrets.token_hex(8), initial_parameters(contract), 0.0)

    def run(self) -> Outcome:
        """Carry out the whole contract.

        Raises:
            RunError: Too few merchants take part or answer; the message says who and why.
        """
        training, outcome = self._contract.training, self._outcome
        self._attest()
        census = self._sum(CENSUS, 0, outcome.parameters)
        outcome.customers = max(float(census.total[0]), 1.0)
        self._per_merchant = outcome.customers / len(census.parts)
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
            outcome.cohorts.append(len(update.parts))
            self._on_round(
                RoundReport(number, training.rounds, len(update.parts), self._spent(), evaluation)
            )
        outcome.parameters = optimizer.published
        if self._plan.profile is not None:
            outcome.profile = self._sum_or_nothing(PROFILE, training.rounds, outcome.parameters)
        return outcome

    def _sum_or_nothing(
        self, stage: str, number: int, parameters: Float[np.ndarray, " P"]
    ) -> NoisySum | None:
        """Ask for a sum that a run can do without; note why it is missing."""
        try:
            return self._sum(stage, number, parameters)
        except RunError as error:
            self._outcome.failures[f"{stage} of round {number}"] = str(error)
            return None

    def _attest(self) -> None:
        """Ask every node whether it takes part; keep those that do."""
        nodes = sorted(self._grid.get_node_ids())
        content = pack(Attest(self._outcome.run, self._sha256))
        result = run_stage(self._grid, "query.attest", lambda: content, nodes, self._timeout_s)
        self._note_failures(result.errors, result.silent)
        refusals: dict[int, Attested] = {}
        for node, record in result.contents.items():
            try:
                answer = unpack_attested(record)
            except WireError as error:
                self._outcome.failures[f"node {node}"] = str(error)
                continue
            if answer.refusal:
                refusals[node] = answer
            elif answer.merchant in self._members.values():
                self._outcome.failures[f"node {node}"] = (
                    f"a second node called itself '{answer.merchant}'; it was left out"
                )
            else:
                self._members[node] = answer.merchant
                self._outcome.repeatable |= answer.repeatable
        self._note_refusals(refusals)
        needed = self._contract.min_survivors
        if len(self._members) < needed:
            raise RunError(
                f"{len(self._members)} of {len(nodes)} merchants take part, the contract needs "
                f"{needed} (aggregation.min_survivors){self._reasons()}"
            )
        self._outcome.merchants = sorted(self._members.values())

    def _note_refusals(self, refusals: dict[int, Attested]) -> None:
        """Keep the reasons; a refusal in the name of one that takes part is its node's own."""
        for node, answer in refusals.items():
            if answer.merchant in self._members.values():
                self._outcome.failures[f"node {node}"] = (
                    f"refused in the name of '{answer.merchant}', which takes part"
                )
            else:
                self._outcome.refusals[answer.merchant] = answer.refusal

    def _sum(self, stage: str, number: int, parameters: Float[np.ndarray, " P"]) -> NoisySum:
        """Ask for one sum; a sum of too few parts is thrown away and asked for anew."""
        release = self._plan.release_of(stage, number, self._contract.training.rounds)
        if release is None:
            raise RunError(f"the contract knows no stage '{stage}'")
        answers: dict[str, Int[np.ndarray, " P"]] = {}
        for attempt in range(self._contract.training.spare_rounds + 1):
            if len(self._members) < self._contract.min_survivors:
                break  # nobody pays for an attempt that cannot succeed
            self._check_affordable(stage, number, release.event)
            request = SumRequest(
                self._outcome.run,
                self._sha256,
                stage,
                number,
                attempt,
                self._per_merchant,
                parameters,
            )
            answers = self._answers(request, release.length)
            self._outcome.events.append((stage, release.event))
            if len(answers) >= self._contract.min_survivors:
                return self._decoded(release, number, answers)
        raise RunError(
            f"{stage} of round {number}: only {len(answers)} merchants answered, the contract "
            f"needs {self._contract.min_survivors} (aggregation.min_survivors){self._reasons()}"
        )

    def _check_affordable(self, stage: str, number: int, event: Event) -> None:
        """Refuse to ask for more than the contract promises, whatever merchants would pay."""
        promised, delta = self._contract.privacy.epsilon, self._contract.privacy.delta
        after = epsilon([*(event for _, event in self._outcome.events), event], delta)
        if after > promised * (1 + 1e-9):
            raise RunError(
                f"{stage} of round {number}: after failed attempts the run would reach epsilon "
                f"{after:.4g}, the contract promises {promised:.4g}{self._reasons()}"
            )

    def _answers(self, request: SumRequest, length: int) -> dict[str, Int[np.ndarray, " P"]]:
        """Return the usable vectors by merchant; note why others are missing."""
        content = pack(request)
        result = run_stage(
            self._grid,
            MESSAGE_TYPES[request.stage],
            lambda: content,
            sorted(self._members),
            self._timeout_s,
        )
        self._note_failures(result.errors, result.silent)
        answers = {}
        for node, record in sorted(result.contents.items()):
            merchant = self._members[node]
            try:
                answer = unpack_sum_answer(record)
                self._check_answer(answer, merchant, length)
            except WireError as error:
                self._outcome.failures[merchant] = str(error)
                continue
            if answer.refusal:
                self._outcome.refusals[merchant] = answer.refusal
                del self._members[node]
            else:
                answers[merchant] = answer.vector
        return answers

    @staticmethod
    def _check_answer(answer: SumAnswer, merchant: str, length: int) -> None:
        if answer.merchant != merchant:
            raise WireError("field 'merchant': differs from what the node attested")
        if answer.refusal:
            return
        if answer.vector.shape != (length,):
            raise WireError(f"field 'vector': expected {length} numbers")
        # not by np.abs: that of the smallest int64 is itself
        if not np.all((answer.vector > -_LIMIT) & (answer.vector < _LIMIT)):
            raise WireError("field 'vector': a number is out of range")

    def _decoded(
        self, release: Release, number: int, answers: dict[str, Int[np.ndarray, " P"]]
    ) -> NoisySum:
        local_update = release.stage == UPDATE and self._contract.training.mode == "local"
        step = LOCAL_STEP if local_update else lattice_step(release.event.sensitivity)
        total = np.asarray(np.sum(list(answers.values()), axis=0, dtype=np.int64))
        share = release.event.noise_multiplier * release.event.sensitivity
        stddev = share * np.sqrt(len(answers) / self._contract.noise_contributors)
        parts = {merchant: from_lattice(vector, step) for merchant, vector in answers.items()}
        return NoisySum(release.stage, number, from_lattice(total, step), float(stddev), parts)

    def _gradient(self, update: NoisySum) -> Float[np.ndarray, " P"]:
        """Return the averaged gradient that the optimizer follows."""
        if self._contract.training.mode == "distributed":
            return update.total / (self._per_merchant * len(update.parts))
        return -update.total / len(update.parts)

    def _spent(self) -> float:
        return epsilon([event for _, event in self._outcome.events], self._contract.privacy.delta)

    def _note_failures(self, errors: dict[int, str], silent: set[int]) -> None:
        for node, reason in errors.items():
            self._outcome.failures[self._members.get(node, f"node {node}")] = reason
        for node in silent:
            name = self._members.get(node, f"node {node}")
            self._outcome.failures[name] = f"no answer within {self._timeout_s:g} s"

    def _reasons(self) -> str:
        reasons = {**self._outcome.failures, **self._outcome.refusals}
        shown = [_harmless(f"{name}: {reason}") for name, reason in sorted(reasons.items())][:5]
        more = f" (and {len(reasons) - 5} more)" if len(reasons) > 5 else ""
        return ("; " + "; ".join(shown) + more) if shown else ""

    @property
    def _timeout_s(self) -> float:
        return self._contract.federation.round_timeout_s


def _harmless(text: str) -> str:
    """Return a stranger's text on one line, without signs that move a terminal's cursor."""
    return "".join(sign if sign.isprintable() else " " for sign in text)[:300]
