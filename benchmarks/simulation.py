"""Simulators side by side: one workload, each in processes of its own, in turns.

    python -m benchmarks.simulation --json FILE [--peers DIR] [--turns 3] [--systems a,b]

1,000 merchants with 500 customers of 32 features in 8 segments; an MLP 32-64-32-8 (4,456
parameters); 10 rounds, 20 merchants a round, each with one epoch of 8 batches of 64; the same
rows, first model and learning rates everywhere; one thread for mathematics. DP-SGD with C = 1 and
noise of about 1 in our rows and with Opacus (true Poisson batches); pfl clips updates and adds
noise to the sum; FedJAX, BlazeFL and the plain loop are not private.

A run of ours has no sampling of merchants: everybody who takes part does so in every round. So ours
has rows for a run and for the training alone.

- `ours` is the in-process engine with all that a run has (Flower's messages, charged ledgers,
  the witness; sums are plain). Its federation is the 20 merchants of the first cohort, and the
  other 980 do not exist: what a simulator does to keep 1,000 at hand is not in this row.
- `ours_masked` is the same run with secure sums, for `secure_sums_cpu_s`.
- `ours_core` is the training computation alone, `clients.local_steps.local_updates`, on 20 of
  1,000 chosen anew each round. Here nothing is charged: it is no run that anybody could carry out.
- `ours_core_alike` is the core on what `ours` trains on, for `engine_overhead`.

`DIR` holds one virtual environment for each peer, with the peer's name: `flower_ray` (flwr with
its extra `simulation`, torch, opacus; or this Python, where Ray is there), `pfl`, `fedjax`,
`blazefl`. A runner (`benchmarks/peers`) imports nothing of ours. A peer that is not there, or
does not run, is left out: `left_out` says why. (BlazeFL needs Python 3.12 or later; pfl and FedJAX
0.0.17 were measured on 3.11.)

CPU and wall time are those of a round after the first, of all processes together: the median
over the rounds of a process, then median, least and most over the turns.

- `cpu_ratio_to_X`: CPU of `ours` / CPU of X; `core_cpu_ratio_to_X`: of `ours_core`. Median over
  the turns; `spread` holds least and most of each.
- `engine_overhead`: CPU of `ours` / CPU of `ours_core_alike`, less 1.
- `secure_sums_cpu_s`: CPU of `ours_masked`, less that of `ours`: what secure sums cost a round.
- `first_round_s`, `peak_mib`: of `ours`: wall time from the start of Python to the end of the
  first round; memory.
- `first_process`: the same of a process before all turns, which compiles the loops where none are
  kept from an earlier one. It is in no other figure.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.workload import Workload
from benchmarks.simulation_ours import contract_of, layers_of
from common.network import initial_parameters, network_of
from common.plan import plan_of

ROOT = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
FEATURES, HIDDEN, SEGMENTS = 32, (64, 32), 8
BATCH, LEARNING_RATE, CLIP_NORM, NOISE_MULTIPLIER = 64, 0.5, 1.0, 1.0
EPSILON = 8.5  # which asks for a noise multiplier of about 1 in ten rounds
_PATIENCE_S = 900.0  # for one process
_QUIET = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ADDRESS": "local",  # never a cluster that runs beside us
}


@dataclass(frozen=True)
class System:
    """A simulator: what its row is, and how its runner is started."""

    what: str
    arguments: tuple[str, ...]
    needs: str = ""  # module; where it is missing here, a virtual environment of the peer's name
    own: bool = False  # ours


SYSTEMS = {
    "ours": System(
        "20 merchants, a whole run: messages, ledgers, witness, DP-SGD",
        ("-m", "benchmarks.simulation_ours", "engine"),
        own=True,
    ),
    "ours_masked": System(
        "20 merchants, a whole run with secure sums",
        ("-m", "benchmarks.simulation_ours", "engine-masked"),
        own=True,
    ),
    "ours_core": System(
        "20 of 1,000 merchants, training alone, DP-SGD",
        ("-m", "benchmarks.simulation_ours", "core"),
        own=True,
    ),
    "ours_core_alike": System(
        "20 merchants, training alone, DP-SGD",
        ("-m", "benchmarks.simulation_ours", "core-alike"),
        own=True,
    ),
    "plain": System("plain PyTorch loop, not private", ("run_plain.py",)),
    "opacus": System("plain PyTorch loop, Opacus' DP-SGD", ("run_plain.py", "--opacus")),
    "pfl": System("pfl, noise on the sum alone", ("run_pfl.py",), "pfl"),
    "fedjax": System("FedJAX, not private", ("run_fedjax.py",), "fedjax"),
    "blazefl": System("BlazeFL, serial, not private", ("run_blazefl.py",), "blazefl"),
    "flower_ray": System("Flower's Ray engine, Opacus' DP-SGD", ("run_flower_ray.py",), "ray"),
}


def write_workload(folder: Path, merchants: int, rows: int, rounds: int, cohort: int) -> float:
    """Write the files of a workload; return the noise multiplier of our rows."""
    generator = np.random.default_rng(0)
    teacher = generator.normal(size=(FEATURES, SEGMENTS))

    def customers(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        x = generator.uniform(-1, 1, (*shape, FEATURES)).astype(np.float32)
        return x, (x @ teacher + generator.gumbel(size=(*shape, SEGMENTS))).argmax(-1)

    settings = {
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "clip_norm": CLIP_NORM,
        "noise_multiplier": NOISE_MULTIPLIER,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "epsilon").write_text(str(EPSILON))
    for name, (x, y) in (("", customers(merchants, rows)), ("test_", customers(5000))):
        np.save(folder / f"{name}x.npy", x)
        np.save(folder / f"{name}y.npy", y)
    chosen = [generator.permutation(merchants)[:cohort] for _ in range(rounds)]
    np.save(folder / "cohorts.npy", np.stack(chosen))
    dims = (FEATURES, *HIDDEN, SEGMENTS)
    _write_first(folder, [(np.zeros((b, a)), np.zeros(b)) for a, b in pairwise(dims)])
    contract = contract_of(Workload(str(folder)), EPSILON)
    _write_first(folder, layers_of(network_of(contract), initial_parameters(contract)))
    return plan_of(contract).update.event.noise_multiplier


def _write_first(folder: Path, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    named = {}
    for number, (weights, bias) in enumerate(layers):
        named |= {f"w{number}": weights.astype(np.float32), f"b{number}": bias.astype(np.float32)}
    np.savez(folder / "first.npz", **named)


def python_of(name: str, peers: Path | None) -> str | None:
    """Return the Python that runs a system; None where there is none."""
    system = SYSTEMS[name]
    own = None if peers is None else peers / name / "bin" / "python"
    if own is not None and system.needs and own.exists():
        return str(own)
    return sys.executable if not system.needs or find_spec(system.needs) else None


def run_once(name: str, python: str, folder: Path) -> dict[str, Any]:
    """Run a system once; return what its runner prints.

    Raises:
        RuntimeError: It failed; holds the end of what it said.
    """
    system = SYSTEMS[name]
    first, *rest = system.arguments
    command = (
        [first, *rest, str(folder)] if system.own else [str(PEERS / first), str(folder), *rest]
    )
    done = subprocess.run(  # noqa: S603  # ours, and the peers that somebody installed
        [python, *command],
        cwd=ROOT if system.own else folder,
        env={**os.environ, **_QUIET},
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"first_round_s"')]
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError(said[-1][:300] if said else f"exit code {done.returncode}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def measure(
    folder: Path, names: list[str], peers: Path | None, turns: int
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Run all systems in turns; return what each printed, and why others are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    for turn in range(turns):
        for name in names:
            if name in left_out:
                continue
            python = python_of(name, peers)
            if python is None:
                left_out[name] = f"there is no virtual environment '{name}' in --peers."
                continue
            try:
                found.setdefault(name, []).append(run_once(name, python, folder))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                if SYSTEMS[name].own:
                    raise
                found.pop(name)
                left_out[name] = f"does not run here: {error}."
            print(f"turn {turn + 1}: {name}", file=sys.stderr, flush=True)
    return found, left_out


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": SYSTEMS[name].what,
        "cpu_s": _spread([statistics.median(run["cpu_s"]) for run in runs]),
        "wall_s": _spread([statistics.median(run["wall_s"]) for run in runs]),
        "first_round_s": _spread([run["first_round_s"] for run in runs]),
        "first_round_cpu_s": _spread([run["first_round_cpu_s"] for run in runs]),
        "peak_mib": _spread([run["peak_mib"] for run in runs]),
        "accuracy": _spread([run["accuracy"] for run in runs]),
    }


def summary(found: dict[str, list[dict[str, Any]]], left_out: dict[str, str]) -> dict[str, Any]:
    """Return rows and what compares them."""
    cpu = {n: [statistics.median(run["cpu_s"]) for run in runs] for n, runs in found.items()}
    by_turn: dict[str, list[float]] = {}
    for ours, prefix in (("ours", ""), ("ours_core", "core_")):
        for name, theirs in cpu.items():
            if ours in cpu and not SYSTEMS[name].own:
                pairs = zip(cpu[ours], theirs, strict=True)
                by_turn[f"{prefix}cpu_ratio_to_{name}"] = [own / their for own, their in pairs]
    if {"ours", "ours_core_alike"} <= cpu.keys():
        pairs = zip(cpu["ours"], cpu["ours_core_alike"], strict=True)
        by_turn["engine_overhead"] = [own / core - 1 for own, core in pairs]
    if {"ours", "ours_masked"} <= cpu.keys():
        pairs = zip(cpu["ours"], cpu["ours_masked"], strict=True)
        by_turn["secure_sums_cpu_s"] = [masked - plain for plain, masked in pairs]
    rows = {name: _row(name, runs) for name, runs in found.items()}
    own = {name: rows["ours"][name]["median"] for name in ("first_round_s", "peak_mib")}
    return {
        **{name: statistics.median(values) for name, values in by_turn.items()},
        **own,
        "spread": {name: [min(values), max(values)] for name, values in by_turn.items()},
        "systems": rows,
        "left_out": left_out,
    }


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peers", type=Path, help="folder with a virtual environment a peer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--merchants", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cohort", type=int, default=20)
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    chosen = parser.parse_args()
    names = [name for name in SYSTEMS if name == "ours" or name in chosen.systems.split(",")]
    sizes = (chosen.merchants, chosen.rows, chosen.rounds, chosen.cohort)
    with tempfile.TemporaryDirectory(prefix="hansa-") as scratch:
        noise = write_workload(Path(scratch), *sizes)
        peers = None if chosen.peers is None else chosen.peers.absolute()
        before = run_once("ours", sys.executable, Path(scratch))
        results = measure(Path(scratch), names, peers, chosen.turns)
    found = summary(*results)
    found["first_process"] = {name: before[name] for name in ("first_round_s", "peak_mib")}
    found["workload"] = {
        **dict(zip(("merchants", "rows", "rounds", "cohort"), sizes, strict=True)),
        "noise_multiplier_ours": noise,
        "noise_multiplier": NOISE_MULTIPLIER,
        "turns": chosen.turns,
    }
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
