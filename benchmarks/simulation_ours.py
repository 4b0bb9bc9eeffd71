"""Our side of `benchmarks.simulation`: a runner a process, like those in `benchmarks/peers`.

    python -m benchmarks.simulation_ours {engine,engine-masked,core,core-alike} FOLDER

- `engine`: the in-process engine with everything that a run has: Flower's messages, ledgers, the
  witness, plain sums. A run has no sampling of merchants, so its federation is the workload's
  first cohort, and these merchants take part in every round.
- `engine-masked`: the same with secure sums.
- `core`: `clients.local_steps.local_updates` alone, on the cohorts that the workload chooses;
  each round reads its merchants' rows.
- `core-alike`: the same on what `engine` trains on: the same merchants, with tables that are made
  once, so that the difference is what the engine costs.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.peers.workload import Meter, Workload
from clients.kernel import Kernel, Table
from clients.local_steps import Task, local_updates
from clients.worker import Customers
from common.contract import Contract, parse_contract
from common.network import Network, initial_parameters, network_of
from common.noise import NoiseSource
from common.plan import plan_of
from simulations.members import made_federation
from simulations.rounds import run_rounds

_HELD_OUT = 0.04  # customers a merchant keeps for evaluation, beside those it trains on


def contract_of(work: Workload, epsilon: float, *, secure: bool = False) -> Contract:
    """Return the contract of the workload; noise is what `epsilon` asks for."""
    rounds, merchants = work.cohorts.shape
    segments = len(work.layers[-1][1])
    return parse_contract(
        {
            "federation": {"name": "benchmark", "min_merchants": int(merchants)},
            "features": [
                {"name": f"x{n}", "low": -1.0, "high": 1.0} for n in range(work.x.shape[2])
            ],
            "segments": {"names": [f"s{n}" for n in range(segments)], "column": "segment"},
            "model": {"hidden": [len(bias) for _, bias in work.layers[:-1]]},
            "training": {
                "mode": "local",
                "rounds": int(rounds),
                "spare_rounds": 0,
                "local_steps": work.steps,
                "sampling_rate": work.batch / work.rows,
                "local_learning_rate": work.learning_rate,
                "optimizer": "sgd",
                "learning_rate": 1.0,
                "averaging": 0.0,
                "held_out": _HELD_OUT,
            },
            "privacy": {"epsilon": epsilon, "delta": 1e-5, "clip_norm": work.clip_norm},
            "aggregation": {"secure": secure},
            "publication": {"evaluate_every": int(rounds), "profiles": False},
        },
        source="benchmark",
    )


def customers_of(work: Workload) -> dict[str, Customers]:
    """Return the first cohort's customers: exactly the workload's rows are trained on."""
    tested = round(work.rows * _HELD_OUT)
    test_x = np.load(work.folder / "test_x.npy")[:tested]
    test_y = np.load(work.folder / "test_y.npy")[:tested]
    held_out = np.arange(work.rows + tested) >= work.rows
    return {
        f"m{merchant:04d}": Customers(
            np.concatenate([work.x[merchant], test_x]).astype(float),
            np.concatenate([work.y[merchant], test_y]),
            held_out,
        )
        for merchant in work.cohorts[0]
    }


def layers_of(network: Network, theta: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return weights and bias of each layer."""
    return [(layer[:, :-1], layer[:, -1]) for layer in network.layers(theta)]


def engine(work: Workload, contract: Contract, meter: Meter) -> np.ndarray:
    """Carry out a run; return the model."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        federation = made_federation("benchmark", customers_of(work), contract, place, None)
        return run_rounds(federation, place, lambda _: meter.mark()).parameters


def core(work: Workload, contract: Contract, meter: Meter, *, alike: bool) -> np.ndarray:
    """Take the same steps without anything around them; return the model."""
    network, release = network_of(contract), plan_of(contract).update
    theta = initial_parameters(contract)
    kernel = Kernel(network, "float32")

    def tables_of(cohort: Sequence[int]) -> list[Table]:
        return [kernel.table(work.x[k], work.y[k]) for k in cohort]

    tables = tables_of(work.cohorts[0])
    for cohort in work.cohorts:
        if not alike:
            tables = tables_of(cohort)
        tasks = [Task(table, theta, work.batch, NoiseSource.fresh()) for table in tables]
        theta = theta + local_updates(kernel, tasks, contract.training, release).mean(axis=0)
        meter.mark()
    return theta


def main() -> None:
    """Run what is asked for; print one JSON line."""
    meter, (what, folder) = Meter(), sys.argv[1:]
    work = Workload(folder)
    epsilon = float((work.folder / "epsilon").read_text())
    contract = contract_of(work, epsilon, secure=what == "engine-masked")
    if what.startswith("engine"):
        theta = engine(work, contract, meter)
    else:
        theta = core(work, contract, meter, alike=what == "core-alike")
    meter.report(work.accuracy(layers_of(network_of(contract), theta)))


if __name__ == "__main__":
    main()
