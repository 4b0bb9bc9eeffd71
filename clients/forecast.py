"""What was spent, what is left, what a run will cost and what it may be good for. Pure.

Nothing here reads a customer. What fits into a cap is asked of the exact composition, again and
again (bisection): two runs of epsilon 1 together cost far less than epsilon 2.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from common.accounting import epsilon, gaussian_epsilon, mu_for, person_table, within
from common.budget import DAY_S, Account, Charge, RunAccount
from common.contract import Contract
from common.events import Event, GaussianSum, merged
from common.plan import UPDATE, Release, evaluation_rounds, plan_of

MOST_RUNS, MOST_ROUNDS = 1000, 100_000
DROWNED, WEAK = 4.0, 20.0  # signal over noise of a whole run; measured, docs/commands/merchant.md
_TOO_FEW = 4.0  # standard deviations below which a noisy count is not published
_ACCURACY = 0.5  # at which the error of a noisy accuracy is told
_SAMPLED_TRIES = 8  # each may take seconds
_SAMPLED_POINTS = 6

State = Literal["reserved", "finished", "settled", "expired"]
Whom = Literal["sums", "server"]
Verdict = Literal["drowned", "weak", "good"]


@dataclass(frozen=True)
class RunSpending:
    """What one run costs, as the ledger knows it."""

    run: str
    contract: str
    at: float  # seconds since 1970, of the latest entry
    reserved: float  # epsilon
    released: float
    charged: float  # what counts: the released where settled, else the reserved
    releases: int
    state: State  # finished: over, and settled before the next run begins
    expires_at: float | None  # by the merchant's clock; None: it counts for ever
    refusals: int


@dataclass(frozen=True)
class Spending:
    """An account as the next reservation will find it: what is over settled, what is old expired.

    Attributes:
        account: What the ledger adds up to.
        now: Seconds since 1970.
    """

    account: Account
    now: float

    @cached_property
    def old(self) -> frozenset[str]:
        """Return the runs that the next reservation will let expire, by this clock."""
        period = self.account.budget.refresh_days
        if period is None:
            return frozenset()
        runs = self.account.runs.items()
        return frozenset(run for run, own in runs if self.now - own.at >= period * DAY_S)

    @cached_property
    def next(self) -> Account:
        """Return the account with every run settled whose last sum was asked for."""
        runs = self.account.runs.items()
        over = {name: replace(own, settled=own.settled or own.finished) for name, own in runs}
        return replace(self.account, runs=over)

    def epsilon(self, charges: Iterable[Charge], whom: Whom = "sums") -> float:
        """Return epsilon of some charges at the policy's delta."""
        return epsilon(_events(charges, whom), self.account.budget.delta)

    @property
    def counted(self) -> list[Charge]:
        """Return what counts against the caps."""
        return [c for own in self.next.counted(self.old) for c in own.charged]

    @property
    def charged(self) -> list[Charge]:
        """Return what was ever charged."""
        return [c for own in self.next.runs.values() for c in own.charged]

    def purposes(self) -> dict[str, float]:
        """Return epsilon by stage, of what counts; the parts do not add up to the whole."""
        counted = self.next.counted(self.old)
        stages = dict.fromkeys(charge.stage for charge in self.counted)
        return {
            stage: self.epsilon(
                charge for own in counted for charge in own.charged_for(stage)
                if charge.stage == stage
            )
            for stage in stages
        }  # fmt: skip

    def runs(self) -> list[RunSpending]:
        """Return every run, the oldest first."""
        found = [self._run(name, own) for name, own in self.next.runs.items()]
        return sorted(found, key=lambda run: run.at)

    def _run(self, name: str, own: RunAccount) -> RunSpending:
        period = self.account.budget.refresh_days
        state: State = "settled" if own.settled else "reserved"
        if own.settled and not self.account.runs[name].settled:
            state = "finished"
        return RunSpending(
            run=name,
            contract=own.contract,
            at=own.at,
            reserved=self.epsilon(own.reserved),
            released=self.epsilon(own.released.values()),
            charged=self.epsilon(own.charged),
            releases=len(own.released),
            state="expired" if own.expired or name in self.old else state,
            expires_at=None if period is None else own.at + period * DAY_S,
            refusals=self.account.refusals.get(name, 0),
        )

    def refusal_of(self, charges: Iterable[Charge]) -> str:
        """Return why the caps do not allow further charges, or nothing."""
        return self.next.refusal_of(charges, self.old)

    def left(self, further: Iterable[Charge] = ()) -> float:
        """Return epsilon of the largest sum over all customers that fits after `further`.

        The cap is on the composition, so this is more than the cap less what was spent. Other
        caps than the one on the whole are not looked at.
        """
        budget = self.account.budget
        events = merged(_events([*self.counted, *further], "sums"))
        if all(isinstance(event, GaussianSum) for event in events):
            spent = math.fsum(e.count / e.noise_multiplier**2 for e in events)
            room = mu_for(budget.epsilon, budget.delta) ** 2 - spent
            return gaussian_epsilon(math.sqrt(room), budget.delta) if room > 1e-12 else 0.0

        def fits(part: float) -> bool:
            mu = mu_for(part * budget.epsilon, budget.delta)
            return within((*events, GaussianSum(1 / mu, 1.0)), budget.delta, budget.epsilon)[0]

        low, high = 0.0, 1.0
        for _ in range(_SAMPLED_TRIES):
            middle = (low + high) / 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low * budget.epsilon

    def runs_left(self, contract: Contract) -> int:
        """Return how many whole further runs under a contract the caps allow."""
        charges = plan_of(contract).charges(contract.exposed_contributors)
        return most(lambda runs: not self.refusal_of(list(charges) * runs), MOST_RUNS)

    def rounds_left(self, contract: Contract) -> int:
        """Return how many further training rounds, and nothing else, the caps allow."""
        (update,) = (
            charge
            for charge in plan_of(contract).charges(contract.exposed_contributors)
            if charge.stage == UPDATE
        )
        steps = contract.training.local_steps
        return most(lambda n: not self.refusal_of([_repeated(update, n * steps)]), MOST_ROUNDS)


def most(fits: Callable[[int], bool], limit: int) -> int:
    """Return the largest number up to `limit` that fits; what fits, fits for any smaller one.

    >>> most(lambda n: n * n <= 50, 1000)
    7
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def freed_by_settling(spending: Spending, run: str) -> tuple[float, float]:
    """Return the epsilon that counts before and after a run is settled."""
    runs = {
        name: own
        for name, own in spending.next.runs.items()
        if not own.expired and name not in spending.old
    }
    if run in runs:
        runs[run] = spending.account.runs[run]
    before = [charge for own in runs.values() for charge in own.charged]
    if run in runs:
        runs[run] = replace(runs[run], settled=True)
    after = [charge for own in runs.values() for charge in own.charged]
    return spending.epsilon(before), spending.epsilon(after)


@dataclass(frozen=True)
class StageCost:
    """What one kind of release costs a customer."""

    stage: str
    numbers: int  # in the vector
    noise_multiplier: float  # of the sum over all merchants
    times: int  # spare attempts included
    epsilon: float  # of these alone


@dataclass(frozen=True)
class Cost:
    """What a run under a contract costs, at the contract's delta."""

    contract: Contract

    @property
    def delta(self) -> float:
        """Return the delta of the contract, at which this is told."""
        return self.contract.privacy.delta

    def stages(self) -> list[StageCost]:
        """Return the cost of every kind of release alone; the parts do not add up."""
        return [
            StageCost(
                release.stage,
                release.length,
                release.event.noise_multiplier,
                release.times,
                epsilon([_counted(release, release.times)], self.delta),
            )
            for release in plan_of(self.contract).releases()
            if release.times
        ]

    @cached_property
    def reserved(self) -> float:
        """Return epsilon of everything that is reserved, spare attempts included."""
        return epsilon(plan_of(self.contract).events(), self.delta)

    @cached_property
    def towards_server(self) -> float:
        """Return the same towards whoever sees this merchant's single messages."""
        contract = self.contract
        events = plan_of(contract).events_towards_server(contract.exposed_contributors)
        return epsilon(events, self.delta)

    @cached_property
    def curve(self) -> list[tuple[int, float]]:
        """Return (round, epsilon after it) of a run in which every sum comes about."""
        rounds = self.contract.training.rounds
        chosen = range(1, rounds + 1)
        if self.contract.training.sampling_rate < 1.0:
            stride = -(-rounds // _SAMPLED_POINTS)
            chosen = range(rounds, 0, -stride)[::-1]
        return [(number, epsilon(self._until(number), self.delta)) for number in chosen]

    def _until(self, number: int) -> list[Event]:
        """Return all that is released until a round is over."""
        plan, rounds = plan_of(self.contract), self.contract.training.rounds
        over = sum(r <= number for r in evaluation_rounds(self.contract)) - (number == rounds)
        events = [_counted(plan.census, 1), _counted(plan.update, number)]
        events += [_counted(plan.evaluation, over)] if over else []
        if number == rounds:
            events.append(_counted(plan.final_evaluation, 1))
            events += [_counted(plan.profile, 1)] if plan.profile else []
        return events

    def colluders(self) -> list[tuple[int, float]]:
        """Return (k, epsilon towards k merchants of the smallest sum that pool what they know).

        They know and subtract their own shares of the noise. In mode 'local' each merchant's
        share is enough by itself.
        """
        fewest = self.contract.min_survivors
        counts = sorted({0, 1, -(-fewest // 10), (fewest - 1) // 3})
        return [(k, self._colluding(fewest - k)) for k in counts]

    def _colluding(self, honest: int) -> float:
        events = plan_of(self.contract).events()
        if self.contract.training.mode == "local":
            return epsilon(events, self.delta)
        if honest < 1:
            return math.inf
        factor = math.sqrt(honest / self.contract.noise_contributors)
        return epsilon(
            [replace(e, noise_multiplier=e.noise_multiplier * factor) for e in events], self.delta
        )

    def persons(self) -> list[tuple[float, float, float]]:
        """Return (merchants of a person, epsilon with shared noise, with noise of its own)."""
        return person_table(self.reserved, self.delta)


@dataclass(frozen=True)
class Crowd:
    """Who may take part: the rest of what a run's quality depends on."""

    contract: Contract
    merchants: int
    customers: int  # of each merchant, with a known segment

    @property
    def _held_out(self) -> float:
        return self.contract.training.held_out

    @property
    def training(self) -> float:
        """Return about how many customers are trained on."""
        return self.merchants * self.customers * (1.0 - self._held_out)

    def stddev(self, release: Release) -> float:
        """Return the noise in each number of a sum over all merchants."""
        shares = max(self.merchants, self.contract.min_survivors)
        spread = math.sqrt(shares / self.contract.noise_contributors)
        return release.event.noise_multiplier * release.sensitivity * spread

    @property
    def noise(self) -> float:
        """Return the noise in each number of the averaged gradient of one step."""
        return self.stddev(plan_of(self.contract).update) / self._batch

    @property
    def _batch(self) -> float:
        return max(self.training * self.contract.training.sampling_rate, 1e-9)

    @property
    def noise_norm(self) -> float:
        """Return the length of the noise in the averaged gradient of one step."""
        return self.noise * math.sqrt(plan_of(self.contract).update.length)

    @property
    def ratio(self) -> float:
        """Return clip norm over noise in one step: more than 1 where a gradient stands out."""
        return self.contract.privacy.clip_norm / self.noise_norm

    @property
    def run_ratio(self) -> float:
        """Return the same for the mean of all steps, whose noise averages out."""
        training = self.contract.training
        return self.ratio * math.sqrt(training.rounds * training.local_steps)

    @property
    def verdict(self) -> Verdict:
        """Say in a word what to expect."""
        if self.run_ratio < DROWNED:
            return "drowned"
        return "weak" if self.run_ratio < WEAK else "good"

    @property
    def accuracy_error(self) -> float | None:
        """Return one standard deviation of noise in the published accuracy, near one half.

        By the delta method, as the coordinator does it; None where the held-out customers are
        too few for any accuracy to be published.
        """
        segments = len(self.contract.segments.names)
        stddev = self.stddev(plan_of(self.contract).final_evaluation)
        total = self.merchants * self.customers * self._held_out
        if total < _TOO_FEW * stddev * segments:
            return None
        off = segments**2 - segments
        spread = segments * (1 - _ACCURACY) ** 2 + off * _ACCURACY**2
        return stddev / total * math.sqrt(spread)

    @property
    def smallest_segment(self) -> float | None:
        """Return the share below which a segment's own share is suppressed, up to 1.

        None where the contract publishes no profiles.
        """
        profile = plan_of(self.contract).profile
        if profile is None:
            return None
        stddev = self.stddev(profile) / math.sqrt(0.5)
        return min(_TOO_FEW * stddev / (self.merchants * self.customers), 1.0)


def _counted(release: Release, times: int) -> Event:
    return replace(release.event, count=release.event.count * times)


def _repeated(charge: Charge, count: int) -> Charge:
    event, towards = charge.event, charge.towards_server
    return Charge(charge.stage, replace(event, count=count), replace(towards, count=count))


def _events(charges: Iterable[Charge], whom: Whom) -> Sequence[Event]:
    return merged(c.event if whom == "sums" else c.towards_server for c in charges)
