"""Tests of accounting: known values, agreement of independent accountants, refusals."""

import doctest
import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import common.accounting
from common.accounting import (
    epsilon,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    mu_for,
    opacus_epsilon,
    sampled_noise_multiplier,
)
from common.errors import AccountingError
from common.events import Event, GaussianSum, PoissonGaussianSum, merged

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


def rdp_epsilon(events: tuple[Event, ...], delta: float) -> float:
    """Compose events with Opacus' Renyi accountant, an upper bound."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [
        (e.noise_multiplier, getattr(e, "sampling_rate", 1.0), e.count) for e in events
    ]
    alphas = [1 + x / 10 for x in range(1, 1000)] + list(range(101, 512))
    return float(accountant.get_epsilon(delta, alphas=alphas))


def test_examples_hold() -> None:
    """The docstrings' examples are true."""
    assert doctest.testmod(common.accounting).failed == 0


class TestGaussian:
    """Sums over all customers: the closed form."""

    @settings(max_examples=12, deadline=None)
    @given(gaussians, deltas)
    def test_equals_privacy_loss_distributions(self, events: list[Event], delta: float) -> None:
        """dp-accounting finds the same epsilon to 1e-3, and never a smaller one."""
        ours = epsilon(events, delta)
        assume(0.02 < ours < 30)
        assert pld_epsilon(events, delta) == pytest.approx(ours, rel=1e-3)

    @settings(max_examples=10, deadline=None)
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
        assert rdp_epsilon(tuple(events), delta) >= ours * (1 - 1e-6)

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
        from opacus.accountants import create_accountant

        from common.opacus_accountant import MECHANISM, HansaAccountant

        assert isinstance(create_accountant(MECHANISM), HansaAccountant)


class TestSampled:
    """Poisson-sampled sums: two libraries, the larger value, no disagreement."""

    def test_below_neither_accountant(self) -> None:
        """The larger of the two upper bounds is claimed."""
        claimed = epsilon(SAMPLED, 1e-5)
        both = (
            common.accounting._prv_epsilon(SAMPLED, 1e-5),
            common.accounting._pld_epsilon(SAMPLED, 1e-5),
        )
        assert claimed == max(both)

    def test_below_renyi_bound(self) -> None:
        """The Renyi bound of Opacus is not below what is claimed."""
        assert rdp_epsilon(SAMPLED, 1e-5) >= epsilon(SAMPLED, 1e-5) - 0.01

    def test_rate_one_is_no_sampling(self) -> None:
        """At rate 1 the accountants find the closed form."""
        sampled = epsilon([PoissonGaussianSum(4.0, 1.0, 1.0, 5)], 1e-5)
        assert sampled == pytest.approx(epsilon([GaussianSum(4.0, 1.0, 5)], 1e-5), abs=0.021)

    def test_sampling_helps(self) -> None:
        """A rarer customer is protected better."""
        often = epsilon([PoissonGaussianSum(2.0, 1.0, 0.5, 5)], 1e-5)
        assert epsilon([PoissonGaussianSum(2.0, 1.0, 0.1, 5)], 1e-5) < often
        assert often < epsilon([GaussianSum(2.0, 1.0, 5)], 1e-5)

    @pytest.mark.parametrize("factor", [0.5, 2.0])
    def test_disagreement_is_an_error(self, monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
        """If one library errs, up or down, no number is given."""
        right = common.accounting._pld_epsilon(SAMPLED, 2e-5)
        monkeypatch.setattr(common.accounting, "_pld_epsilon", lambda *_: right * factor)
        with pytest.raises(AccountingError, match="the accountants disagree"):
            epsilon(SAMPLED, 2e-5)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -0.5])
    def test_nonsense_is_an_error(self, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
        """A library's NaN or infinity is never an epsilon."""
        monkeypatch.setattr(common.accounting, "_prv_epsilon", lambda *_: value)
        with pytest.raises(AccountingError, match="Opacus PRV returned"):
            epsilon(SAMPLED, 3e-5)

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
