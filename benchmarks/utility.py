"""What privacy costs in quality: the table of README, over several splits, as JSON.

    python -m benchmarks.utility --json FILE [--seeds 5] [--against EARLIER.json]

Every method of `hansa compare` on three settings: real stores, real customers dealt to merchants,
synthetic merchants. Noise is fresh, so two runs differ by it; each mean comes with its standard
deviation over the splits. Sums are plain, which changes no distribution.

- `settings`: for each, accuracy, macro-F1 and AUC by method and epsilon: mean and deviation.
- `worst_change`: with `--against`, the least of (accuracy now - accuracy then) over the private
  federated methods, in standard errors of the difference. Below -3 something became worse.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from simulations.compare import Question, compare
from simulations.datasets import load
from simulations.federation import public_delta, tables_of, training_customers

SETTINGS: dict[str, dict[str, Any]] = {
    "stores": {"name": "complete-journey", "partition": "store", "label": "value4"},
    "cdnow": {"name": "cdnow", "merchants": 20},
    "synthetic": {"name": "synthetic", "merchants": 20},
}
FEDERATED = ("distributed", "local")
_FIGURES = ("accuracy", "macro_f1", "auc")


def measure(setting: dict[str, Any], epsilon: float, seeds: int) -> list[dict[str, Any]]:
    """Return one row a method."""
    how = dict(setting)
    dataset = load(how.pop("name"), plain=True, warm=True, **how)
    delta = public_delta(training_customers(list(tables_of(dataset, dataset.contract).values())))
    contract = dataset.contract.revised(privacy={"delta": delta, "epsilon": epsilon})
    found = compare(Question(dataset, contract, (epsilon,), seeds), lambda _: None)
    return [
        {
            "method": row.method,
            "epsilon": row.epsilon,
            **{
                name: {"mean": getattr(row, name).mean, "deviation": getattr(row, name).sd}
                for name in _FIGURES
            },
        }
        for row in found.rows
    ]


def change(now: dict[str, Any], then: dict[str, Any]) -> float:
    """Return the worst change of a private federated method, in standard errors."""
    worst = math.inf
    for name, rows in now["settings"].items():
        before = {(row["method"], row["epsilon"]): row for row in then["settings"].get(name, [])}
        for row in rows:
            old = before.get((row["method"], row["epsilon"]))
            if old is None or not any(mode in row["method"] for mode in FEDERATED):
                continue
            one, other = row["accuracy"], old["accuracy"]
            error = math.hypot(one["deviation"], other["deviation"]) / math.sqrt(now["seeds"])
            worst = min(worst, (one["mean"] - other["mean"]) / error)
    return worst


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--only", choices=sorted(SETTINGS), action="append")
    chosen = parser.parse_args()
    found: dict[str, Any] = {
        "seeds": chosen.seeds,
        "settings": {
            name: measure(setting, chosen.epsilon, chosen.seeds)
            for name, setting in SETTINGS.items()
            if not chosen.only or name in chosen.only
        },
    }
    if chosen.against:
        found["worst_change"] = change(found, json.loads(chosen.against.read_text("utf-8")))
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
