"""Assignment of customers: the model against onnxruntime and numpy, then the whole command.

    python -m benchmarks.assign --json FILE [--rows 10000000] [--rounds 5]

What is measured:

- `models`: encoded customers in memory -> segments and probabilities, on one thread, in turns:
  `onnxruntime` (the bundle's `model.onnx`, probabilities only), `numpy` (float32 products, softmax
  and argmax as one would write them), each with the best of several batch sizes, and `hansa`, as
  the command calls it. Rows per second of the thread's own CPU time, four turns a round; ratios
  are taken within a turn. `normal` is 16-64-8 with relu, `small` linear 16-8, `tanh` is 16-64-8
  with tanh.
- `fraction_of_onnxruntime`, `fraction_of_numpy`: the lesser of `normal` and `small`, medians.
- `command`: `hansa merchant assign` as a process of its own, from a Parquet file to both files
  of assignments, with a tenth of the rows and with all, by the clock on the wall; `peak_mib` is
  the most memory that the process had (resident), `peak_mib_tenth` with a tenth of the rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save
from threadpoolctl import threadpool_limits

from clients.rows import BATCH_ROWS
from clients.scoring import Scorer
from common.bundle import read_bundle, write_bundle
from common.contract import Contract, contract_toml, parse_contract
from common.network import Network, network_of
from common.onnx_model import onnx_bytes

_BATCHES = (1024, 4096, 16_384, 65_536)
_ROWS_IN_MEMORY, _TURNS = 2 * BATCH_ROWS, 4
_GENERATED_ROWS = 1 << 17
_FEATURES: list[dict[str, Any]] = [
    *({"name": f"spend_{number}", "high": 5000.0, "transform": "log1p"} for number in range(4)),
    *({"name": f"visits_{number}", "high": 50.0, "transform": "sqrt"} for number in range(3)),
    {"name": "age", "low": 18.0, "high": 100.0, "missing": "indicator"},
    {"name": "member", "kind": "flag"},
    {"name": "online", "kind": "flag"},
    {"name": "plan", "kind": "category", "categories": ["a", "b", "c", "d", "e"]},
]
_MODELS = {
    "normal": {"family": "mlp", "hidden": [64]},
    "small": {"family": "linear"},
    "tanh": {"family": "mlp", "hidden": [64], "activation": "tanh"},
}
_MERCHANT = """\
[merchant]
id = "shop"
[data]
kind = "customers"
path = "{path}"
[policy]
epsilon = 1.0
delta = 1e-5
"""
# A process of its own: a child's peak counts from the memory of the process that started it.
_WATCHED = """\
import resource, subprocess, sys, time
start = time.perf_counter()
code = subprocess.run(sys.argv[1:]).returncode
took, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
print(took, used.ru_utime + used.ru_stime, used.ru_maxrss)
sys.exit(code)
"""


def contract_of(model: str) -> Contract:
    """Return a contract of 16 inputs and 8 segments."""
    document = {
        "federation": {"name": "benchmark"},
        "features": _FEATURES,
        "segments": {"names": [f"segment {number}" for number in range(8)]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "model": _MODELS[model],
    }
    return parse_contract(document, source="benchmark")


def parameters_of(network: Network) -> np.ndarray:
    """Return float32 parameters about as large as trained ones."""
    return np.random.default_rng(0).normal(0.0, 0.4, network.size).astype(np.float32)


def by_onnxruntime(network: Network, theta: np.ndarray) -> Callable[[np.ndarray, int], Any]:
    """Return a function that runs the published ONNX model on rows, a batch at a time."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = onnx_bytes(network, theta.astype(np.float64))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    def run(x: np.ndarray, batch: int) -> np.ndarray:
        starts = range(0, len(x), batch)
        return [session.run(None, {"inputs": x[at : at + batch]})[0] for at in starts][-1]

    return run


def by_numpy(network: Network, theta: np.ndarray) -> Callable[[np.ndarray, int], Any]:
    """Return a function that does the same, and argmax, as one would write it with numpy."""
    layers = [(layer[:, :-1].T.copy(), layer[:, -1].copy()) for layer in network.layers(theta)]

    def applied(h: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        for number, (weights, bias) in enumerate(layers):
            h = h @ weights + bias
            if number < len(layers) - 1:
                h = np.maximum(h, 0) if network.activation == "relu" else np.tanh(h)
        h = np.exp(h - h.max(axis=1, keepdims=True))
        return h.argmax(axis=1), h / h.sum(axis=1, keepdims=True)

    def run(x: np.ndarray, batch: int) -> np.ndarray:
        return [applied(x[at : at + batch]) for at in range(0, len(x), batch)][-1][1]

    return run


def seconds(action: Callable[[], Any]) -> float:
    """Return the CPU time of this thread that an action took."""
    start = time.thread_time()
    action()
    return time.thread_time() - start


def model_alone(model: str, rows: int, rounds: int) -> dict[str, Any]:
    """Measure one model on encoded rows in memory, everybody in turns."""
    network = network_of(contract_of(model))
    theta = parameters_of(network)
    x = np.random.default_rng(1).uniform(-1, 1, (rows, network.dims[0])).astype(np.float32)
    scorer = Scorer(network, theta)
    others = {"onnxruntime": by_onnxruntime(network, theta), "numpy": by_numpy(network, theta)}
    ways: dict[tuple[str, int], Callable[[], Any]] = {
        (name, batch): partial(run, x, batch) for name, run in others.items() for batch in _BATCHES
    }
    ways["hansa", BATCH_ROWS] = lambda: [
        scorer.score(x[at : at + BATCH_ROWS]) for at in range(0, rows, BATCH_ROWS)
    ]
    difference = _check(x, scorer, others["onnxruntime"])
    taken: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for _ in range(_TURNS * rounds):
        for way, action in ways.items():
            taken[way].append(seconds(action))
    best = {
        name: min(
            (way for way in ways if way[0] == name), key=lambda way: statistics.median(taken[way])
        )
        for name in ("onnxruntime", "numpy", "hansa")
    }
    ours = taken[best["hansa"]]
    return {
        "dims": list(network.dims),
        "activation": network.activation,
        "rows": rows,
        "largest_difference": difference,
        **{
            f"fraction_of_{name}": _spread(
                [other / own for other, own in zip(taken[best[name]], ours, strict=True)]
            )
            for name in others
        },
        **{
            name: {
                "rows_per_s": _spread([rows / took for took in taken[way]]),
                "batch": way[1],
            }
            for name, way in best.items()
        },
    }


def _check(x: np.ndarray, scorer: Scorer, reference: Callable[[np.ndarray, int], Any]) -> float:
    """Return the largest difference from onnxruntime, which must be of rounding alone."""
    part = x[:65_536]
    found = scorer.score(part).probabilities.T
    difference = float(np.abs(found - reference(part, len(part))).max())
    if difference > 1e-5:
        raise SystemExit(f"probabilities differ from onnxruntime's by {difference:.2g}")
    return difference


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_customers(path: Path, rows: int) -> None:
    """Generate a Parquet file of customers, a part at a time."""
    writer: pq.ParquetWriter | None = None
    for table in _customers(rows):
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def _customers(rows: int) -> Iterator[pa.Table]:
    generator = np.random.default_rng(2)
    for start in range(0, rows, _GENERATED_ROWS):
        size = min(_GENERATED_ROWS, rows - start)
        columns = {"customer_id": pa.array([f"customer-{start + row:010}" for row in range(size)])}
        for feature in contract_of("small").features:
            columns[feature.name] = _column(feature, size, generator)
        yield pa.table(columns)


def _column(feature: Any, size: int, generator: np.random.Generator) -> pa.Array:
    if feature.kind == "flag":
        return pa.array(generator.integers(0, 2, size))
    if feature.kind == "category":
        return pa.array(np.array(feature.categories)[generator.integers(0, 5, size)])
    values = np.round(generator.uniform(feature.low, feature.high, size), 2)
    missing = generator.random(size) < 0.1 if feature.missing == "indicator" else None
    return pa.array(values, mask=missing)


def write_model(folder: Path) -> None:
    """Publish the normal model as a bundle."""
    contract = contract_of("normal")
    network = network_of(contract)
    theta = parameters_of(network)
    files = {
        "contract.toml": contract_toml(contract).encode(),
        "model.safetensors": save({"parameters": theta}),
        "model.onnx": onnx_bytes(network, theta.astype(np.float64)),
    }
    write_bundle(folder, files, Ed25519PrivateKey.generate())
    read_bundle(folder)


def command(folder: Path, rows: int) -> dict[str, float]:
    """Assign generated customers with the command, and see what it takes."""
    merchant, out = folder / "merchant.toml", folder / "assigned"
    write_customers(folder / "customers.parquet", rows)
    merchant.write_text(_MERCHANT.format(path="customers.parquet"), encoding="utf-8")
    words = ["merchant", "assign", str(folder / "bundle"), str(merchant), "--out", str(out)]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", _WATCHED, sys.executable, "-m", "hansa.cli", *words],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    written = out / "assignments.parquet"
    if done.returncode or pq.ParquetFile(written).metadata.num_rows != rows:
        raise SystemExit(f"the command failed: {done.stdout}{done.stderr}")
    took, cpu, peak = (float(word) for word in done.stdout.split()[-3:])
    return {
        "rows": rows,
        "seconds": took,
        "cpu_s": cpu,
        "rows_per_s": rows / took,
        "peak_mib": peak / 1024,
    }


def measure(folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Measure everything and return the document that is printed."""
    with threadpool_limits(limits=1):
        alone = {model: model_alone(model, min(rows, _ROWS_IN_MEMORY), rounds) for model in _MODELS}
    write_model(folder / "bundle")
    tenth, whole = (command(folder, size) for size in (max(rows // 10, 1), rows))
    fractions = {
        name: min(alone[model][name]["median"] for model in ("normal", "small"))
        for name in ("fraction_of_onnxruntime", "fraction_of_numpy")
    }
    return {
        **fractions,
        "peak_mib": whole["peak_mib"],
        "peak_mib_tenth": tenth["peak_mib"],
        "rows_per_s": whole["rows_per_s"],
        "threads": 1,
        "cores": os.cpu_count(),
        "models": alone,
        "command": [tenth, whole],
        "rounds": rounds,
    }


def main() -> None:
    """Measure, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are made, for its disk")
    choices = parser.parse_args()
    with TemporaryDirectory(dir=choices.folder) as folder:
        document = measure(Path(folder), choices.rows, choices.rounds)
    text = json.dumps(document, indent=2)
    if choices.json:
        choices.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
