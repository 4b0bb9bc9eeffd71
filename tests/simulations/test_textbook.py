"""Tests of customers out of a textbook, and of the parameters that are trained on them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from common.contract import Contract, parse_contract
from common.errors import ContractError
from common.network import network_of
from common.start import LEARNING_RATE, starting_from, starting_parameters, to_bytes
from simulations import pretraining, textbook
from simulations.datasets import ready_contract, ready_contracts
from simulations.pretraining import Pretrained, pretrained
from simulations.textbook import Textbook, customers


@pytest.fixture(scope="module")
def contract() -> Contract:
    """Give a ready contract with one feature that purchases do not tell."""
    return ready_contract("synthetic-value4")


@pytest.fixture(scope="module")
def found(contract: Contract) -> Textbook:
    """Give its generated customers."""
    return customers(contract, 0)


@pytest.fixture(scope="module")
def linear(contract: Contract) -> Contract:
    """Give a contract with a small model."""
    return contract.revised(model={"family": "linear"})


class TestCustomers:
    """textbook.customers."""

    def test_shapes_and_bounds(self, contract: Contract, found: Textbook) -> None:
        """As a model sees real ones: every input in [-1, 1], every segment there."""
        assert found.x.shape == (len(found.y), contract.inputs)
        assert np.abs(found.x).max() <= 1.0
        assert set(np.unique(found.y)) == {0, 1, 2, 3}
        assert len(np.unique(found.shop)) > 0.9 * textbook.SHOPS

    def test_what_the_generator_does_not_know(self, found: Textbook) -> None:
        """Tells nothing: neither a value nor that it is missing."""
        assert found.unknown == ("household_size",)
        assert found.unknown_inputs == (11, 12)
        assert not found.x[:, 11:].any()
        assert found.x[:, :11].std(axis=0).min() > 0.01

    def test_a_seed_repeats(self, contract: Contract, found: Textbook) -> None:
        """Same seed, same customers; another one, others."""
        again, other = customers(contract, 0), customers(contract, 1)
        assert np.array_equal(again.x, found.x)
        assert np.array_equal(again.y, found.y)
        assert other.x.shape != found.x.shape or not np.array_equal(other.x, found.x)

    def test_segments_are_the_contracts(self, contract: Contract, found: Textbook) -> None:
        """Other cuts, other segments of the same customers."""
        cuts = {"cuts": [0.01, 5.0, 1000.0]}
        other = customers(contract.revised(segments=cuts), 0)
        assert np.array_equal(other.x, found.x)
        assert np.array_equal(other.y == 0, found.y == 0)
        assert (other.y == 3).sum() < (found.y == 3).sum()

    def test_money_has_the_contracts_scale(self, contract: Contract, found: Textbook) -> None:
        """A contract in another currency: all amounts, bounds and cuts a hundredfold."""
        document = contract.model_dump(mode="json")
        for feature in document["features"]:
            if feature["unit"] == "USD":
                feature["high"] *= 100.0
        document["segments"]["cuts"] = [1.0, 5_000.0, 30_000.0]
        other = customers(parse_contract(document, source="test"), 0)
        share = [np.bincount(y.y, minlength=4) / len(y.y) for y in (found, other)]
        np.testing.assert_allclose(share[0], share[1], atol=0.005)

    def test_it_knows_no_data_set(self) -> None:
        """Nothing that follows figures of real customers, or of the generated data set, is read."""
        for module in (textbook, pretraining):
            text = Path(module.__file__).read_text(encoding="utf-8")
            code = text.split('"""', 2)[2]
            for word in ("calibration", "simulations.synthetic", "datasets", "cdnow", "journey"):
                assert word not in code, f"{module.__name__}: {word}"

    def test_no_windows(self) -> None:
        """Nothing says which purchases are features."""
        document = ready_contract("synthetic-value4").model_dump(mode="json")
        document["windows"] = None
        bare = parse_contract(document, source="test")
        with pytest.raises(ContractError, match=r"\[windows\]"):
            customers(bare, 0)

    def test_segments_of_another_meaning(self, contract: Contract) -> None:
        """A column of a table may mean anything."""
        with pytest.raises(ContractError, match=r"segments\.cuts: customers can be generated"):
            customers(contract.revised(segments={"cuts": []}), 0)

    def test_features_of_another_meaning(self, contract: Contract) -> None:
        """Not one that purchases tell."""
        document = contract.model_dump(mode="json")
        document["features"] = [
            {"name": "age", "high": 100.0},
            {"name": "food", "measure": "category_share:FOOD"},
        ]
        with pytest.raises(ContractError, match="none has a `measure`"):
            customers(parse_contract(document, source="test"), 0)

    @pytest.mark.parametrize("name", ready_contracts())
    def test_every_ready_contract(self, name: str) -> None:
        """Can be generated for, with every segment."""
        own = ready_contract(name)
        assert len(np.unique(customers(own, 3).y)) == len(own.segments.names)


@pytest.fixture(scope="module")
def result(linear: Contract) -> Pretrained:
    """Train a linear model once."""
    return pretrained(linear)


class TestPretrained:
    """pretraining.pretrained."""

    def test_better_than_nothing(self, result: Pretrained) -> None:
        """On customers of shops that it was not trained on."""
        assert result.accuracy > result.majority + 0.05
        assert result.unknown == ("household_size",)

    @pytest.mark.slow
    def test_unknown_inputs_start_with_weight_zero(self, contract: Contract) -> None:
        """The federation learns what they are good for."""
        result = pretrained(contract.revised(model={"hidden": [4]}))
        network = network_of(contract.revised(model={"hidden": [4]}))
        first = network.layers(result.parameters)[0]
        assert not first[:, [11, 12]].any()
        assert first[:, :11].any(axis=0).all()

    def test_it_can_be_started_from(self, linear: Contract, result: Pretrained) -> None:
        """Its file is one that contracts accept, and the learning rate suits it."""
        content = to_bytes(result.parameters)
        contract = starting_from(linear, content)
        assert contract.model.start == hashlib.sha256(content).hexdigest()
        assert contract.training.learning_rate == LEARNING_RATE
        assert starting_parameters(contract, content).size == network_of(contract).size

    def test_a_stated_learning_rate_stays(self, linear: Contract) -> None:
        """Whoever states one means it."""
        stated = linear.revised(training={"learning_rate": 0.5})
        content = bytes(8 * network_of(linear).size)
        assert starting_from(stated, content).training.learning_rate == 0.5

    def test_parameters_of_another_model(self, contract: Contract) -> None:
        """Are refused when the contract is written."""
        with pytest.raises(ContractError, match="another model's"):
            starting_from(contract, bytes(16))
