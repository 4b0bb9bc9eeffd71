"""The card that lies beside the model."""

from typing import Any

import pytest

from common import statements
from common.contract import Contract
from common.events import GaussianSum
from common.network import initial_parameters
from server.coordinator import Outcome
from server.model_card import model_card


@pytest.fixture
def outcome(contract: Contract) -> Outcome:
    """Give a run of two merchants and three rounds."""
    return Outcome(
        "abcd",
        initial_parameters(contract),
        100.0,
        cohorts=[2, 2, 2],
        events=[("update", GaussianSum(3.0, 2.0))],
        merchants=["a", "b"],
    )


@pytest.fixture
def documents() -> dict[str, dict[str, Any]]:
    """Give the documents that the card is written from."""
    return {
        "privacy.json": {
            "epsilon": 0.98765,
            "delta": 1e-5,
            "epsilon_towards_server": 2.5,
            "notes": [statements.NOT_MASKED["distributed"], statements.NOT_FOR_RELEASE],
        },
        "metrics.json": {"accuracy": 0.61234, "accuracy_error": 0.02345},
    }


def test_it_tells_what_was_spent_and_for_whom(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """Epsilon, delta, the server's epsilon, the unit, and what is not protected."""
    card = model_card(outcome, contract, documents)
    for part in ("0.9877", "1e-05", "2.5", statements.UNIT, *statements.NOT_PROTECTED):
        assert part in card


def test_every_note_is_on_it(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """A seeded run says so here too."""
    card = model_card(outcome, contract, documents)
    assert all(note in card for note in documents["privacy.json"]["notes"])


def test_it_tells_model_and_rounds(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """Family, inputs, segments, rounds, run and contract."""
    card = model_card(outcome, contract, documents)
    for part in ("family: linear", "3 rounds", "0 gone", "3 big", contract.sha256, "abcd"):
        assert part in card
    assert "hidden" not in card


def test_hidden_layers_are_told(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """Where the model has them."""
    contract = contract.revised(model={"family": "mlp", "hidden": [8, 4], "activation": "tanh"})
    assert "hidden layers [8, 4], tanh" in model_card(outcome, contract, documents)


def test_accuracy_comes_with_its_noise(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """And is left out where noise drowns it."""
    assert "0.612 ± 0.023" in model_card(outcome, contract, documents)
    documents["metrics.json"]["accuracy"] = None
    assert "too noisy to state" in model_card(outcome, contract, documents)
