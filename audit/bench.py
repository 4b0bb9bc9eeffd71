"""What every test of the mechanism uses: a result, kinds of releases, the subject on a bench."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, UInt

from audit.subject import Merchant, Question, Subject, Table, noise_shares
from common.contract import Contract
from common.events import Event
from common.fixed_point import SMOOTHING_STEPS, Lattice
from common.network import Network, network_of
from common.plan import UPDATE, Release, evaluation_rounds, lattice_of, plan_of

FALSE_ALARM = 1e-4  # of all random tests together
PER_TEST = FALSE_ALARM / 100
_SPREAD = 2.0  # noise of a local step, of the 64 that an update is clipped to; less for several
_ROUNDING = 1e-9  # relative slack of comparisons without noise
_BATCH = 3  # sampled releases of one ledger: every further one is another sum for two accountants


@dataclass(frozen=True)
class Check:
    """One test and what it found.

    Attributes:
        name: What was tested, in a few words.
        statistic: The number that was looked at.
        expected: What it should be (random tests), or the most it may be.
        p_value: Chance of a deviation like this if all is well; None where nothing is random.
        passed: Whether that is well.
        sentence: The same for people.
    """

    name: str
    statistic: float
    expected: float
    p_value: float | None
    passed: bool
    sentence: str

    @property
    def false_alarm_rate(self) -> float:
        """Chance that the test fails although all is well."""
        return 0.0 if self.p_value is None else PER_TEST


def random_check(name: str, statistic: float, expected: float, p_value: float, text: str) -> Check:
    """Return what a random test found; it fails where the p-value is below `PER_TEST`."""
    return Check(name, statistic, expected, p_value, p_value >= PER_TEST, text)


def certain_check(name: str, statistic: float, most: float, text: str) -> Check:
    """Return what a test without chance found; it fails where the number is above `most`."""
    return Check(name, statistic, most, None, statistic <= most * (1 + _ROUNDING), text)


@dataclass(frozen=True)
class Kind:
    """One kind of release, and how its numbers are read.

    Attributes:
        label: What checks call it.
        release: What the plan says of it.
        rounds: The rounds of a run in which it is asked for.
        lattice: How its numbers travel.
        unit: What one multiple of the lattice step stands for, in the unit of the sum.
        average: Customers a merchant, as the request says.
        shares: Noise shares that have to make up the noise.
    """

    label: str
    release: Release
    rounds: tuple[int, ...]
    lattice: Lattice
    unit: float
    average: float
    shares: int

    @cached_property
    def sensitivity(self) -> float:
        """What one customer may move the rounded sum by, in L2, in its unit."""
        return self.release.sensitivity

    @cached_property
    def stddev(self) -> float:
        """Noise that one merchant must add: docs/privacy-model.md, "Integer noise", in the unit."""
        fine = self.release.event.sensitivity / self.release.steps
        share = self.release.event.noise_multiplier * self.sensitivity / math.sqrt(self.shares)
        return math.hypot(share, SMOOTHING_STEPS * fine)

    def decoded(self, vector: UInt[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        """Return what a ring vector stands for, in the unit of the sum."""
        return self.lattice.from_ring(vector) * self.unit


@dataclass(frozen=True)
class Bench:
    """The subject, the contract it is tried with, and what is drawn at random."""

    subject: Subject
    contract: Contract
    seed: int | None
    random: np.random.Generator

    @cached_property
    def network(self) -> Network:
        """Shape of the model."""
        return network_of(self.contract)

    @property
    def update(self) -> Kind:
        """The training update."""
        return next(kind for kind in self.kinds if kind.release.stage == UPDATE)

    @cached_property
    def kinds(self) -> tuple[Kind, ...]:
        """Every kind of release of a run."""
        plan, rounds = plan_of(self.contract), self.contract.training.rounds
        evaluated = evaluation_rounds(self.contract)[:-1]
        found = [
            self._kind("census", plan.census, (0,)),
            self._kind("update", plan.update, tuple(range(1, rounds + 1))),
            self._kind("last evaluation", plan.final_evaluation, (rounds,)),
        ]
        if evaluated:
            found.append(self._kind("evaluation", plan.evaluation, evaluated))
        if plan.profile is not None:
            found.append(self._kind("profile", plan.profile, (rounds,)))
        return tuple(found)

    def _kind(self, label: str, release: Release, rounds: tuple[int, ...]) -> Kind:
        lattice, shares = lattice_of(release, self.contract), noise_shares(self.contract)
        kind = Kind(label, release, rounds, lattice, lattice.step, 1.0, shares)
        training = self.contract.training
        if release.stage != UPDATE or training.mode == "distributed":
            return kind
        # a local update is -rate / batch times the noisy sums: choose how large its noise is
        rate, steps = training.local_learning_rate, training.local_steps
        spread = _SPREAD if steps == 1 else _SPREAD / 8 / math.sqrt(steps)
        average = max(1.0, rate * kind.stddev / (spread * training.sampling_rate))
        unit = -lattice.step * average * training.sampling_rate / rate
        return Kind(label, release, rounds, lattice, unit, average, shares)

    def merchant(self, name: str, table: Table, *, same_noise: bool = False) -> Merchant:
        """Return a merchant; with `same_noise` its noise is that of its namesakes."""
        return self.subject.merchant(self.contract, name, table, 1 if same_noise else self.seed)

    def answers(
        self, name: str, table: Table, questions: Sequence[Question], *, same_noise: bool = False
    ) -> tuple[list[UInt[np.ndarray, " P"]], list[Event]]:
        """Ask a merchant, and return its answers and what its ledger was charged for them.

        Poisson-sampled releases go to a new ledger every now and then: each further one in the
        same ledger takes two accountants a tenth of a second.
        """
        sampled = self.contract.training.sampling_rate < 1.0
        batch = _BATCH if sampled else max(len(questions), 1)
        answers, charged = [], list[Event]()
        for start in range(0, len(questions), batch):
            merchant = self.merchant(name, table, same_noise=same_noise)
            answers += [merchant.answer(asked) for asked in questions[start : start + batch]]
            charged += merchant.charged()
        return answers, charged


def question(kind: Kind, number: int, parameters: Float[np.ndarray, " P"]) -> Question:
    """Return the request for the `number`-th release of a kind, over as many runs as it takes."""
    run, turn = divmod(number, len(kind.rounds))
    return Question(
        f"{kind.label} {run}", kind.release.stage, kind.rounds[turn], kind.average, parameters
    )
