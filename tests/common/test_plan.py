"""Tests of the plan: the whole budget, never more, the same at both ends."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import epsilon, gaussian_epsilon, mu_for
from common.contract import Contract, parse_contract
from common.errors import AccountingError
from common.events import GaussianSum, PoissonGaussianSum
from common.fixed_point import local_lattice
from common.network import network_of
from common.plan import (
    CENSUS,
    EVALUATION,
    PROFILE,
    UPDATE,
    evaluation_rounds,
    lattice_of,
    plan_of,
    planned_epsilon,
    planned_epsilon_towards_server,
)


def contract_of(**sections: Any) -> Contract:
    """Build a small contract; keywords replace sections."""
    document = {
        "federation": {"name": "test", "min_merchants": 10},
        "features": [{"name": "a"}, {"name": "b"}],
        "segments": {"names": ["x", "y", "z"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
    }
    return parse_contract({**document, **sections}, source="test")


@st.composite
def contracts(draw: st.DrawFn) -> Contract:
    """Draw a contract without sampling."""
    mode = draw(st.sampled_from(["distributed", "local"]))
    training = {
        "mode": mode,
        "rounds": draw(st.integers(1, 300)),
        "spare_rounds": draw(st.integers(0, 5)),
        "local_steps": draw(st.integers(1, 9)) if mode == "local" else 1,
    }
    census, evaluation, profiles = (draw(st.floats(0.01, 0.3)) for _ in range(3))
    split = {"census": census, "evaluation": evaluation, "profiles": profiles}
    split["training"] = 1.0 - sum(split.values())
    return contract_of(
        training=training,
        privacy={
            "epsilon": draw(st.floats(0.01, 100)),
            "delta": draw(st.floats(1e-10, 0.01)),
            "split": split,
        },
        publication={
            "evaluate_every": draw(st.integers(1, 60)),
            "profiles": draw(st.booleans()),
        },
    )


class TestBudget:
    """planned_epsilon."""

    @pytest.mark.slow
    @settings(deadline=None)
    @given(contracts())
    def test_uses_the_budget_and_no_more(self, contract: Contract) -> None:
        """All releases together stay within the contract's epsilon, and use it up."""
        ratio = planned_epsilon(contract) / contract.privacy.epsilon
        assert 0.999 < ratio <= 1 + 1e-9

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("target", "rate", "rounds", "profiles"),
        [(1.0, 0.2, 20, True), (8.0, 0.05, 30, False), (0.3, 0.5, 5, True), (40.0, 0.3, 10, True)],
    )
    def test_sampled(self, target: float, rate: float, rounds: int, profiles: bool) -> None:
        """With sampled training too, and noise is never what exhausts the accountants."""
        contract = contract_of(
            training={"mode": "local", "sampling_rate": rate, "rounds": rounds},
            privacy={"epsilon": target, "delta": 1e-5},
            publication={"profiles": profiles},
        )
        assert 0.99 * target < planned_epsilon(contract) <= target
        assert isinstance(plan_of(contract).update.event, PoissonGaussianSum)

    @pytest.mark.slow
    @settings(deadline=None)
    @given(contracts())
    def test_every_part_of_the_run_fits(self, contract: Contract) -> None:
        """No prefix of the releases costs more than the whole."""
        events = plan_of(contract).events()
        delta = contract.privacy.delta
        parts = [epsilon(events[:end], delta) for end in range(len(events) + 1)]
        assert parts == sorted(parts)


class TestPlan:
    """plan_of."""

    def test_same_at_both_ends(self) -> None:
        """Equal contracts, read apart, give equal plans."""
        one = plan_of.__wrapped__(contract_of())
        other = plan_of.__wrapped__(contract_of())
        assert one == other

    def test_lengths(self) -> None:
        """Vectors are as long as what they hold."""
        contract = contract_of()
        plan = plan_of(contract)
        assert (plan.census.length, plan.evaluation.length) == (1, 9)
        assert plan.update.length == network_of(contract).size
        assert plan.profile is not None
        assert plan.profile.length == 3 * (1 + 2)

    def test_no_profiles(self) -> None:
        """A contract without profiles plans none, and trains with what they would have cost."""
        plan = plan_of(contract_of(publication={"profiles": False}))
        assert plan.profile is None
        assert len(list(plan.releases())) == 4
        with_profiles = plan_of(contract_of()).update.event.noise_multiplier
        assert plan.update.event.noise_multiplier < with_profiles

    def test_spare_rounds_are_paid(self) -> None:
        """The plan pays for the spare rounds too."""
        plan = plan_of(contract_of(training={"rounds": 10, "spare_rounds": 3}))
        assert plan.update.times == 13

    def test_local_steps_are_counted(self) -> None:
        """One update of mode 'local' is as many events as it has steps."""
        plan = plan_of(contract_of(training={"mode": "local", "rounds": 10, "local_steps": 4}))
        assert plan.update.event.count == 4
        assert sum(e.count for e in plan.events() if e == _update_of(plan)) == 4 * plan.update.times

    def test_own_optimizers_cost_nothing(self) -> None:
        """What is made of noisy sums alters neither noise nor charges nor lattice."""
        local = {"mode": "local", "rounds": 10, "local_steps": 4}
        plain = plan_of(contract_of(training=local))
        for changes in ({"local_momentum": 0.9}, {"local_optimizer": "adam"}):
            assert plan_of(contract_of(training={**local, **changes})) == plain

    def test_sensitivities(self) -> None:
        """Updates move by the clip norm, everything else by one."""
        plan = plan_of(contract_of(privacy={"epsilon": 1.0, "delta": 1e-5, "clip_norm": 3.5}))
        found = [release.event.sensitivity for release in plan.releases()]
        assert found == [1.0, 3.5, 1.0, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("rounds", "every", "expected"),
        [(30, 10, (10, 20, 30)), (25, 10, (10, 20, 25)), (5, 10, (5,)), (3, 1, (1, 2, 3))],
    )
    def test_evaluation_rounds(self, rounds: int, every: int, expected: tuple[int, ...]) -> None:
        """Every so many rounds, and always after the last."""
        contract = contract_of(training={"rounds": rounds}, publication={"evaluate_every": every})
        assert evaluation_rounds(contract) == expected


class TestReleaseOf:
    """Plan.release_of."""

    def test_known_stages(self) -> None:
        """Each stage has its release; the last evaluation is finer than those before."""
        plan = plan_of(contract_of())
        assert plan.release_of(CENSUS, 0, 60) is plan.census
        assert plan.release_of(UPDATE, 1, 60) is plan.update
        assert plan.release_of(PROFILE, 60, 60) is plan.profile
        assert plan.release_of(EVALUATION, 10, 60) is plan.evaluation
        assert plan.release_of(EVALUATION, 60, 60) is plan.final_evaluation

    @pytest.mark.parametrize("stage", ["", "Census", "gradient", "update "])
    def test_unknown_stage(self, stage: str) -> None:
        """A stage that the plan does not know releases nothing."""
        assert plan_of(contract_of()).release_of(stage, 1, 60) is None

    def test_profile_that_is_not_planned(self) -> None:
        """Without profiles in the contract the stage is unknown."""
        plan = plan_of(contract_of(publication={"profiles": False}))
        assert plan.release_of(PROFILE, 60, 60) is None


class TestTowardsServer:
    """Release.towards_server."""

    @pytest.mark.parametrize("contributors", [1, 4, 90])
    def test_single_share(self, contributors: int) -> None:
        """A single vector holds one share of the noise: sigma / sqrt(m)."""
        release = plan_of(contract_of()).update
        alone = release.towards_server(contributors).noise_multiplier
        assert alone == release.event.noise_multiplier / math.sqrt(contributors)

    def test_nothing_else_changes(self) -> None:
        """Only the noise differs."""
        release = plan_of(contract_of()).update
        alone = release.towards_server(4)
        sigma = release.event.noise_multiplier
        assert dataclasses.replace(alone, noise_multiplier=sigma) == release.event


def test_single_messages_cost_more() -> None:
    """Towards the server the whole plan costs what m-fold mu^2 costs; alone it costs the same."""
    contract = contract_of(aggregation={"secure": False})
    shared = plan_of(contract).events_towards_server(9)
    mu = math.sqrt(9) * mu_for(1.0, 1e-5)
    assert epsilon(shared, 1e-5) == pytest.approx(gaussian_epsilon(mu, 1e-5), rel=1e-9)
    assert planned_epsilon_towards_server(contract) == epsilon(shared, 1e-5)
    assert plan_of(contract).events_towards_server(1) == plan_of(contract).events()


def test_secure_sums_cost_no_more_towards_the_server() -> None:
    """Whoever runs the coordinator sees what everybody may see."""
    contract = contract_of()
    assert planned_epsilon_towards_server(contract) == planned_epsilon(contract)


class TestLattices:
    """The lattice of every release, and its room in the ring."""

    @pytest.mark.slow
    @settings(deadline=None)
    @given(contracts(), st.sampled_from([32, 64]), st.sampled_from([1, 1000, 10**6, 10**7, 10**12]))
    def test_every_sum_fits_into_the_ring(
        self, contract: Contract, ring_bits: int, customers: int
    ) -> None:
        """The largest exact sum and twenty deviations of the noisiest sum do, or no plan is made.

        An update of mode 'local' is clipped instead.
        """
        found = contract.revised(aggregation={"ring_bits": ring_bits, "max_customers": customers})
        try:
            plan = plan_of(found)
        except AccountingError as error:
            assert "aggregation.ring_bits = 64" in str(error)  # noqa: PT017
            assert ring_bits == 32
            return
        half, merchants = 2 ** (ring_bits - 1), found.max_merchants
        for release in plan.releases():
            lattice = lattice_of(release, found)
            assert lattice.ring_bits == ring_bits
            if release.stage == UPDATE and found.training.mode == "local":
                _, bound = local_lattice(ring_bits, merchants)
                assert merchants * bound / lattice.step < half
                continue
            assert lattice.step == release.event.sensitivity / release.steps
            spread = release.event.noise_multiplier * math.sqrt(
                merchants / found.noise_contributors
            )
            assert (customers + 20 * spread) * release.steps <= half
            share = release.event.noise_multiplier / math.sqrt(found.noise_contributors)
            assert share * release.steps >= 50

    @pytest.mark.parametrize(
        ("customers", "steps"), [(1, 2**19), (10**6, 2**11), (2 * 10**7, 2**6)]
    )
    def test_room_for_customers_costs_steps(self, customers: int, steps: int) -> None:
        """The more customers a ring of 32 bits has room for, the coarser is the lattice."""
        aggregation = {"max_customers": customers}
        assert plan_of(contract_of(aggregation=aggregation)).census.steps == steps
        aggregation["ring_bits"] = 64
        assert plan_of(contract_of(aggregation=aggregation)).census.steps == 2**20

    @pytest.mark.parametrize("customers", [10**9, 10**12])
    def test_no_room(self, customers: int) -> None:
        """Where the ring leaves too few steps, the message says what to change."""
        with pytest.raises(AccountingError, match=r"set aggregation.ring_bits = 64"):
            plan_of(contract_of(aggregation={"max_customers": customers}))

    def test_secure_or_not(self) -> None:
        """Plain and secure sums travel on one lattice, so that they give one model."""
        plain = contract_of(aggregation={"secure": False})
        assert plan_of(plain) == plan_of(contract_of())


def _update_of(plan: Any) -> GaussianSum:
    return dataclasses.replace(plan.update.event, count=plan.update.event.count * plan.update.times)
