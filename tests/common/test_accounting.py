"""Tests of accounting: known values, agreement of independent accountants, refusals."""

import doctest
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import common.accounting
from audit.epsilon import recompute
from common import accountants
from common.accounting import (
    DP_ACCOUNTING,
    OPACUS,
    RENYI,
    Assessment,
    RunningEpsilon,
    assess,
    covers,
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    mu_for,
    opacus_epsilon,
    rdp_upper_bound,
    sampled_noise_multiplier,
    within,
)
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, merged, to_document

gaussians = st.lists(
    st.builds(GaussianSum, st.floats(0.5, 50), st.floats(0.1, 10), st.integers(1, 50)),
    min_size=1,
    max_size=3,
)
deltas = st.sampled_from([1e-8, 1e-6, 1e-5, 1e-3])
SAMPLED = merged((GaussianSum(8.0, 1.0), PoissonGaussianSum(2.0, 1.0, 0.2, 10)))


def pld_epsilon(events: list[Event], delta: float) -> float:
    """Compose events with dp-accounting alone."""
    accountant = PLDAccountant(
        dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=1e-4
    )
    for event in events:
        accountant.compose(dp_accounting.GaussianDpEvent(event.noise_multiplier), event.count)
    return float(accountant.get_epsilon(delta))


def rpld_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """Compose events with Opacus' Renyi accountant, an upper bound."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [
        (e.noise_multiplier, getattr(e, "sampling_rate", 1.0), e.count) for e in events
    ]
    alphas = [1 + x / 10 for x in range(1, 1000)] + list(range(101, 512))
    return float(accountant.get_epsilon(delta, alphas=alphas))


@dataclass(frozen=True)
class Laplace:
    """An event that nobody knows."""

    noise_multiplier: float
    sensitivity: float
    count: int = 1
    kind: str = "laplace"


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.accounting).failed == 0


class TestGaussian:
    """Sums over all customers: the closed form."""

    @pytest.mark.slow
    @settings(max_examples=8, deadline=None)
    @given(gaussians, deltas)
    def test_equals_privacy_loss_distributions(self, events: list[Event], delta: float) -> None:
        """dp-accounting finds the same epsilon to 1e-3, and never a smaller one."""
        ours = epsilon(events, delta)
        assume(0.02 < ours < 30)
        assert pld_epsilon(events, delta) == pytest.approx(ours, rel=1e-3)

    @settings(max_examples=5, deadline=None)
    @given(gaussians, deltas)
    def test_equals_opacus_within_its_error(self, events: list[Event], delta: float) -> None:
        """Opacus' upper bound lies above ours, by no more than its stated error."""
        ours = epsilon(events, delta)
        assume(0.02 < ours < 20)
        assert ours - 1e-3 <= opacus_epsilon(events, delta) <= ours * 1.001 + 0.021

    @settings(max_examples=25, deadline=None)
    @given(gaussians, deltas)
    def test_below_renyi_bound(self, events: list[Event], delta: float) -> None:
        """The Renyi bound of Opacus is never below the exact value."""
        ours = epsilon(events, delta)
        assume(0.05 < ours < 50)
        assert rpld_epsilon(tuple(events), delta) >= ours * (1 - 1e-6)

    def test_known_value(self) -> None:
        """Noise multiplier 1 at delta 1e-5 is the 4.3772 of Balle and Wang's calibration."""
        assert gaussian_epsilon(1.0, 1e-5) == pytest.approx(4.3772, abs=2e-4)

    @given(gaussians, gaussians, deltas)
    def test_more_events_cost_more(
        self, some: list[Event], more: list[Event], delta: float
    ) -> None:
        """Further events never lower epsilon."""
        assert epsilon([*some, *more], delta) >= epsilon(some, delta)

    @given(gaussians, st.floats(1e-9, 0.4), st.floats(1e-9, 0.4))
    def test_falls_with_delta(self, events: list[Event], one: float, other: float) -> None:
        """A larger delta never needs a larger epsilon."""
        assert epsilon(events, max(one, other)) <= epsilon(events, min(one, other))

    @given(gaussians, st.randoms())
    def test_order_and_grouping_do_not_matter(self, events: list[Event], random: object) -> None:
        """Events one by one, in any order, cost the same as grouped."""
        single = [
            GaussianSum(e.noise_multiplier, e.sensitivity) for e in events for _ in range(e.count)
        ]
        random.shuffle(single)  # type: ignore[attr-defined]
        assert epsilon(single, 1e-5) == pytest.approx(epsilon(events, 1e-5), rel=1e-12)

    def test_sensitivity_is_only_a_unit(self) -> None:
        """Noise is counted in sensitivities: the unit of the sum has no part in epsilon."""
        assert epsilon([GaussianSum(2.0, 1e-9)], 1e-5) == epsilon([GaussianSum(2.0, 1e9)], 1e-5)

    @given(st.floats(1e-3, 60), st.floats(1e-12, 0.5))
    def test_result_reaches_delta(self, mu: float, delta: float) -> None:
        """At the returned epsilon the Gaussian's delta is not above the one asked for."""
        assert gaussian_delta(mu, gaussian_epsilon(mu, delta)) <= delta

    def test_tiny_epsilon(self) -> None:
        """So much noise that delta alone covers it costs no epsilon."""
        assert epsilon([GaussianSum(1e9, 1.0)], 1e-5) == 0.0

    def test_huge_epsilon(self) -> None:
        """Little noise gives the large epsilon of mu^2 / 2 and a bit, not an overflow."""
        assert epsilon([GaussianSum(0.01, 1.0)], 1e-5) == pytest.approx(5000 + 426, rel=0.01)

    @pytest.mark.parametrize("sigma", [1e-5, 1e-200, 5e-324])
    def test_absurd_epsilon(self, sigma: float) -> None:
        """An epsilon above a million is refused, not printed."""
        with pytest.raises(AccountingError, match="above a million"):
            epsilon([GaussianSum(sigma, 1.0)], 1e-5)

    def test_absurd_noise(self) -> None:
        """The largest noise multiplier that a float holds does not overflow."""
        assert epsilon([GaussianSum(1.7e308, 1.0, 10**9)], 1e-5) == 0.0

    def test_mu_adds_in_squares(self) -> None:
        """Three and four make five."""
        assert gaussian_mu([GaussianSum(1 / 3, 1.0), GaussianSum(1 / 4, 1.0)]) == pytest.approx(5)


class TestMuFor:
    """mu_for."""

    @pytest.mark.slow
    @given(st.floats(1e-3, 100), st.floats(1e-12, 0.01))
    @example(100.0, 0.01)
    @example(1e-3, 1e-12)
    def test_inverse(self, eps: float, delta: float) -> None:
        """It is the largest mu within epsilon."""
        mu = mu_for(eps, delta)
        assert gaussian_epsilon(mu, delta) <= eps
        assert gaussian_epsilon(mu * (1 + 1e-6), delta) > eps

    @pytest.mark.parametrize("eps", [0.0, -1.0, math.inf, math.nan])
    def test_refuses(self, eps: float) -> None:
        """Epsilon must be finite and positive."""
        with pytest.raises(AccountingError, match="finite epsilon"):
            mu_for(eps, 1e-5)


class TestEpsilon:
    """epsilon, whatever the events."""

    def test_no_events(self) -> None:
        """Nothing released costs nothing."""
        assert epsilon([], 1e-5) == 0.0
        assert opacus_epsilon([], 1e-5) == 0.0

    def test_no_applications(self) -> None:
        """Events that were applied zero times cost nothing."""
        assert epsilon([GaussianSum(1.0, 1.0, 0), PoissonGaussianSum(1.0, 1.0, 0.1, 0)], 1e-5) == 0

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
    def test_delta_out_of_range(self, delta: float) -> None:
        """Delta must lie strictly between 0 and 1."""
        with pytest.raises(AccountingError, match="delta"):
            epsilon([GaussianSum(1.0, 1.0)], delta)

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
    def test_events_are_checked(self, sigma: float) -> None:
        """An event whose numbers make no sense is never counted as free."""
        with pytest.raises(AccountingError, match="noise_multiplier"):
            epsilon([GaussianSum(sigma, 1.0)], 1e-5)


class TestOpacusAccountant:
    """Our accounting, driven by Opacus' tools."""

    def test_steps_compose(self) -> None:
        """Recorded steps cost what the same event costs, and are counted."""
        from common.opacus_accountant import MECHANISM, HansaAccountant

        accountant = HansaAccountant()
        for _ in range(3):
            accountant.step(noise_multiplier=2.0, sample_rate=0.2)
        event = PoissonGaussianSum(2.0, 1.0, 0.2, 3)
        assert accountant.get_epsilon(1e-5) == epsilon([event], 1e-5)
        assert len(accountant) == 3
        assert accountant.mechanism() == MECHANISM

    def test_opacus_knows_it(self) -> None:
        """Opacus finds the accountant by its name."""
        from common.opacus_accountant import MECHANISM, HansaAccountant
        from common.opacus_import import opacus_accountants

        assert isinstance(opacus_accountants().create_accountant(MECHANISM), HansaAccountant)


@cache
def honest() -> Assessment:
    """Return what is claimed for `SAMPLED` when nobody errs."""
    return assess(SAMPLED, 1e-5)


@pytest.fixture(autouse=True)
def _no_memory_of_planted_failures() -> Iterator[None]:
    """Forget assessments after each test: some are of broken accountants."""
    yield
    common.accounting._assess_sampled.cache_clear()


Accountant = Callable[[list[Event], float], float]


def auditor(events: list[Event], delta: float) -> float:
    """Ask the auditor."""
    return recompute(
        [
            {"kind": "laplace", **asdict(e)} if isinstance(e, Laplace) else to_document(e)
            for e in events
        ],
        delta,
    )


def library_pld(events: list[Event], delta: float) -> float:
    """Ask our composition of dp-accounting's distributions alone."""
    mu_squared, sampled = common.accounting._parts(events)
    return accountants.pld_epsilon(math.sqrt(mu_squared), sampled, delta)


every_accountant = pytest.mark.parametrize(
    "accountant",
    [
        rdp_upper_bound,
        library_pld,
        auditor,
        pytest.param(epsilon, marks=pytest.mark.slow),
        pytest.param(opacus_epsilon, marks=pytest.mark.slow),
    ],
)
some_events = st.lists(
    st.one_of(
        st.builds(GaussianSum, st.floats(2, 40), st.just(1.0), st.integers(1, 5)),
        st.builds(
            PoissonGaussianSum,
            st.floats(1, 20),
            st.just(1.0),
            st.floats(0.02, 0.95),
            st.integers(1, 20),
        ),
    ),
    min_size=1,
    max_size=3,
)
few = settings(max_examples=4, deadline=None)
ROOM = 0.012  # relative; grids and Opacus' error bound change with the events


@every_accountant
class TestLaws:
    """What holds for every accountant."""

    def test_nothing_costs_nothing(self, accountant: Accountant) -> None:
        """No events, or events applied zero times, cost nothing."""
        assert accountant([], 1e-5) == 0.0
        nothing = [GaussianSum(1.0, 1.0, 0), PoissonGaussianSum(1.0, 1.0, 0.1, 0)]
        assert accountant(nothing, 1e-5) == 0.0

    @few
    @given(some_events, st.floats(1.2, 4))
    def test_falls_with_noise(
        self, accountant: Accountant, events: list[Event], factor: float
    ) -> None:
        """More noise never costs more."""
        quieter = [replace(e, noise_multiplier=e.noise_multiplier * factor) for e in events]
        assert accountant(quieter, 1e-5) <= accountant(events, 1e-5) * (1 + ROOM)

    @few
    @given(some_events, st.integers(2, 9))
    def test_rises_with_count(
        self, accountant: Accountant, events: list[Event], factor: int
    ) -> None:
        """More applications never cost less."""
        more = [replace(e, count=e.count * factor) for e in events]
        assert accountant(more, 1e-5) >= accountant(events, 1e-5) * (1 - ROOM)

    @few
    @given(st.floats(1, 20), st.floats(0.02, 0.7), st.floats(1.05, 1.4), st.integers(1, 20))
    def test_rises_with_rate(
        self, accountant: Accountant, sigma: float, rate: float, factor: float, count: int
    ) -> None:
        """A customer who is drawn oftener is never protected better."""
        rarer = accountant([PoissonGaussianSum(sigma, 1.0, rate, count)], 1e-5)
        oftener = accountant([PoissonGaussianSum(sigma, 1.0, rate * factor, count)], 1e-5)
        assert oftener >= rarer * (1 - ROOM)

    @few
    @given(some_events, st.randoms())
    def test_order_and_grouping_do_not_matter(
        self, accountant: Accountant, events: list[Event], random: Any
    ) -> None:
        """Events one by one, in any order, cost exactly what they cost together."""
        single = [replace(event, count=1) for event in events for _ in range(event.count)]
        random.shuffle(single)
        assert accountant(single, 1e-5) == pytest.approx(accountant(events, 1e-5), rel=1e-9)

    @few
    @given(st.floats(0.3, 20), st.integers(1, 50), deltas)
    def test_never_below_exact(
        self, accountant: Accountant, sigma: float, count: int, delta: float
    ) -> None:
        """For sums over all customers nobody is below the closed form."""
        exact = gaussian_epsilon(math.sqrt(count) / sigma, delta)
        assume(exact < 60)
        assert accountant([GaussianSum(sigma, 1.0, count)], delta) >= exact * (1 - 1e-6)

    @few
    @given(some_events)
    def test_not_above_renyi_bound(self, accountant: Accountant, events: list[Event]) -> None:
        """The Renyi bound is the loosest."""
        assert accountant(events, 1e-5) <= rdp_upper_bound(events, 1e-5) * (1 + ROOM) + 1e-4

    @few
    @given(some_events)
    def test_not_below_the_exact_part(self, accountant: Accountant, events: list[Event]) -> None:
        """Sampled sums never make the others cheaper."""
        exact = epsilon([e for e in events if isinstance(e, GaussianSum)], 1e-5)
        assert accountant(events, 1e-5) >= exact * (1 - 1e-6)

    def test_unknown_event(self, accountant: Accountant) -> None:
        """An event that is not known is an error that names it, never free."""
        with pytest.raises(AccountingError, match=r"unknown|does not know"):
            accountant([Laplace(1.0, 1.0)], 1e-5)  # type: ignore[list-item]

    @pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
    def test_delta_out_of_range(self, accountant: Accountant, delta: float) -> None:
        """Delta must lie strictly between 0 and 1."""
        if accountant is not library_pld:  # it is only called with a checked delta
            with pytest.raises(AccountingError, match="delta"):
                accountant([GaussianSum(1.0, 1.0)], delta)


class TestSampled:
    """Poisson-sampled sums: two libraries, the larger value."""

    def test_the_larger_is_claimed(self) -> None:
        """The larger of the two upper bounds is claimed, by name and version."""
        found = honest()
        both = (found.opinions[OPACUS], found.opinions[DP_ACCOUNTING])
        assert found.epsilon == max(both)  # type: ignore[type-var]
        assert found.accountant == f"Opacus PRV (opacus {version('opacus')})"
        assert found.notes == ()

    def test_below_opacus_renyi_bound(self) -> None:
        """The Renyi bound of Opacus is not below what is claimed."""
        assert rpld_epsilon(SAMPLED, 1e-5) >= honest().epsilon - 0.01

    def test_rate_one_is_no_sampling(self) -> None:
        """At rate 1 a sampled sum is a sum over all customers, exactly."""
        sampled = epsilon([PoissonGaussianSum(4.0, 1.0, 1.0, 5)], 1e-5)
        assert sampled == epsilon([GaussianSum(4.0, 1.0, 5)], 1e-5)

    def test_nearly_one_is_nearly_no_sampling(self) -> None:
        """Just below rate 1 nothing jumps."""
        sampled = epsilon([PoissonGaussianSum(4.0, 1.0, 1 - 1e-9, 5)], 1e-5)
        assert sampled == pytest.approx(epsilon([GaussianSum(4.0, 1.0, 5)], 1e-5), rel=0.01)

    def test_sampling_helps(self) -> None:
        """A rarer customer is protected better."""
        often = epsilon([PoissonGaussianSum(2.0, 1.0, 0.5, 5)], 1e-5)
        assert epsilon([PoissonGaussianSum(2.0, 1.0, 0.1, 5)], 1e-5) < often
        assert often < epsilon([GaussianSum(2.0, 1.0, 5)], 1e-5)

    def test_a_package_without_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing version, as in a Flower app, costs no more than the version."""

        def missing(name: str) -> str:
            raise PackageNotFoundError(name)

        monkeypatch.setattr(common.accounting, "version", missing)
        common.accounting._named.cache_clear()
        assert assess([], 1e-5).accountant == "closed form (hansa)"
        common.accounting._named.cache_clear()

    def test_opinions_are_a_copy(self) -> None:
        """What one caller does to its assessment does not reach the next."""
        assess(SAMPLED, 1e-5).opinions.clear()
        assert len(assess(SAMPLED, 1e-5).opinions) == 3

    def test_a_year_of_weekly_runs(self) -> None:
        """A year composed run by run is the year composed at once, and far below the sum."""
        week = [
            PoissonGaussianSum(6.0, 1.0, 0.2, 60),
            *(GaussianSum(40.0 + k, 1.0) for k in range(4)),
        ]
        year, at_once = epsilon(week * 52, 1e-6), [replace(e, count=52 * e.count) for e in week]
        assert year == epsilon(at_once, 1e-6)
        assert year == pytest.approx(auditor(at_once, 1e-6), rel=0.01)
        assert epsilon(week, 1e-6) < year < 52 * epsilon(week, 1e-6) / 4

    def test_weeks_that_differ(self) -> None:
        """Different runs compose to what the auditor finds, between the extremes."""
        weeks: list[Event] = [PoissonGaussianSum(5.0 + w / 4, 1.0, 0.2, 60) for w in range(4)]
        most = [replace(weeks[0], count=240)]
        assert library_pld(weeks, 1e-6) == pytest.approx(auditor(weeks, 1e-6), rel=2e-3)
        assert library_pld(weeks, 1e-6) < library_pld(most, 1e-6)


class TestPlantedFailures:
    """What an accountant that errs does to the claim: it never makes it smaller."""

    @staticmethod
    def plant(patch: pytest.MonkeyPatch, wrong: Any, *names: str) -> None:
        """Replace accountants by one that returns, or raises, what is wrong."""

        def broken(*_: Any) -> float:
            if isinstance(wrong, Exception):
                raise wrong
            return float(wrong)

        said = honest().opinions
        patch.setattr(accountants, "prv_epsilon", lambda *_: said[OPACUS])
        patch.setattr(accountants, "pld_epsilon", lambda *_: said[DP_ACCOUNTING])
        for name in names:
            patch.setattr(accountants, name, broken)
        common.accounting._assess_sampled.cache_clear()

    @pytest.mark.parametrize("name", ["prv_epsilon", "pld_epsilon"])
    @pytest.mark.parametrize(
        "wrong",
        [
            RuntimeError("Discrete mean differs significantly from continuous mean."),
            OverflowError("math range error"),
            MemoryError(),
            IndexError("index 7 is out of bounds"),
            ModuleNotFoundError("No module named 'opacus'"),
            math.nan,
            math.inf,
            -math.inf,
            -0.0064,
            0.0,
        ],
        ids=repr,
    )
    def test_the_other_decides(
        self, monkeypatch: pytest.MonkeyPatch, name: str, wrong: Any
    ) -> None:
        """Where one fails the other is claimed, and a note says why."""
        broken, other = (
            (OPACUS, DP_ACCOUNTING) if name == "prv_epsilon" else (DP_ACCOUNTING, OPACUS)
        )
        self.plant(monkeypatch, wrong, name)
        found = assess(SAMPLED, 1e-5)
        assert found.epsilon == honest().opinions[other]
        assert found.accountant.startswith(other)
        assert isinstance(found.opinions[broken], str)
        assert found.notes == (f"{broken} {found.opinions[broken]}; {other} was used instead.",)

    @pytest.mark.parametrize("name", ["prv_epsilon", "pld_epsilon"])
    @pytest.mark.parametrize("factor", [0.7, 0.95, 1.05, 3.0])
    def test_too_small_or_too_large(
        self, monkeypatch: pytest.MonkeyPatch, name: str, factor: float
    ) -> None:
        """Where they are apart the larger is claimed, and a note says so."""
        self.plant(monkeypatch, honest().epsilon * factor, name)
        found = assess(SAMPLED, 1e-5)
        assert found.epsilon >= honest().epsilon * 0.99
        assert "more than 2 % apart" in found.notes[0]
        if factor == 3.0:
            assert found.notes[1].startswith("The Renyi bound")

    def test_agreement_is_no_note(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two values less than 2 % apart need no words."""
        self.plant(monkeypatch, honest().epsilon * 0.985, "prv_epsilon")
        assert assess(SAMPLED, 1e-5).notes == ()

    def test_renyi_is_the_last_resort(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If both libraries fail, the Renyi bound is claimed; it is never smaller."""
        self.plant(monkeypatch, ValueError("no"), "prv_epsilon", "pld_epsilon")
        found = assess(SAMPLED, 1e-5)
        assert found.epsilon == honest().opinions[RENYI] > honest().epsilon
        assert found.accountant.startswith("Renyi bound (hansa ")
        assert len(found.notes) == 2

    def test_no_number_without_an_accountant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If all fail there is an error with all reasons, and no number."""
        self.plant(monkeypatch, -1.0, "prv_epsilon", "pld_epsilon", "renyi_epsilon")
        with pytest.raises(AccountingError, match=r"none is claimed: Opacus.*PLD.*Renyi"):
            epsilon(SAMPLED, 1e-5)
        with pytest.raises(AccountingError, match="Renyi bound returned"):
            rdp_upper_bound(SAMPLED, 1e-5)

    def test_opinion_of_opacus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The opinion alone is an error where Opacus has none."""
        self.plant(monkeypatch, math.nan, "prv_epsilon")
        with pytest.raises(AccountingError, match="Opacus PRV returned epsilon nan"):
            opacus_epsilon(SAMPLED, 1e-5)


class TestHardSettings:
    """Settings where accountants were seen to fail."""

    def test_tiny_delta(self) -> None:
        """Where a delta is lost in rounding, the libraries stand back for the Renyi bound."""
        events = [PoissonGaussianSum(2.0, 1.0, 0.1, 1000)]
        found = assess(events, 1e-12)
        assert found.epsilon == rdp_upper_bound(events, 1e-12)
        assert "too small for 1000 steps" in str(found.opinions[DP_ACCOUNTING])
        assert len(found.notes) == 2

    def test_small_delta(self) -> None:
        """A delta of 1e-12 is no obstacle in itself."""
        found = assess([PoissonGaussianSum(2.0, 1.0, 0.1, 100)], 1e-12)
        assert found.notes == ()
        assert 0.94 < found.epsilon / float(found.opinions[RENYI]) < 0.97

    def test_huge_epsilon(self) -> None:
        """Beyond 700 Opacus would silently return 709; it is not asked."""
        found = assess([PoissonGaussianSum(0.5, 1.0, 0.5, 1000)], 1e-6)
        assert found.epsilon == pytest.approx(904.3, rel=1e-3)
        assert "above 700" in found.notes[0]

    def test_lone_limit(self) -> None:
        """A value below what a part of the events costs is a failure, even if it is alone."""
        events = [GaussianSum(0.2, 1.0, 1000), PoissonGaussianSum(2.0, 1.0, 1e-4, 10)]
        found = assess(events, 1e-6)
        assert found.epsilon >= epsilon(events[:1], 1e-6)

    def test_tiny_epsilon(self) -> None:
        """Almost no privacy loss is almost no epsilon, and never a negative one."""
        assert 0 < epsilon([PoissonGaussianSum(50.0, 1.0, 0.05, 10)], 1e-6) < 0.02
        assert library_pld([PoissonGaussianSum(1e6, 1.0, 1e-3)], 1e-5) == 0.0

    def test_long_tail(self) -> None:
        """A step with a very long tail neither fills the memory nor loses the tail."""
        found = library_pld([PoissonGaussianSum(0.1, 1.0, 1e-5, 10)], 1e-6)
        assert found == pytest.approx(60.8675, rel=1e-4)

    def test_too_many_steps(self) -> None:
        """A billion sampled steps are bounded, not refused."""
        found = assess([PoissonGaussianSum(200.0, 1.0, 0.01, 10**9)], 1e-6)
        assert found.accountant.startswith(RENYI)
        assert 8 < found.epsilon < 10

    @pytest.mark.parametrize("sigma", [0.09, 1e-3, 1e-200])
    def test_hardly_any_noise(self, sigma: float) -> None:
        """Absurdly little noise is bounded from above, or refused."""
        assert rdp_upper_bound([PoissonGaussianSum(sigma, 1.0, 0.1)], 1e-5) >= 1.0 / sigma


class TestRenyi:
    """The Renyi curve and its bound."""

    @settings(max_examples=8, deadline=None)
    @given(st.floats(0.11, 60), st.floats(1e-4, 0.9999))
    def test_rises_with_order(self, sigma: float, rate: float) -> None:
        """Two formulas, interleaved, make one rising curve below that without sampling."""
        curve = accountants._step_curve(sigma, rate)
        in_order = np.argsort(accountants.ORDERS)
        rises = np.diff(curve[in_order])
        assert np.all(rises > -1e-6 * curve[in_order][1:] - 1e-11)  # 1e-11: what is added
        assert np.all(curve <= accountants.ORDERS / 2 / sigma**2 * (1 + 1e-12))

    @pytest.mark.parametrize(("sigma", "rate"), [(0.6, 0.01), (1.0, 0.3), (4.0, 0.9)])
    def test_equals_a_library(self, sigma: float, rate: float) -> None:
        """Whole orders are those of dp-accounting; it is not below us at the others."""
        from dp_accounting.rdp import rdp_privacy_accountant

        orders = [1.5, 1.9, 2.5, 3.7, 2.0, 5.0, 32.0, 64.0]
        where = [int(np.abs(accountants.ORDERS - order).argmin()) for order in orders]
        orders = [float(accountants.ORDERS[i]) for i in where]
        ours = accountants._step_curve(sigma, rate)[where]
        theirs = rdp_privacy_accountant._compute_rdp_poisson_subsampled_gaussian(
            rate, sigma, orders
        )
        assert ours[4:] == pytest.approx(theirs[4:], rel=1e-6)
        assert np.all(ours <= theirs * (1 + 1e-6))

    @pytest.mark.parametrize(("sigma", "rate"), [(0.3, 0.02), (1.0, 0.3), (5.0, 0.9)])
    def test_fractional_orders(self, sigma: float, rate: float) -> None:
        """Our quadrature is scipy's."""
        from scipy.integrate import quad

        for i in (0, 12, 23, 40):
            order = float(accountants.ORDERS[i])

            def density(z: float, order: float = order) -> float:
                ratio = 1 - rate + rate * math.exp((2 * z - 1) / 2 / sigma**2)
                return float(
                    ratio**order * math.exp(-z * z / 2 / sigma**2) / sigma / math.sqrt(2 * math.pi)
                )

            ends = (-12 * sigma, order + 12 * sigma)
            moment, _ = quad(density, *ends, limit=500, epsabs=0, epsrel=1e-11, points=[0, order])
            expected = math.log(moment) / (order - 1)
            assert accountants._step_curve(sigma, rate)[i] == pytest.approx(expected, rel=1e-5)

    @given(st.floats(1e-3, 30), st.floats(1e-12, 0.4))
    def test_never_below_the_closed_form(self, mu: float, delta: float) -> None:
        """For sums over all customers the bound is never below the exact value."""
        exact, bound = gaussian_epsilon(mu, delta), accountants.renyi_epsilon(mu, (), delta)
        assert bound >= exact * (1 - 1e-9)

    def test_no_negative_epsilon(self) -> None:
        """Opacus' own bound was once -0.0064 here; ours is zero or more."""
        assert rdp_upper_bound([PoissonGaussianSum(4.0, 1.0, 0.01, 10)], 0.01) >= 0.0

    def test_delta_covers_it(self) -> None:
        """Where delta is above the total variation, no epsilon is needed."""
        assert rdp_upper_bound([GaussianSum(1e6, 1.0)], 1e-5) == 0.0

    def test_overflow(self) -> None:
        """What floats do not hold is infinite, not an error and not small."""
        assert rdp_upper_bound([GaussianSum(5e-324, 1.0)], 1e-5) == math.inf


class TestWithin:
    """within."""

    def test_exactly_full(self) -> None:
        """A plan that fills its cap exactly is within it, a part in a million more is not."""
        mu = mu_for(1.0, 1e-5)
        assert within([GaussianSum(1 / mu, 1.0)], 1e-5, 1.0) == (True, pytest.approx(1.0))
        assert not within([GaussianSum((1 - 1e-6) / mu, 1.0)], 1e-5, 1.0)[0]

    def test_slack(self) -> None:
        """The slack is a billionth: rounding of floats, no more."""
        cap = epsilon([GaussianSum(4.0, 1.0)], 1e-5)
        assert within([GaussianSum(4.0, 1.0)], 1e-5, cap * (1 - 0.9e-9))[0]
        assert not within([GaussianSum(4.0, 1.0)], 1e-5, cap * (1 - 1.1e-9))[0]

    def test_quick_yes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the Renyi bound says yes, nobody else is asked."""
        monkeypatch.setattr(accountants, "pld_epsilon", None)
        monkeypatch.setattr(accountants, "prv_epsilon", None)
        bound = rdp_upper_bound(SAMPLED, 1e-5)
        assert within(SAMPLED, 1e-5, bound) == (True, bound)

    def test_slow_yes(self) -> None:
        """Between claim and Renyi bound the full assessment says yes, below the claim no."""
        claimed, bound = epsilon(SAMPLED, 1e-5), rdp_upper_bound(SAMPLED, 1e-5)
        assert within(iter(SAMPLED), 1e-5, (claimed + bound) / 2) == (True, claimed)
        assert within(SAMPLED, 1e-5, claimed) == (True, claimed)
        assert within(SAMPLED, 1e-5, claimed * 0.999) == (False, claimed)

    def test_nothing(self) -> None:
        """Nothing is within any cap."""
        assert within([], 1e-5, 0.0) == (True, 0.0)


class TestCovers:
    """covers."""

    def test_noise_may_be_divided_anew(self) -> None:
        """Ten sums at sigma 4 pay for any sums with the same mu^2 in total, and no more."""
        reserved = [GaussianSum(4.0, 1.0, 10)]
        assert covers(reserved, [GaussianSum(2.0, 3.0, 2), GaussianSum(4.0, 7.0, 2)])
        assert not covers(reserved, [GaussianSum(2.0, 3.0, 2), GaussianSum(4.0, 7.0, 3)])

    def test_rounding_is_forgiven(self) -> None:
        """Sums of floats that are equal on paper cover each other; a part in 1e8 does not pass."""
        tenth = [GaussianSum(math.sqrt(10) * 3, 1.0)] * 10
        assert covers([GaussianSum(3.0, 1.0)], tenth)
        assert covers(tenth, [GaussianSum(3.0, 1.0)])
        assert not covers(tenth, [GaussianSum(3.0 * (1 - 1e-8), 1.0)])

    def test_sampled_sums_are_counted(self) -> None:
        """A sampled sum is covered by one with the same noise and rate only."""
        reserved = [PoissonGaussianSum(2.0, 1.0, 0.1, 3), PoissonGaussianSum(2.0, 1.0, 0.2)]
        assert covers(reserved, [PoissonGaussianSum(2.0, 9.0, 0.1)] * 3)
        assert not covers(reserved, [PoissonGaussianSum(2.0, 1.0, 0.1)] * 4)
        assert not covers(reserved, [PoissonGaussianSum(2.0, 1.0, 0.2, 2)])
        assert not covers(reserved, [PoissonGaussianSum(3.0, 1.0, 0.1)])
        assert not covers(reserved, [GaussianSum(50.0, 1.0)])
        assert not covers([GaussianSum(0.1, 1.0)], [PoissonGaussianSum(2.0, 1.0, 0.1)])

    def test_nothing(self) -> None:
        """Nothing is covered by nothing, and something is not."""
        assert covers([], [])
        assert covers([], [GaussianSum(1.0, 1.0, 0), PoissonGaussianSum(1.0, 1.0, 0.5, 0)])
        assert not covers([], [GaussianSum(1e100, 1.0)])

    def test_infinite_is_not_enough(self) -> None:
        """What floats do not hold covers nothing."""
        assert not covers([GaussianSum(1e-200, 1.0)], [GaussianSum(1e-200, 1.0)])

    @settings(max_examples=6, deadline=None)
    @given(some_events, some_events, some_events)
    def test_covered_costs_no_more(
        self, reserved: list[Event], taken: list[Event], rest: list[Event]
    ) -> None:
        """With any other events, what is covered has no larger epsilon."""
        taken = [replace(event, count=max(event.count // 4, 1)) for event in [*taken, *reserved]]
        if not covers(reserved, taken):
            taken = [replace(event, count=event.count // 2) for event in reserved]
        assert covers(reserved, taken)
        for accountant in (library_pld, rdp_upper_bound):
            whole = accountant([*rest, *reserved], 1e-5)
            assert accountant([*rest, *taken], 1e-5) <= whole * (1 + 1e-3)

    @given(some_events)
    def test_covers_itself(self, events: list[Event]) -> None:
        """Everything covers itself, in any grouping, and one application less."""
        single = [replace(event, count=1) for event in events for _ in range(event.count)]
        assert covers(events, single)
        assert covers(single, events)
        assert not covers(single[1:], events)


class TestNoiseMultiplier:
    """sampled_noise_multiplier."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("target", "rate", "steps"), [(1.0, 0.1, 30), (0.2, 0.5, 5), (8.0, 0.02, 100)]
    )
    def test_noise_multiplier_reaches_target(self, target: float, rate: float, steps: int) -> None:
        """The noise found composes, with everything else, to the target and hardly less."""
        others = (GaussianSum(40.0, 1.0, 2),)
        sigma = sampled_noise_multiplier(target, 1e-5, rate, steps, others)
        spent = epsilon((*others, PoissonGaussianSum(sigma, 1.0, rate, steps)), 1e-5)
        assert target * 0.998 <= spent <= target

    def test_unreachable_target(self) -> None:
        """Where the rest of the plan alone passes the target, no noise is returned."""
        with pytest.raises(AccountingError, match="no noise multiplier"):
            sampled_noise_multiplier(0.5, 1e-5, 0.1, 2, (GaussianSum(1.0, 1.0),))


def told(events: list[Event]) -> float:
    """Return what dp-accounting says."""
    said = assess(events, 1e-5).opinions[DP_ACCOUNTING]
    assert isinstance(said, float)
    return said


class TestRunningEpsilon:
    """RunningEpsilon: never below what is claimed, and cheap."""

    SAMPLED = PoissonGaussianSum(1.2, 1.0, 0.1, 2)

    def test_sums_over_all_customers(self) -> None:
        """Without sampled sums it is the closed form."""
        events = [GaussianSum(5.0, 1.0)] * 7
        assert RunningEpsilon(events, 1e-5).bound(events) == epsilon(events, 1e-5)

    @pytest.mark.slow
    def test_never_below_what_is_claimed(self) -> None:
        """At every point of a run, sums over all customers in between, and rising."""
        planned = [*[self.SAMPLED] * 40, *[GaussianSum(20.0, 1.0)] * 4]
        running, taken, last = RunningEpsilon(planned, 1e-5), list[Event](), 0.0
        for number in range(40):
            taken.append(self.SAMPLED)
            if number % 10 == 9:
                taken.append(GaussianSum(20.0, 1.0))
            bound = running.bound(taken)
            assert bound >= max(last, told(taken) * (1 - 1e-9))
            last = bound
        assert last <= epsilon(planned, 1e-5) * 1.02

    def test_few_are_worked_out(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A run of 160 sampled sums asks the accountant some sixteen times."""
        asked = list[Any]()
        monkeypatch.setattr(
            "common.accountants.GrowingLoss.epsilon",
            lambda _, *given: asked.append(given) or len(asked),
        )
        planned = [self.SAMPLED] * 160
        running = RunningEpsilon(planned, 1e-5)
        bounds = [running.bound(planned[: n + 1]) for n in range(160)]
        assert len(asked) == 16
        assert bounds == sorted(bounds)

    @settings(max_examples=10, deadline=None)
    @given(
        st.lists(st.tuples(st.sampled_from([0, 1]), st.integers(1, 30)), min_size=1, max_size=6),
        st.sampled_from([0.0, 0.05, 0.7]),
        st.sampled_from([1e-5, 1e-8]),
    )
    def test_growing(self, pieces: list[tuple[int, int]], mu: float, delta: float) -> None:
        """Composed piece by piece it is what is composed at once, in whatever order."""
        kinds, counts = [(0.9, 0.05), (1.6, 0.2)], [0, 0]

        def sampled() -> tuple[tuple[float, float, int], ...]:
            return tuple((*kinds[k], counts[k]) for k in (0, 1) if counts[k])

        planned = tuple((*kind, 180) for kind in kinds)
        growing = accountants.GrowingLoss(mu, planned)
        for kind, more in pieces:
            counts[kind] += more
            growing.epsilon(mu, sampled(), delta)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accountants, "_interval", lambda *_: growing._interval)
            at_once = accountants.pld_epsilon(mu, sampled(), delta)
        assert growing.epsilon(mu, sampled(), delta) == pytest.approx(at_once, rel=1e-6)

    def test_growing_with_other_sums(self) -> None:
        """Sums over all customers come and go between; nothing of them stays, nothing is lost."""
        growing = accountants.GrowingLoss(0.5, ((1.2, 0.1, 40),))
        for mu, count in (
            (0.0, 3),
            (0.3, 3),
            (0.3, 10),
            (0.5, 10),
            (0.5, 22),
            (0.0, 40),
            (0.5, 40),
        ):
            found = growing.epsilon(mu, ((1.2, 0.1, count),), 1e-5)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(accountants, "_interval", lambda *_: growing._interval)
                at_once = accountants.pld_epsilon(mu, ((1.2, 0.1, count),), 1e-5)
            assert found == pytest.approx(at_once, rel=1e-6)

    @pytest.mark.parametrize("mu", [0.5, 0.3])
    def test_growing_after_a_failure(self, mu: float) -> None:
        """A library that fails on the way loses no step of those that are told next."""
        growing = accountants.GrowingLoss(0.5, ((1.2, 0.1, 40),))
        growing.epsilon(0.5, ((1.2, 0.1, 10),), 1e-5)

        def fail(_one: Any, _other: Any) -> Any:
            raise MemoryError

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accountants, "_together", fail)
            with pytest.raises(MemoryError):
                growing.epsilon(mu, ((1.2, 0.1, 30),), 1e-5)
        found = growing.epsilon(mu, ((1.2, 0.1, 30),), 1e-5)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(accountants, "_interval", lambda *_: growing._interval)
            at_once = accountants.pld_epsilon(mu, ((1.2, 0.1, 30),), 1e-5)
        assert found == pytest.approx(at_once, rel=1e-6)

    def test_a_bound_after_a_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What could not be worked out is worked out anew; the bound of before is not told."""
        running = RunningEpsilon([self.SAMPLED] * 80, 1e-5)
        early = running.bound([self.SAMPLED] * 5)

        def fail(*_: Any) -> float:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("common.accountants.GrowingLoss.epsilon", fail)
            with pytest.raises(KeyboardInterrupt):
                running.bound([self.SAMPLED] * 80)
        late = running.bound([self.SAMPLED] * 80)
        assert late > early
        assert late >= told([self.SAMPLED] * 80) * (1 - 1e-9)

    def test_a_kind_that_is_given_twice(self) -> None:
        """It counts twice."""
        twice, once = ((1.0, 0.05, 50), (1.0, 0.05, 50)), ((1.0, 0.05, 100),)
        assert accountants.pld_epsilon(0.0, twice, 1e-5) == pytest.approx(
            accountants.pld_epsilon(0.0, once, 1e-5), rel=1e-3
        )

    def test_noise_that_no_float_squares(self) -> None:
        """That is an error of the accounting, with words."""
        with pytest.raises(AccountingError, match="too little noise"):
            RunningEpsilon([PoissonGaussianSum(1e-160, 1.0, 0.1)], 1e-5)

    def test_growing_never_shrinks(self) -> None:
        """What was composed cannot be taken out: that is an error, and no number."""
        growing = accountants.GrowingLoss(0.0, ((1.2, 0.1, 20),))
        growing.epsilon(0.0, ((1.2, 0.1, 20),), 1e-5)
        with pytest.raises(AccountingError, match="not there any more"):
            growing.epsilon(0.0, ((1.2, 0.1, 18),), 1e-5)

    def test_more_than_planned(self) -> None:
        """What was not planned is counted all the same."""
        running = RunningEpsilon([self.SAMPLED], 1e-5)
        assert running.bound([self.SAMPLED] * 3) >= told([self.SAMPLED] * 3)
