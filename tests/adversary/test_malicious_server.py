"""A coordinator that chooses everything it may choose so as to learn of one customer.

Each test would fail without the defence that it names.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.app import worker_of_node
from clients.worker import Customers, Worker, seeded_noise
from common.accounting import epsilon
from common.budget import Budget
from common.contract import Contract, parse_contract, read_contract
from common.errors import BudgetRefusal, PolicyError
from common.fixed_point import STEPS_PER_UNIT, lattice_sensitivity
from common.identity import Identity
from common.network import Network, initial_parameters, network_of
from common.plan import UPDATE, lattice_of, plan_of, planned_epsilon_towards_server
from common.wire import Attest, SumAnswer, SumRequest
from simulations.datasets import load, write_federation
from tests.witnessed import charges_of, entries_of, latest, ledger_at, reserved

CUSTOMERS = 44


def contract_of(**sections: dict[str, Any]) -> Contract:
    """Return a contract of ten merchants with plain sums, five features and four segments."""
    document: dict[str, Any] = {
        "federation": {"name": "test", "min_merchants": 10},
        "features": [{"name": f"f{i}", "low": -1.0} for i in range(5)],
        "segments": {"names": ["a", "b", "c", "d"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "aggregation": {"secure": False},
    }
    return parse_contract({**document, **sections}, source="test")


def worker_of(contract: Contract, folder: Path, customers: Customers, **budget: float) -> Worker:
    """Return a worker with known noise, so that two answers can be told apart without it."""
    caps = Budget(**{"epsilon": 1.0, "delta": 1e-5, **budget})
    ledger = ledger_at(folder / "ledger.sqlite", Identity.generate("m"), caps)
    return Worker(
        "m", contract, customers, ledger, accept_unmasked_sums=True, noise_for=seeded_noise(1, "m")
    )


def request_of(
    contract: Contract,
    parameters: np.ndarray,
    *,
    run: str = "run",
    attempt: int = 0,
    average: float = 1.0,
) -> SumRequest:
    """Return a request for the first update; it brings no countersignature."""
    return SumRequest(
        run, contract.sha256, UPDATE, 1, attempt, average, 0, 0, b"", b"", b"", parameters
    )


def answered(worker: Worker, request: SumRequest) -> SumAnswer:
    """Let a merchant reserve the run; ask it with the witness's countersignature."""
    return worker.answer(replace(request, countersigned=reserved(worker, request.run)))


def some_customers(count: int, seed: int = 0) -> Customers:
    """Return customers of whom none is held out."""
    random = np.random.default_rng(seed)
    inputs = random.uniform(-1, 1, (count, 5))
    return Customers(inputs, random.integers(0, 4, count), np.zeros(count, dtype=bool))


def amplifier(network: Network, seed: int) -> np.ndarray:
    """Return parameters under which the true gradient cancels and rounding is blown up.

    The hidden layers multiply by 990,000 around one fixed point; equal weights in the last layer
    make the propagated gradient zero up to the rounding of a matrix product.
    """
    random = np.random.default_rng(seed)
    theta = np.zeros(network.size)
    layers = network.layers(theta)
    point = 1.0 if network.activation == "relu" else float(np.tanh(0.5))
    layers[0][:, -1] = 1.0 if network.activation == "relu" else 0.5
    for layer in layers[1:-1]:
        np.fill_diagonal(layer[:, :-1], 990_000.0)
        layer[:, -1] = -990_000.0 * point + (1.0 if network.activation == "relu" else 0.5)
    layers[-1][:, :-1] = random.uniform(5e5, 9.9e5, network.dims[-2])
    layers[-1][:, -1] = random.uniform(-1, 1, network.dims[-1])
    return theta


@pytest.mark.slow
@pytest.mark.parametrize("ring_bits", [32, 64])
@pytest.mark.parametrize("engine", ["fused", "opacus"])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_amplified_rounding_stays_within_the_charge(
    tmp_path: Path, activation: str, engine: str, ring_bits: int
) -> None:
    """Without row-by-row products one customer moved this sum by up to 3.3 sensitivities."""
    model = {"hidden": [32, 32, 32], "activation": activation}
    aggregation = {"secure": False, "ring_bits": ring_bits}
    contract = contract_of(model=model, training={"engine": engine}, aggregation=aggregation)
    network, customers = network_of(contract), some_customers(CUSTOMERS)
    release = plan_of(contract).update
    lattice = lattice_of(release, contract)
    allowed = lattice_sensitivity(1.0, network.size, release.steps) * release.steps
    assert (release.steps == STEPS_PER_UNIT) == (ring_bits == 64)
    for seed in range(2):
        request = request_of(contract, amplifier(network, seed), run=f"run{seed}")
        whole = answered(worker_of(contract, tmp_path / f"{seed}", customers), request)
        assert not whole.refusal
        for missing in range(0, CUSTOMERS, 11):
            kept = np.delete(np.arange(CUSTOMERS), missing)
            neighbour = Customers(
                customers.inputs[kept], customers.labels[kept], customers.held_out[kept]
            )
            other = worker_of(contract, tmp_path / f"{seed}-{missing}", neighbour)
            answer = answered(other, request)
            assert not answer.refusal
            moved = lattice.from_ring(whole.vector - answer.vector)
            assert np.linalg.norm(moved.astype(np.float64)) <= allowed


@pytest.mark.parametrize("count", [0, 1, 40])
def test_diverging_local_steps_answer_all_the_same(tmp_path: Path, count: int) -> None:
    """Whether an answer comes must not tell whether there are customers."""
    training = {"mode": "local", "local_steps": 30, "local_learning_rate": 1e9}
    contract = contract_of(training=training)
    worker = worker_of(contract, tmp_path, some_customers(count))
    start = initial_parameters(contract)
    answer = answered(worker, request_of(contract, start, average=0.0))
    assert not answer.refusal
    assert answer.vector.shape == start.shape


class TestCapTowardsServer:
    """A merchant that bounds what the coordinator learns from its single messages."""

    def test_attest(self, tmp_path: Path) -> None:
        """It takes no part in a run that would show the server too much."""
        contract = contract_of()
        cost = planned_epsilon_towards_server(contract)
        assert cost > 2.0
        worker = worker_of(contract, tmp_path, some_customers(40), towards_server=2.0)
        refusal = worker.attest(Attest("run", contract.sha256)).refusal
        assert re.search("towards the server to epsilon .*, its cap is 2 at", refusal)

    def test_reservation(self, tmp_path: Path) -> None:
        """A server that does not ask first reserves nothing, and gets no single message."""
        contract = contract_of()
        worker = worker_of(contract, tmp_path, some_customers(40), towards_server=2.0)
        with pytest.raises(BudgetRefusal, match="towards the server"):
            reserved(worker)
        answer = worker.answer(request_of(contract, initial_parameters(contract)))
        assert "needs a reservation" in answer.refusal
        assert charges_of(worker.ledger) == {}

    def test_charge(self, tmp_path: Path) -> None:
        """Single messages never cost more towards the server than the run reserved."""
        contract = contract_of()
        cost = planned_epsilon_towards_server(contract)
        worker = worker_of(contract, tmp_path, some_customers(40), towards_server=cost * 1.001)
        start = initial_parameters(contract)
        reserved(worker)
        request = replace(request_of(contract, start), countersigned=latest(worker.ledger))
        answers = [worker.answer(replace(request, attempt=attempt)) for attempt in range(120)]
        refused = [answer for answer in answers if answer.refusal]
        assert 0 < len(refused) < 120
        assert "would pass what this run reserved" in refused[0].refusal
        charges = charges_of(worker.ledger).values()
        assert epsilon([charge.towards_server for charge in charges], 1e-5) <= cost * (1 + 1e-9)


def test_asking_for_ever_does_not_fill_the_ledger(tmp_path: Path) -> None:
    """The same refused reservation or release is written down once."""
    contract = contract_of()
    worker = worker_of(contract, tmp_path, some_customers(4), epsilon=0.01)
    request = request_of(contract, initial_parameters(contract))
    for _ in range(5):
        with pytest.raises(BudgetRefusal, match=r"its cap is 0\.01"):
            reserved(worker)
        assert "needs a reservation" in worker.answer(request).refusal
    refusals = [(entry["stage"], entry["round"]) for entry in entries_of(worker.ledger, "refuse")]
    assert refusals == [("reserve", 0), (UPDATE, 1)]
    assert len(worker.ledger.entries()) == 3  # with the first, which opens it


def test_a_seed_is_for_simulations(tmp_path: Path) -> None:
    """A merchant whose own file makes its noise guessable takes no part in a real run."""
    folder = tmp_path / "fed"
    write_federation(load("synthetic", preset="smoke", merchants=2), folder, seed=7)
    (merchant,) = sorted(folder.glob("merchants/*/merchant.toml"))[:1]
    node = {"merchant": str(merchant), "partition-id": 0}
    with pytest.raises(PolicyError, match="noise guessable"):
        worker_of_node(Context(1, 2, node, RecordDict(), {}))
    simulated = Context(1, 2, {"partition-id": 0}, RecordDict(), {"federation": str(folder)})
    contract = read_contract(folder / "contract.toml")
    assert worker_of_node(simulated).contract == contract
