"""Does momentum or Adam in a merchant's own steps (mode `local`) make better models?

    python -m benchmarks.own_optimizers --json FILE [--merchants 20]

Generated merchants, real noise, as many own steps a round as below. For each own optimizer, both
epsilons and each number of own steps, the rates of merchants and coordinator are chosen on some
federations; others, as many as `--seeds`, are then trained with the choice. `rows` has the mean
accuracy on held-out customers, and the difference to plain SGD on the same federations with its
standard error. No real customer is looked at.
"""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.defaults import _data
from clients.kernel import kernel_of
from clients.local_steps import Task, local_updates
from common.contract import Contract, Training
from common.network import initial_parameters, network_of
from common.noise import NoiseSource
from common.plan import Release, plan_of
from server.optimizers import Optimizer
from simulations.federation import public_delta

EPSILONS = (1.0, 4.0)
SHAPES = ((30, 5, 0.2), (20, 10, 0.1), (60, 1, 1.0))  # rounds, own steps a round, sampling rate
OPTIMIZERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "sgd": ({}, (0.3, 0.5, 1.0, 1.5, 3.0)),
    "momentum": ({"local_momentum": 0.9}, (0.1, 0.2, 0.3, 0.5, 0.8)),
    "adam": ({"local_optimizer": "adam"}, (0.001, 0.003, 0.01, 0.03)),
}
COORDINATORS = (("adam", 0.03), ("sgd", 1.0))
_CHOOSING = 2  # federations that rates are chosen on

Job = tuple[dict[str, Any], float, int, int]


@lru_cache(maxsize=32)
def _release(rounds: int, steps: int, rate: float, epsilon: float, merchants: int) -> Release:
    contract, stacks = _data("default", merchants, 0, 0)
    customers = sum(int((~held_out).sum()) for _, _, held_out in stacks)
    training = {"mode": "local", "rounds": rounds, "local_steps": steps, "sampling_rate": rate}
    privacy = {"epsilon": epsilon, "delta": public_delta(customers)}
    return plan_of(contract.revised(training=training, privacy=privacy)).update


def accuracy(job: Job) -> float:
    """Train one federation; return the accuracy on its held-out customers."""
    candidate, epsilon, merchants, seed = job
    torch.set_num_threads(1)
    contract, stacks = _data("default", merchants, 0, seed)
    training = contract.revised(training={"mode": "local", **candidate}).training
    shape = (training.rounds, training.local_steps, training.sampling_rate)
    release = _release(*shape, epsilon, merchants)
    theta = _trained(contract, training, release, stacks, seed)
    x = np.concatenate([x[test] for x, _, test in stacks])
    y = np.concatenate([y[test] for _, y, test in stacks])
    return float((network_of(contract).probabilities(theta, x).argmax(axis=1) == y).mean())


def _trained(
    contract: Contract, training: Training, release: Release, stacks: list[Any], seed: int
) -> Any:
    kernel = kernel_of(network_of(contract), "float32")
    tables = [kernel.table(x[~test], y[~test]) for x, y, test in stacks]
    average = sum(map(len, tables)) / len(tables)  # stands in for the noisy one
    batch = average * training.sampling_rate
    optimizer = Optimizer(training, initial_parameters(contract))
    for number in range(training.rounds):
        tasks = [
            Task(table, optimizer.theta, batch, NoiseSource.seeded(seed, str(number), str(k)))
            for k, table in enumerate(tables)
        ]
        optimizer.step(-local_updates(kernel, tasks, training, release).mean(axis=0))
    return optimizer.published


def candidates(name: str, shape: tuple[int, int, float]) -> list[dict[str, Any]]:
    """Return every choice of rates for an own optimizer."""
    rounds, steps, sampling = shape
    own, rates = OPTIMIZERS[name]
    return [
        {
            **own,
            "rounds": rounds,
            "local_steps": steps,
            "sampling_rate": sampling,
            "local_learning_rate": rate,
            "optimizer": optimizer,
            "learning_rate": learning_rate,
        }
        for rate, (optimizer, learning_rate) in product(rates, COORDINATORS)
    ]


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merchants", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=1)
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(chosen.processes) as pool:

        def scores(candidate: dict[str, Any], epsilon: float, seeds: range) -> np.ndarray:
            jobs = [(candidate, epsilon, chosen.merchants, seed) for seed in seeds]
            return np.array(list(pool.map(accuracy, jobs)))

        for shape, epsilon in product(SHAPES, EPSILONS):
            plain: np.ndarray | None = None
            for name in OPTIMIZERS:
                best = max(
                    candidates(name, shape),
                    key=lambda one: float(scores(one, epsilon, range(_CHOOSING)).mean()),
                )
                found = scores(best, epsilon, range(_CHOOSING, _CHOOSING + chosen.seeds))
                plain = found if plain is None else plain
                gain = found - plain
                rows.append(
                    {
                        "own_optimizer": name,
                        "epsilon": epsilon,
                        "settings": best,
                        "accuracy": round(float(found.mean()), 4),
                        "gain": round(float(gain.mean()), 4),
                        "standard_error": round(float(gain.std(ddof=1) / len(gain) ** 0.5), 4),
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
    if chosen.json:
        text = json.dumps({"rows": rows}, indent=1)
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
