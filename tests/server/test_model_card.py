"""The card that lies beside the model."""

from typing import Any

import pytest

from common import statements
from common.contract import Contract
from common.events import GaussianSum
from common.network import initial_parameters
from server.model_card import model_card
from server.outcome import Outcome


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
            "secure_aggregation": False,
            "epsilon_towards_server": 2.50001,
            "achieved": {"epsilon": 0.97651, "survivors_min": 90, "survivors_max": 106},
            "colluders": [
                {"colluders": 0, "epsilon": 0.97651},
                {"colluders": 1, "epsilon": 0.98111},
                {"colluders": 89, "epsilon": None},
            ],
            "notes": [statements.NOT_MASKED["distributed"], statements.NOT_FOR_RELEASE],
        },
        "metrics.json": {"accuracy": 0.61234, "accuracy_error": 0.02345},
    }


def test_it_tells_what_was_spent_and_for_whom(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """Epsilon, delta, the server's epsilon, the unit, and what is not protected."""
    card = model_card(outcome, contract, documents)
    for part in ("0.9877", "1e-05", "server: 2.501\n", statements.UNIT, *statements.NOT_PROTECTED):
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


def test_colluders_are_told_rounded_up(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """What was achieved, and what is left with colluders."""
    card = model_card(outcome, contract, documents)
    assert "- by the noise of 90 to 106 merchants in a sum, epsilon 0.9766\n" in card
    assert "- if 1 of them colludes with whoever looks: 0.9812\n" in card
    assert "- if 89 of them collude with whoever looks: unbounded\n" in card


def test_plain_sums_are_printed_in_bold(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """With their own epsilon towards the server."""
    card = model_card(outcome, contract, documents)
    assert f"- **{statements.NOT_MASKED['distributed']}**" in card


def test_masked_sums_are_printed_calmly(
    outcome: Outcome, contract: Contract, documents: dict[str, dict[str, Any]]
) -> None:
    """One epsilon for everybody; a seed is still a warning."""
    said = statements.sums_statement("distributed", secure=True, merchants=90)
    documents["privacy.json"] |= {
        "secure_aggregation": True,
        "notes": [said, statements.NOT_FOR_RELEASE],
    }
    card = model_card(outcome, contract, documents)
    assert f"- {said}\n" in card
    assert f"- **{statements.NOT_FOR_RELEASE}**" in card
    assert "the same epsilon towards the server" in card
    assert "2.501" not in card
