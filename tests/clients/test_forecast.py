"""Tests of forecasts: what counts, what is left, what fits, what a run costs and is good for."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.forecast import DROWNED, WEAK, Cost, Crowd, Spending, freed_by_settling, most
from common.accounting import epsilon, mu_for
from common.budget import DAY_S, Account, Budget, Charge
from common.contract import Contract
from common.events import GaussianSum, PoissonGaussianSum
from common.plan import plan_of, planned_epsilon
from server.publishing import accuracy_of
from tests.clients.conftest import build_contract

DELTA = 1e-5
NOW = 1_000 * DAY_S


def charge(stage: str = "update", sigma: float = 12.0, count: int = 1) -> Charge:
    """Return a charge whose server sees more than others."""
    return Charge(stage, GaussianSum(sigma, 1.0, count), GaussianSum(sigma / 2, 1.0, count))


def account_of(budget: Budget, *entries: dict[str, Any]) -> Account:
    """Fold entries, filling in what every entry has."""
    account = Account(budget)
    for seq, entry in enumerate(entries, start=2):
        account.fold(seq, {"at": NOW, "run": "run", "contract": "c" * 64, **entry})
    return account


def reserved(run: str = "run", *charges: Charge, at: float = NOW) -> dict[str, Any]:
    """Return the entry that reserves for a run."""
    releases = [one.document for one in charges or (charge(count=10),)]
    last = ["profile", 3]
    return {"kind": "reserve", "run": run, "releases": releases, "last": last, "at": at}


def released(number: int, run: str = "run") -> dict[str, Any]:
    """Return the entry of one release."""
    what = {"round": number, "attempt": 0, "step": ""}
    return {"kind": "release", "run": run, **charge().document, **what}


@pytest.fixture
def contract() -> Contract:
    """Give a contract of twenty merchants and 30 rounds."""
    return build_contract(federation={"name": "test", "min_merchants": 20}, training={"rounds": 30})


class TestSpending:
    """Spending."""

    def test_nothing_was_spent(self, contract: Contract) -> None:
        """All of the cap is left."""
        spending = Spending(Account(Budget(1.0, DELTA)), NOW)
        assert spending.runs() == []
        assert spending.epsilon(spending.counted) == 0.0
        assert spending.left() == pytest.approx(1.0, rel=1e-6)
        assert spending.left() <= 1.0 + 1e-9

    def test_a_run_counts_what_it_reserved_until_it_is_settled(self) -> None:
        """Then what it released."""
        entries = [reserved(), released(1), released(2)]
        spending = Spending(account_of(Budget(1.0, DELTA), *entries), NOW)
        (run,) = spending.runs()
        assert (run.state, run.releases) == ("reserved", 2)
        assert run.charged == run.reserved == epsilon([GaussianSum(12.0, 1.0, 10)], DELTA)
        assert run.released == epsilon([GaussianSum(12.0, 1.0, 2)], DELTA)
        settled = account_of(Budget(1.0, DELTA), *entries, {"kind": "settle"})
        (run,) = Spending(settled, NOW).runs()
        assert (run.state, run.charged) == ("settled", run.released)
        assert freed_by_settling(spending, "run") == (run.reserved, run.released)

    def test_a_run_that_is_over_counts_as_settled(self) -> None:
        """The next reservation settles it first; its last sum was asked for."""
        last = {**released(3), **charge("profile").document}
        spending = Spending(account_of(Budget(1.0, DELTA), reserved(), released(1), last), NOW)
        (run,) = spending.runs()
        assert (run.state, run.charged) == ("finished", run.released)
        assert not spending.account.runs["run"].settled
        assert freed_by_settling(spending, "run") == (run.reserved, run.released)

    def test_settling_an_expired_run_frees_nothing(self) -> None:
        """It did not count any more."""
        budget = Budget(1.0, DELTA, refresh_days=30.0)
        account = account_of(budget, reserved(), {"kind": "expire", "run": "run"})
        assert freed_by_settling(Spending(account, NOW), "run") == (0.0, 0.0)

    def test_what_is_left_fills_the_cap(self) -> None:
        """Composed with what was spent it comes to the cap, and is more than the difference."""
        spending = Spending(account_of(Budget(1.0, DELTA), reserved()), NOW)
        left = spending.left()
        assert left > 1.0 - spending.epsilon(spending.counted)
        further = GaussianSum(1.0 / mu_for(left, DELTA), 1.0)
        whole = epsilon([GaussianSum(12.0, 1.0, 10), further], DELTA)
        assert whole == pytest.approx(1.0, rel=1e-6)
        assert spending.left([charge(count=10_000)]) == 0.0

    def test_old_runs_count_in_the_lifetime_only(self) -> None:
        """By the merchant's clock, or because the ledger let them expire."""
        budget = Budget(1.0, DELTA, refresh_days=30.0)
        old, new = reserved("old", at=NOW - 31 * DAY_S), reserved("new", at=NOW - 29 * DAY_S)
        for more, now in (([], NOW), ([{"kind": "expire", "run": "old"}], NOW - 31 * DAY_S)):
            spending = Spending(account_of(budget, old, new, *more), now)
            assert {run.run: run.state for run in spending.runs()} == {
                "old": "expired",
                "new": "reserved",
            }
            assert len(spending.counted) == 1
            assert len(spending.charged) == 2
            assert spending.epsilon(spending.charged) > spending.epsilon(spending.counted)

    def test_purposes_are_told_apart(self) -> None:
        """Each alone; they do not add up."""
        entry = reserved("run", charge(count=5), charge("profile", 20.0))
        spending = Spending(account_of(Budget(1.0, DELTA), entry), NOW)
        purposes = spending.purposes()
        assert purposes["profile"] == epsilon([GaussianSum(20.0, 1.0)], DELTA)
        assert max(purposes.values()) < spending.epsilon(spending.counted) < sum(purposes.values())

    @pytest.mark.parametrize(
        "budget",
        [
            Budget(3.0, DELTA),
            Budget(30.0, DELTA, towards_server=3.0),
            Budget(30.0, DELTA, purposes=(("update", 2.0),)),
        ],
    )
    def test_runs_that_fit_are_those_that_the_ledger_takes(
        self, contract: Contract, budget: Budget
    ) -> None:
        """One more is refused, whichever cap it passes; more fit than epsilons suggest."""
        spending = Spending(account_of(budget, reserved()), NOW)
        charges = list(plan_of(contract).charges(contract.exposed_contributors))
        runs = spending.runs_left(contract)
        assert runs >= 2
        assert not spending.refusal_of(charges * runs)
        assert spending.refusal_of(charges * (runs + 1))

    def test_rounds_that_fit(self, contract: Contract) -> None:
        """More than the rounds of the runs that fit: nothing else is paid for."""
        spending = Spending(Account(Budget(1.0, DELTA)), NOW)
        assert spending.runs_left(contract) == 1
        assert spending.rounds_left(contract) > contract.training.rounds
        assert Spending(account_of(Budget(0.2, DELTA), reserved()), NOW).rounds_left(contract) == 0

    @pytest.mark.slow
    def test_sampled_sums(self) -> None:
        """What is left is found by asking the accountants, never above what they allow."""
        event = PoissonGaussianSum(2.0, 1.0, 0.05, 50)
        entry = reserved("run", Charge("update", event, event))
        spending = Spending(account_of(Budget(1.0, DELTA), entry), NOW)
        assert 0.3 < spending.left() < 1.0


class TestMost:
    """The search for what fits."""

    @given(st.integers(0, 300), st.integers(1, 200))
    def test_finds_the_largest(self, fits: int, limit: int) -> None:
        """Up to the limit."""
        assert most(lambda n: n <= fits, limit) == min(fits, limit)


class TestCost:
    """Cost."""

    def test_the_whole_is_what_is_reserved(self, contract: Contract) -> None:
        """Spare attempts included; every stage alone costs less."""
        cost = Cost(contract)
        assert cost.reserved == planned_epsilon(contract) == cost.towards_server
        assert all(stage.epsilon < cost.reserved for stage in cost.stages())
        assert sum(stage.times for stage in cost.stages() if stage.stage == "update") == 32

    def test_the_curve_rises_to_less_than_is_reserved(self, contract: Contract) -> None:
        """Because nothing failed; the last round pays for the last evaluation and profiles."""
        curve = Cost(contract).curve
        values = [value for _, value in curve]
        assert [number for number, _ in curve] == list(range(1, 31))
        assert values == sorted(values)
        assert values[-1] < Cost(contract).reserved

    def test_plain_sums_cost_more_towards_the_server(self, contract: Contract) -> None:
        """It sees single messages."""
        plain = Cost(contract.revised(aggregation={"secure": False}))
        assert plain.towards_server > plain.reserved

    def test_colluders_know_their_shares(self, contract: Contract) -> None:
        """The more, the larger epsilon; those who know everything leave no bound."""
        found = Cost(contract).colluders()
        assert found[0] == (0, pytest.approx(Cost(contract).reserved))
        assert [k for k, _ in found] == [0, 1, 2, 5]
        assert [value for _, value in found] == sorted(value for _, value in found)
        two = contract.revised(
            federation={"min_merchants": 2}, aggregation={"secure": False, "min_survivors": 1}
        )
        assert Cost(two).colluders() == [(0, pytest.approx(Cost(two).reserved)), (1, math.inf)]

    def test_local_noise_needs_nobody_else(self, contract: Contract) -> None:
        """Whoever colludes."""
        found = Cost(contract.revised(training={"mode": "local"})).colluders()
        assert len({value for _, value in found}) == 1

    def test_persons(self, contract: Contract) -> None:
        """Somebody at several merchants is exposed more than once."""
        assert all(shared > own > 1.0 for _, shared, own in Cost(contract).persons())

    @pytest.mark.slow
    def test_sampled_training_has_few_points(self, contract: Contract) -> None:
        """Each takes seconds; the last is the last round."""
        local = {"mode": "local", "sampling_rate": 0.25, "local_steps": 2}
        curve = Cost(contract.revised(training=local)).curve
        assert len(curve) <= 7
        assert curve[-1][0] == 30


class TestCrowd:
    """Crowd."""

    def test_noise_is_that_of_the_contract(self, contract: Contract) -> None:
        """The sum's noise, divided by the customers that are trained on."""
        crowd = Crowd(contract, 20, 100)
        sigma = plan_of(contract).update.event.noise_multiplier
        expected = sigma * contract.privacy.clip_norm * math.sqrt(20 / 18) / (20 * 75)
        assert crowd.noise == pytest.approx(expected, rel=0.02)  # the lattice costs 1 %
        size = plan_of(contract).update.length
        assert crowd.ratio == pytest.approx(contract.privacy.clip_norm / expected / size**0.5, 0.02)
        assert crowd.run_ratio == pytest.approx(crowd.ratio * 30**0.5)

    def test_the_verdict_grows_with_the_crowd(self, contract: Contract) -> None:
        """Drowned, weak, good."""
        crowds = [Crowd(contract, 20, customers) for customers in (5, 50, 5000)]
        assert [crowd.verdict for crowd in crowds] == ["drowned", "weak", "good"]
        assert crowds[0].run_ratio < DROWNED < crowds[1].run_ratio < WEAK < crowds[2].run_ratio

    def test_the_error_is_what_the_coordinator_will_tell(self, contract: Contract) -> None:
        """At an accuracy of one half, by the coordinator's own formula."""
        import numpy as np

        crowd = Crowd(contract, 20, 1000)
        stddev = plan_of(contract).final_evaluation.event.noise_multiplier * math.sqrt(20 / 18)
        counts = np.full((2, 2), 20 * 1000 * 0.25 / 4)
        found = accuracy_of(counts, stddev)
        assert found is not None
        assert crowd.accuracy_error == pytest.approx(found[1], rel=0.02)

    def test_a_small_crowd_publishes_little(self, contract: Contract) -> None:
        """No accuracy, and no segment's share."""
        crowd = Crowd(contract, 20, 1)
        assert crowd.accuracy_error is None
        assert crowd.smallest_segment == 1.0
        assert (Crowd(contract, 20, 1000).smallest_segment or 1.0) < 0.01

    def test_no_profiles_no_shares(self, contract: Contract) -> None:
        """Where the contract publishes none."""
        silent = contract.revised(publication={"profiles": False})
        assert Crowd(silent, 20, 100).smallest_segment is None
