"""What the verdict of `hansa merchant plan` rests on: how much of a model noise leaves over.

    python -m benchmarks.verdict --json FILE [--seeds 2] [--quick]

Federations of generated customers (`value4`) of many sizes, budgets and lengths are trained in one
place with the noise that a sum over everybody would hold, and once without noise. Each has the
"signal over noise" that `hansa merchant plan` tells before a run; the table groups trainings by
it. Models start from nothing, or from parameters out of a textbook (`hansa pretrain`).

- `gained`: accuracy, on customers that nobody trained on, above where training begins: the most
  common segment, or the start unchanged. `gained_without_noise`: the same without noise. Means,
  and their `ratio` where the latter is above zero.
- `better_than_last_period`: share of the models that are better than the segment of last period.
- `better_than_begun`, `as_good_as_begun`: share of the models that are better than where training
  began, or at least as good.
"""

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.defaults import model_of, trained
from clients.features import encode
from clients.forecast import DROWNED, WEAK, Crowd
from common.contract import Contract
from common.network import network_of
from common.plan import plan_of
from simulations.datasets import load
from simulations.federation import public_delta, tables_of
from simulations.pretraining import pretrained
from simulations.synthetic import Recipe, stream

MERCHANTS, CUSTOMERS = (5, 20, 100), (50, 200, 1000)
EPSILONS, ROUNDS = (0.25, 1.0, 4.0), (20, 60)
# hidden width (None: linear), whether it starts from parameters, learning rate
MODELS = ((None, False, 0.1), (32, False, 0.1), (128, False, 0.1), (128, True, 0.01))

Job = tuple[int, int, float, int, tuple[int | None, bool, float], int]


@lru_cache(maxsize=2)
def _data(merchants: int, customers: int, seed: int) -> tuple[Contract, tuple[np.ndarray, ...]]:
    """Return a contract; inputs, labels, last period's segments, who is held out, of everybody."""
    dataset = load("synthetic", preset="smoke", merchants=merchants, seed=seed)
    contract = dataset.contract.revised(aggregation={"max_customers": 10 * merchants * customers})
    frames = dict(stream(Recipe(merchants, customers), contract, seed))
    tables = list(tables_of(replace(dataset, merchants=frames), contract).values())
    parts = [(encode(t, contract), t.labels, t.previous, t.held_out) for t in tables]
    return contract, tuple(np.concatenate(part) for part in zip(*parts, strict=True))


@lru_cache(maxsize=8)
def _start(hidden: int | None) -> np.ndarray:
    contract, _ = _data(MERCHANTS[0], CUSTOMERS[0], 0)
    return pretrained(contract.revised(model=model_of(hidden))).parameters


def measure(job: Job) -> dict[str, Any]:
    """Train one federation's model with and without noise."""
    merchants, customers, epsilon, rounds, (hidden, warm, rate), seed = job
    contract, (x, y, previous, test) = _data(merchants, customers, seed)
    contract = contract.revised(
        model=model_of(hidden),
        training={"rounds": rounds, "learning_rate": rate},
        privacy={"epsilon": epsilon, "delta": public_delta(int((~test).sum()))},
    )
    crowd, network = Crowd(contract, merchants, customers), network_of(contract)
    first = _start(hidden) if warm else None

    def accuracy(labels: np.ndarray) -> float:
        return float((labels == y[test]).mean())

    def after(stddev: float) -> float:
        rows, noise = (x[~test], y[~test]), np.random.default_rng(seed)
        theta = trained(contract, rows, contract.privacy.clip_norm, stddev, noise, first)
        return accuracy(network.predictions(theta, x[test]))

    majority = np.bincount(y[~test]).argmax()
    begun = np.full(int(test.sum()), majority)
    if first is not None:
        begun = network.predictions(first, x[test])
    last_period = np.where(previous >= 0, previous, majority)[test]
    return {
        "merchants": merchants,
        "customers": customers,
        "epsilon": epsilon,
        "rounds": rounds,
        "model": f"{hidden or 'linear'}{' from a start' if warm else ''}",
        "learning_rate": rate,
        "seed": seed,
        "run_ratio": crowd.run_ratio,
        "private": after(crowd.stddev(plan_of(contract).update)),
        "without_noise": after(0.0),
        "begun": accuracy(begun),
        "last_period": accuracy(last_period),
    }


def table(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group trainings by signal over noise."""
    rows = []
    for low, high in pairwise([0.0, DROWNED, WEAK, math.inf]):
        mine = [one for one in found if low <= one["run_ratio"] < high]
        if mine:
            gained, without = (
                float(np.mean([one[name] - one["begun"] for one in mine]))
                for name in ("private", "without_noise")
            )
            rows.append(
                {
                    "from": low,
                    "to": high if high < math.inf else None,
                    "trainings": len(mine),
                    "gained": gained,
                    "gained_without_noise": without,
                    "ratio": gained / without if without > 0 else None,
                    "better_than_last_period": _share(mine, "last_period"),
                    "better_than_begun": _share(mine, "begun"),
                    "as_good_as_begun": _share(mine, "begun", equal=True),
                }
            )
    return rows


def _share(found: list[dict[str, Any]], other: str, *, equal: bool = False) -> float:
    above = [one["private"] - one[other] for one in found]
    return float(np.mean([x > 0 or (equal and x == 0) for x in above]))


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small federations only")
    chosen = parser.parse_args()
    sizes = (MERCHANTS[:1], CUSTOMERS[:1]) if chosen.quick else (MERCHANTS, CUSTOMERS)
    grid = product(*sizes, range(chosen.seeds), EPSILONS, ROUNDS, MODELS)
    jobs = [(m, c, epsilon, rounds, model, s) for m, c, s, epsilon, rounds, model in grid]
    each = len(EPSILONS) * len(ROUNDS) * len(MODELS)  # trainings on the same customers
    with ProcessPoolExecutor(2) as pool:
        found = list(pool.map(measure, jobs, chunksize=each))
    kinds = {
        "from_nothing": [one for one in found if not one["model"].endswith("start")],
        "from_a_start": [one for one in found if one["model"].endswith("start")],
    }
    document = {
        **{name: table(mine) for name, mine in kinds.items()},
        "by_model": {
            name: table([one for one in found if one["model"] == name])
            for name in dict.fromkeys(one["model"] for one in found)
        },
        "trainings": found,
    }
    print(json.dumps({name: document[name] for name in [*kinds, "by_model"]}, indent=1))
    if chosen.json:
        chosen.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
