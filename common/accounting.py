"""Events -> epsilon, and epsilon -> noise.

Sums over all customers are Gaussian mechanisms: their composition is one Gaussian mechanism
with mu^2 = sum(count / noise_multiplier^2), and its privacy curve is known in closed form
(Balle and Wang 2018, Theorem 8; Dong, Roth and Su 2022, Corollary 3.3). No approximation.

With Poisson-sampled sums two independent libraries are asked (`common.accountants`): Opacus'
PRV accountant and dp-accounting's privacy-loss distributions. Both give upper bounds, and the
larger is claimed. One that fails, or says something that cannot be, is left out, and the
assessment says so; if both do, the Renyi bound is claimed; if that fails too, there is an
error and no number.

What may be chosen adaptively. Each event is dominated by a pair of one-dimensional
distributions: what it releases can be simulated from one draw of that pair, whatever was
released before. So everything may depend on earlier releases except the privacy parameters:
for sampled sums the multiset of (noise multiplier, rate) must be fixed beforehand, or be
covered by one that was (`covers`). Gaussian sums are free of this: their pair is a Brownian
motion watched for a time mu^2, and any adaptive choice of noise just cuts the same motion
into other pieces (Smith and Thakurta 2022; Koskela, Tobaben and Honkela 2023).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from common import accountants
from common.accountants import Sampled
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, check, merged

PRV_ERROR = accountants.PRV_ERROR
CLOSED_FORM, RENYI = "closed form", "Renyi bound"
OPACUS, DP_ACCOUNTING = "Opacus PRV", "dp-accounting PLD"

_DISAGREEMENT = 0.02  # relative
_ATTEMPTS = 8  # at a noise multiplier on which all accountants agree
_SLACK = 1e-9  # relative; what sums of floats may be off by
_PACKAGES = {OPACUS: "opacus", DP_ACCOUNTING: "dp-accounting"}
_FAILURES = (  # whatever a library raises is a failed opinion; a lost machine is not
    AccountingError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class Assessment:
    """What is claimed for a set of events, and who said what."""

    epsilon: float  # an upper bound; the larger one where two accountants give one
    accountant: str  # whose value that is, with its version
    opinions: dict[str, float | str]  # accountant -> epsilon, or why it gave none
    notes: tuple[str, ...] = field(default=())  # sentences for people; empty if all agree


def assess(events: Iterable[Event], delta: float) -> Assessment:
    """Return the epsilon that is claimed at `delta` for all of `events` together, and why.

    Neighbouring relation: add or remove one customer's row. The events may come from any
    number of runs; the module's docstring says what may be chosen adaptively.

    Raises:
        AccountingError: `delta` or an event is out of range, or no accountant gives a finite
            epsilon.

    >>> assess([], 1e-5).opinions
    {'closed form': 0.0}
    """
    _check_delta(delta)
    mu_squared, sampled = _parts(events)
    if not sampled:
        value = gaussian_epsilon(math.sqrt(mu_squared), delta)
        return Assessment(value, _named(CLOSED_FORM), {CLOSED_FORM: value})
    assessment = _assess_sampled(math.sqrt(mu_squared), sampled, delta)
    return replace(assessment, opinions=dict(assessment.opinions))


def epsilon(events: Iterable[Event], delta: float) -> float:
    """Return an upper bound on epsilon at `delta` for everything in `events` together.

    Raises:
        AccountingError: As `assess`.

    >>> round(epsilon([GaussianSum(noise_multiplier=4.0, sensitivity=1.0)], 1e-5), 3)
    0.926
    """
    return assess(events, delta).epsilon


class RunningEpsilon:
    """An upper bound on epsilon while a run is under way, at little cost.

    Sums over all customers have the closed form. With sampled sums a bound is worked out for some
    releases ahead and holds until those are made, so it rises in some sixteen steps over a run.

    Args:
        planned: Events of the whole run.
        delta: At which epsilon is told.
    """

    _STEPS = 16

    def __init__(self, planned: Iterable[Event], delta: float) -> None:
        self._planned, self._delta = tuple(planned), delta
        self._ahead: tuple[Event, ...] = ()
        self._bound = 0.0
        mu_squared, sampled = _parts(self._planned)
        self._growing = accountants.GrowingLoss(math.sqrt(mu_squared), sampled) if sampled else None

    def bound(self, events: Iterable[Event]) -> float:
        """Return an upper bound on epsilon for `events`; raises `AccountingError` as `assess`."""
        taken = tuple(events)
        if all(isinstance(event, GaussianSum) for event in taken):
            return epsilon(taken, self._delta)
        if not covers(self._ahead, taken):
            mu_squared, sampled = _parts(taken)
            sums = (GaussianSum(mu_squared**-0.5, 1.0),) if mu_squared else ()
            ahead = (*sums, *map(self._rounded_up, sampled))
            growing = self._growing
            accountant = accountants.pld_epsilon if growing is None else growing.epsilon
            # both at once: after a failure the old bound is that of the old events
            self._ahead, self._bound = ahead, _quick(ahead, self._delta, accountant)
        return self._bound

    def _rounded_up(self, part: tuple[float, float, int]) -> Event:
        """Return one kind of sampled sums with as many as are worked out at once."""
        sigma, rate, count = part
        planned = {(s, q): n for s, q, n in _parts(self._planned)[1]}
        step = max(planned.get((sigma, rate), 1) // self._STEPS, 1)
        return PoissonGaussianSum(sigma, 1.0, rate, -(-count // step) * step)


def rdp_upper_bound(events: Iterable[Event], delta: float) -> float:
    """Return an upper bound on epsilon in milliseconds, as a rule 5 to 20 % too large.

    Never below the closed form, and never negative. Infinite where no order helps.

    >>> round(rdp_upper_bound([GaussianSum(noise_multiplier=4.0, sensitivity=1.0)], 1e-5), 2)
    1.01
    """
    _check_delta(delta)
    mu_squared, sampled = _parts(events)
    bound = accountants.renyi_epsilon(math.sqrt(mu_squared), sampled, delta)
    if not bound >= 0:
        raise AccountingError(f"the {RENYI} returned epsilon {bound}; no epsilon is claimed")
    return bound


def within(events: Iterable[Event], delta: float, cap: float) -> tuple[bool, float]:
    """Return whether `events` together stay within epsilon `cap`, and an upper bound on it.

    Made for a transaction. Sums over all customers are decided by the closed form. With
    sampled sums the Renyi bound may say yes, in milliseconds; only if it does not, the full
    assessment decides, which can take seconds. A relative slack of 1e-9 is allowed, so that a
    plan that fills a cap exactly is not refused for the last bit of a float.

    Raises:
        AccountingError: As `assess`; nothing may be released then.
    """
    events, limit = tuple(events), cap * (1 + _SLACK)
    if not all(isinstance(event, GaussianSum) for event in events):
        bound = rdp_upper_bound(events, delta)
        if bound <= limit:
            return True, bound
    claimed = epsilon(events, delta)
    return claimed <= limit, claimed


def covers(reserved: Iterable[Event], taken: Iterable[Event]) -> bool:
    """Return whether charging for `reserved` pays for releasing `taken`.

    It does if the sums over all customers have no larger mu^2 in total (but for a relative
    slack of 1e-9), and every kind of sampled sum is taken no oftener than reserved.

    Guarantee: `taken`, in any order, chosen adaptively, stopped at any time, and composed with
    any other events, has no larger epsilon at any delta than `reserved` composed with these,
    but for the slack. Proof: by the module's docstring both are drawn from the same pair. The
    Gaussian sums read a Brownian motion up to a time of mu^2, however its time is divided; a
    sampled sum reads the next unused one of `count` independent draws of its kind. Whoever
    holds everything that `reserved` reads can simulate `taken`, so `taken` is post-processing.
    Sensitivity has no part in it: noise is counted in sensitivities.

    >>> covers([GaussianSum(4.0, 1.0, 10)], [GaussianSum(2.0, 1.0), GaussianSum(4.0, 9.0, 6)])
    True
    """
    return Cover(reserved).pays(taken)


class Cover:
    """What charging for some events pays for: `covers`, for many questions about the same.

    Raises:
        AccountingError: An event is out of range.
    """

    def __init__(self, reserved: Iterable[Event]) -> None:
        self._mu_squared, sampled = _parts(reserved)
        self._counts = {(sigma, rate): count for sigma, rate, count in sampled}

    def pays(self, taken: Iterable[Event]) -> bool:
        """Return `covers(reserved, taken)`."""
        mu_squared, sampled = _parts(taken)
        return mu_squared <= self._mu_squared * (1 + _SLACK) < math.inf and all(
            count <= self._counts.get((sigma, rate), 0) for sigma, rate, count in sampled
        )


def gaussian_mu(events: Iterable[Event]) -> float:
    """Return mu of the composition of sums over all customers: mu^2 = sum(count / sigma^2)."""
    return math.sqrt(_mu_squared(events))


@lru_cache(maxsize=1024)
def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of a Gaussian mechanism with sensitivity / noise = `mu`, rounded up.

    Source: Balle and Wang 2018, "Improving the Gaussian mechanism for differential privacy",
    Theorem 8, solved for epsilon by bisection in log space.
    """
    _check_delta(delta)
    if mu == 0.0:
        return 0.0
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(mu, high) > delta:
        high *= 2.0
        if high > 1e6:
            raise AccountingError(f"epsilon would be above a million (mu = {mu:.3g})")
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        if gaussian_delta(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def gaussian_delta(mu: float, eps: float) -> float:
    """Return delta(eps) of a Gaussian mechanism: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)."""
    from scipy.special import log_ndtr

    first = float(log_ndtr(mu / 2 - eps / mu))
    second = eps + float(log_ndtr(-mu / 2 - eps / mu))
    return math.exp(first) * -math.expm1(min(second - first, 0.0))


def mu_for(eps: float, delta: float) -> float:
    """Return the largest mu whose Gaussian mechanism is (eps, delta)-DP, rounded down."""
    _check_delta(delta)
    if not 0 < eps < float("inf"):
        raise AccountingError(f"expected a finite epsilon > 0, got {eps}")
    low, high = 0.0, 1.0
    while gaussian_epsilon(high, delta) <= eps:
        low, high = high, high * 2
    for _ in range(100):
        middle = (low + high) / 2
        if middle and gaussian_epsilon(middle, delta) > eps:
            high = middle
        else:
            low = middle
    return low


def person_table(eps: float, delta: float) -> list[tuple[float, float, float]]:
    """Return (k, epsilon with shared noise, epsilon with own noise) for a person at k merchants.

    Each merchant protects the person's row with (eps, delta). With one shared secure sum the
    person moves the same sum k times over: mu grows k-fold. With noise of its own at every
    merchant the k Gaussian mechanisms compose: mu grows by the root of k.

    >>> [tuple(round(value, 1) for value in row) for row in person_table(1.0, 1e-4)]
    [(2.5, 2.9, 1.7), (5.0, 6.6, 2.5), (12.0, 20.4, 4.2)]
    """
    mu = mu_for(eps, delta)
    return [
        (k, gaussian_epsilon(k * mu, delta), gaussian_epsilon(math.sqrt(k) * mu, delta))
        for k in (2.5, 5.0, 12.0)
    ]


def sampled_noise_multiplier(
    target: float, delta: float, sampling_rate: float, steps: int, others: tuple[Event, ...]
) -> float:
    """Return a noise multiplier of `steps` Poisson-sampled sums that `epsilon` agrees to.

    Opacus' search, which asks dp-accounting alone; what it finds is held against both.

    Args:
        target: Epsilon of the sampled steps and `others` together.
        delta: Delta of the whole.
        sampling_rate: Chance of each customer to enter a step, below 1.
        steps: Number of steps.
        others: Everything else that the same budget pays for.

    Raises:
        AccountingError: No noise multiplier reaches the target.
    """
    if epsilon(others, delta) >= target:
        raise AccountingError(
            f"no noise multiplier reaches epsilon {target}: the other releases alone cost it"
        )
    aim = target - min(PRV_ERROR, target / 200)  # what Opacus' PRV adds by design
    for _ in range(_ATTEMPTS):
        sigma = _searched(aim, delta, sampling_rate, steps, others)
        claimed = epsilon((*others, PoissonGaussianSum(sigma, 1.0, sampling_rate, steps)), delta)
        if claimed <= target:
            return sigma
        aim *= target / claimed * (1 - 2e-4)  # by as much as the other accountant says more
    raise AccountingError(
        f"no noise multiplier was found that reaches epsilon {target} at delta {delta} with "
        f"{steps} steps at sampling rate {sampling_rate}"
    )


def _searched(
    target: float, delta: float, sampling_rate: float, steps: int, others: tuple[Event, ...]
) -> float:
    """Return the noise multiplier that Opacus' search finds, asking one quick accountant."""
    from common.opacus_accountant import QUICK
    from common.opacus_import import opacus_accountants

    try:
        return float(
            opacus_accountants().utils.get_noise_multiplier(
                target_epsilon=target,
                target_delta=delta,
                sample_rate=sampling_rate,
                steps=steps,
                accountant=QUICK,
                epsilon_tolerance=target * 5e-4,
                others=others,
            )
        )
    except ValueError as error:
        raise AccountingError(
            f"no noise multiplier reaches epsilon {target} at delta {delta} with {steps} steps "
            f"at sampling rate {sampling_rate}: {error}"
        ) from None


def quick_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return dp-accounting's upper bound alone, or what is claimed where it gives none.

    For searches and for a bound under way: a tenth of the time of `epsilon`, as a rule up to 2 %
    below it.

    Raises:
        AccountingError: As `assess`.
    """
    return _quick(events, delta, accountants.pld_epsilon)


def _quick(
    events: Iterable[Event], delta: float, accountant: Callable[[float, Sampled, float], float]
) -> float:
    """Return an accountant's upper bound, or what is claimed where it gives none."""
    _check_delta(delta)
    mu_squared, sampled = _parts(events)
    mu = math.sqrt(mu_squared)
    if not sampled:
        return gaussian_epsilon(mu, delta)
    least = gaussian_epsilon(mu, delta) * (1 - 1e-6)
    said = _opinion(lambda: accountant(mu, sampled, delta), least)
    return _assess_sampled(mu, sampled, delta).epsilon if isinstance(said, str) else said


def opacus_epsilon(events: Iterable[Event], delta: float) -> float:
    """Return Opacus' PRV upper bound, with every event composed by Opacus itself.

    Raises:
        AccountingError: Opacus gives no bound for these events.
    """
    _check_delta(delta)
    parts = tuple((e.noise_multiplier, _rate(e), e.count) for e in merged(map(check, events)))
    said = _opinion(lambda: accountants.prv_epsilon(0.0, parts, delta), 0.0) if parts else 0.0
    if isinstance(said, str):
        raise AccountingError(f"{OPACUS} {said}; no epsilon is claimed")
    return said


@lru_cache(maxsize=4096)
def _assess_sampled(mu: float, sampled: Sampled, delta: float) -> Assessment:
    least = gaussian_epsilon(mu, delta) * (1 - 1e-6)  # the sums over all customers alone
    opinions = {
        OPACUS: _opinion(lambda: accountants.prv_epsilon(mu, sampled, delta), least),
        DP_ACCOUNTING: _opinion(lambda: accountants.pld_epsilon(mu, sampled, delta), least),
        RENYI: _opinion(lambda: accountants.renyi_epsilon(mu, sampled, delta), least),
    }
    bounds = {name: said for name, said in opinions.items() if not isinstance(said, str)}
    deciding = {n: bounds[n] for n in (OPACUS, DP_ACCOUNTING) if n in bounds} or bounds
    if not deciding:
        reasons = "; ".join(f"{name} {said}" for name, said in opinions.items())
        raise AccountingError(f"no accountant gives an epsilon, and none is claimed: {reasons}")
    name = max(deciding, key=lambda name: deciding[name])
    return Assessment(
        bounds[name], _named(name), opinions, (*_failed(opinions, name), *_apart(bounds, name))
    )


def _opinion(accountant: Callable[[], float], least: float) -> float | str:
    """Return an accountant's epsilon, or what is wrong with it."""
    try:
        value = accountant()
    except _FAILURES as error:
        return f"failed ({type(error).__name__}: {str(error)[:160]})"
    if not 0 <= value < math.inf:
        return f"returned epsilon {value}"
    if value < least:
        return f"returned epsilon {value:.4g}, less than a part of the events costs ({least:.4g})"
    return float(value)


def _failed(opinions: dict[str, float | str], used: str) -> list[str]:
    """Return a sentence for every accountant that gave no bound."""
    return [
        f"{name} {said}; {used} was used instead."
        for name, said in opinions.items()
        if isinstance(said, str)
    ]


def _apart(bounds: dict[str, float], used: str) -> list[str]:
    """Return a sentence for every accountant that should not be where it is."""
    claimed, notes = bounds[used], []
    if min(bounds.get(n, claimed) for n in _PACKAGES) < claimed * (1 - _DISAGREEMENT):
        both = " and ".join(f"{n} says {bounds[n]:.4g}" for n in _PACKAGES if n in bounds)
        notes.append(f"The accountants are more than 2 % apart: {both}. The larger is claimed.")
    if bounds.get(RENYI, claimed) < claimed:
        notes.append(
            f"The {RENYI}, {bounds[RENYI]:.4g}, is below the {claimed:.4g} of {used}, which is "
            f"claimed all the same."
        )
    return notes


@lru_cache(maxsize=8)
def _named(name: str) -> str:
    package = _PACKAGES.get(name, "hansa")
    try:
        return f"{name} ({package} {version(package)})"
    except PackageNotFoundError:  # run from a source tree, or as a Flower app
        return f"{name} ({package})"


def _parts(events: Iterable[Event]) -> tuple[float, Sampled]:
    """Return mu^2 of the sums over all customers, and the sampled sums, alike ones merged.

    A sampled sum at rate 1 is a sum over all customers.
    """
    everyone, counts = [], dict[tuple[float, float], int]()
    for event in map(check, events):
        if _rate(event) == 1.0:
            everyone.append(event)
        elif event.count:
            kind = (float(event.noise_multiplier), _rate(event))
            counts[kind] = counts.get(kind, 0) + event.count
    sampled = tuple((sigma, rate, n) for (sigma, rate), n in sorted(counts.items()))
    return _mu_squared(everyone), sampled


def _mu_squared(events: Iterable[Event]) -> float:
    try:
        return math.fsum(e.count / e.noise_multiplier / e.noise_multiplier for e in events)
    except OverflowError:
        return math.inf


def _rate(event: Event) -> float:
    return float(event.sampling_rate) if isinstance(event, PoissonGaussianSum) else 1.0


def _check_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise AccountingError(f"expected 0 < delta < 1, got {delta}")
