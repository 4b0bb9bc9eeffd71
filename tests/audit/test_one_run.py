"""Tests of the one-run audit."""

import numpy as np
import pytest

from audit.one_run import MAX_CANARIES, OneRun, canaries_for, one_run_audit
from benchmarks.audit_faults import FAULTS, SAMPLED, contract_of, noise_times
from common.contract import Contract
from common.errors import ContractError
from simulations.audited import RealSubject

SMALL = contract_of(4.0, model={"family": "linear"}, training={"rounds": 10})
BY_NAME = {fault.name: fault for fault in FAULTS}


def audit(contract: Contract, canaries: int = 400, seed: int | None = 1) -> OneRun:
    """Audit the real code."""
    with RealSubject() as subject:
        return one_run_audit(subject, contract, canaries, seed)


def test_honest_training_stays_below_the_claim() -> None:
    """The bound is above nothing and below the claim; the ledger paid for the whole run."""
    found = audit(SMALL)
    assert 0.3 < found.bound.epsilon < 4.0
    assert found.rounds == 10
    assert 3.0 < found.charged <= 4.04


def test_missing_noise_is_seen() -> None:
    """Without noise every guess is right."""
    with noise_times(0.0):
        found = audit(SMALL)
    assert found.bound.right == found.bound.guesses
    assert found.bound.epsilon > 6.0


def test_is_repeatable() -> None:
    """The same seed gives the same bound."""
    assert audit(SMALL, 100) == audit(SMALL, 100)


def test_no_room_for_canaries() -> None:
    """More canaries than columns are refused, and the message says what to do."""
    wide = contract_of(features=[{"name": f"f{i}"} for i in range(2500)])
    with pytest.raises(ContractError, match="--canaries"):
        audit(wide, MAX_CANARIES)


@pytest.mark.parametrize(("epsilon", "expected"), [(1.0, 1000), (4.0, 1000), (8.0, 2000)])
def test_large_claims_need_more_canaries(epsilon: float, expected: int) -> None:
    """Perfect guesses among a thousand show 10 at most."""
    assert canaries_for(epsilon) == expected


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"family": "linear"}},
        {"training": {"mode": "local", "rounds": 10}},
        {"training": SAMPLED.model_dump()["training"], "model": {"family": "linear"}},
        {"training": {"engine": "opacus", "rounds": 5}, "model": {"family": "linear"}},
    ],
    ids=["mlp", "linear", "local", "sampled", "opacus"],
)
def test_bound_stays_below_the_claim(epsilon: float, sections: dict[str, object]) -> None:
    """At every claim, in every mode; the real source of noise."""
    found = audit(contract_of(epsilon, **sections), canaries_for(epsilon), seed=None)
    assert 0.0 <= found.bound.epsilon < epsilon
    assert found.bound.distribution_free < epsilon


@pytest.mark.slow
@pytest.mark.parametrize("name", ["no noise", "noise x 0.1"])
def test_gross_faults_are_seen(name: str) -> None:
    """Canaries alone see what is grossly wrong, at epsilon 4."""
    with BY_NAME[name].plant():
        assert audit(contract_of(4.0), 1000).bound.epsilon > 4.0


@pytest.mark.slow
def test_frozen_noise_is_not_seen() -> None:
    """Canaries alone miss noise that never changes: that is why both layers must pass."""
    with BY_NAME["same noise every step"].plant():
        found = audit(contract_of(4.0), 1000)
    assert found.bound.epsilon < 4.0
    assert np.isfinite(found.bound.epsilon)
