"""Choose start, width, learning rate, rounds, clip norm, averaging on synthetic customers only.

The defaults of `common.contract.Training` and the shipped contracts come from here; no real
customer was looked at. Every candidate is trained in one place with exactly the noise that the
federation's sum would hold, which is the same distribution (one full-batch sum a round).

A warm start was trained on customers out of a textbook (`simulations.textbook`), which know nothing
of how synthetic customers are generated.

    python benchmarks/defaults.py > defaults.json
"""

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np

from clients.features import encode
from clients.training import clipped_gradient_sum
from common.contract import Contract, parse_contract
from common.network import initial_parameters, network_of
from common.plan import plan_of
from server.optimizers import Optimizer
from simulations.datasets import load
from simulations.federation import public_delta, tables_of
from simulations.pretraining import pretrained
from simulations.scores import scores_of

GRID: dict[str, dict[str, list[Any]]] = {
    "distributed": {
        "hidden": [None, 32, 128],
        "rounds": [30, 60, 100],
        "clip_norm": [0.5, 1.0, 2.0],
        "learning_rate": [0.01, 0.03, 0.1, 0.2, 0.3],
        "averaging": [0.0, 0.9],
        "warm": [False, True],
    },
    "local": {
        "hidden": [None, 32, 128],
        "rounds": [30, 60, 100],
        "clip_norm": [0.5, 1.0, 2.0],
        "learning_rate": [0.01, 0.03, 0.1, 0.2],
        "averaging": [0.0, 0.9],
        "warm": [False, True],
    },
    "alone": {
        "hidden": [None, 32, 128],
        "rounds": [10, 25, 50, 100, 200],
        "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
        "warm": [False, True],
    },
    "pooled": {
        "hidden": [None, 32, 128],
        "rounds": [25, 50, 100, 200, 400],
        "learning_rate": [0.001, 0.003, 0.01, 0.03, 0.1],
        "warm": [False, True],
    },
}


def model_of(hidden: int | None) -> dict[str, Any]:
    """Return one hidden layer of a width, or a linear model."""
    return {"family": "linear"} if hidden is None else {"family": "mlp", "hidden": [hidden]}


@lru_cache(maxsize=8)
def _data(preset: str, merchants: int, extra: int, seed: int) -> tuple[Contract, list[Any]]:
    """Return generated merchants; `extra` inputs tell nothing, as many of a wide table do."""
    dataset = load("synthetic", preset=preset, merchants=merchants, seed=seed)
    contract, generator = dataset.contract, np.random.default_rng(seed)
    if extra:
        document = contract.model_dump(mode="json")
        names = [f"share{number}" for number in range(extra)]
        document["features"] += [{"name": name} for name in names]
        contract = parse_contract(document, source="wider synthetic contract")
        for frame in dataset.merchants.values():
            frame[names] = generator.beta(0.5, 2.0, (len(frame), extra))
    dataset = replace(dataset, contract=contract)
    tables = tables_of(dataset, dataset.contract)
    stacks = [(encode(t, dataset.contract), t.labels, t.held_out) for t in tables.values()]
    return dataset.contract, stacks


@lru_cache(maxsize=4)
def _start(preset: str, merchants: int, extra: int, hidden: int | None) -> Any:
    """Return parameters to start from; they depend on the contract's features and model alone."""
    contract, _ = _data(preset, merchants, extra, 0)
    return pretrained(contract.revised(model=model_of(hidden))).parameters


def measure(job: tuple[str, dict[str, Any], str, int, int, int, float]) -> dict[str, Any]:
    """Train one candidate on one generated federation; return its scores."""
    what, candidate, preset, count, extra, seed, epsilon = job
    contract, merchants = _data(preset, count, extra, seed)
    customers = sum(int((~held_out).sum()) for _, _, held_out in merchants)
    training = {"rounds": candidate["rounds"], "learning_rate": candidate["learning_rate"]}
    training["averaging"] = candidate.get("averaging", 0.0)
    contract = contract.revised(
        model=model_of(candidate["hidden"]),
        training=training,
        privacy={
            "clip_norm": candidate.get("clip_norm", 1.0),
            "epsilon": epsilon,
            "delta": public_delta(customers),
        },
    )
    first = None
    if candidate.get("warm"):
        first = _start(preset, count, extra, candidate["hidden"])
    groups = [[stack] for stack in merchants] if what == "alone" else [merchants]
    labels, probabilities = [], []
    for number, group in enumerate(groups):
        x, y, test = (np.concatenate(parts) for parts in zip(*group, strict=True))
        noise = np.random.default_rng(seed * 10_000 + number)
        theta = _train(what, contract, (x[~test], y[~test]), len(merchants), noise, first)
        labels.append(y[test])
        probabilities.append(network_of(contract).probabilities(theta, x[test]))
    known = np.concatenate(labels)
    scores = scores_of(known, np.concatenate(probabilities), np.zeros_like(known), 1)
    return {"accuracy": scores.accuracy, "auc": scores.auc}


def _train(
    what: str, contract: Contract, rows: Any, merchants: int, noise: np.random.Generator, first: Any
) -> Any:
    """Train; `noise` stands in for the real noise while choosing."""
    if what not in {"distributed", "local"}:
        return trained(contract, rows, 1e12, 0.0, noise, first)
    share = merchants / contract.noise_contributors if what == "distributed" else merchants
    clip_norm = contract.privacy.clip_norm
    stddev = plan_of(contract).update.event.noise_multiplier * clip_norm * np.sqrt(share)
    return trained(contract, rows, clip_norm, stddev, noise, first)


def trained(
    contract: Contract,
    rows: tuple[np.ndarray, np.ndarray],
    clip_norm: float,
    stddev: float,
    noise: np.random.Generator,
    first: np.ndarray | None,
) -> np.ndarray:
    """Return the model that all steps of a run lead to, taken in one place.

    Args:
        contract: Says model, optimizer and rounds; one sum over everybody a round.
        rows: Inputs and labels of everybody.
        clip_norm: Of a customer's gradient.
        stddev: Of the noise in a sum.
        noise: Where it comes from.
        first: Parameters to start from; None for the contract's own.
    """
    x, y = rows
    first = initial_parameters(contract) if first is None else first
    optimizer = Optimizer(contract.training, first)
    network = network_of(contract)
    for _ in range(contract.training.rounds):
        total = clipped_gradient_sum(network, optimizer.theta, x, y, clip_norm)
        optimizer.step((total + stddev * noise.standard_normal(total.size)) / max(len(y), 1))
    return optimizer.published


def main() -> None:
    """Print the best candidates of every kind as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--merchants", type=int, default=100)
    parser.add_argument("--extra-inputs", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--what", nargs="*", default=list(GRID))
    arguments = parser.parse_args()
    result: dict[str, Any] = dict(vars(arguments))
    with ProcessPoolExecutor(2) as pool:
        for what in arguments.what:
            names = list(GRID[what])
            candidates = [dict(zip(names, v, strict=True)) for v in product(*GRID[what].values())]
            jobs = [
                (
                    what,
                    c,
                    arguments.preset,
                    arguments.merchants,
                    arguments.extra_inputs,
                    seed,
                    arguments.epsilon,
                )
                for c in candidates
                for seed in range(arguments.seeds)
            ]
            found = list(pool.map(measure, jobs, chunksize=arguments.seeds))
            rows = []
            for number, candidate in enumerate(candidates):
                mine = found[number * arguments.seeds : (number + 1) * arguments.seeds]
                means = {k: round(float(np.mean([m[k] for m in mine])), 4) for k in mine[0]}
                rows.append({**candidate, **means})
            rows.sort(key=lambda row: -(row["accuracy"] + row["auc"]))
            result[what] = rows[:12]
    json.dump(result, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
