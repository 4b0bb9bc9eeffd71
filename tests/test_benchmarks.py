"""The benchmarks run as their pages say, and write what they promise."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers.workload import Workload
from benchmarks.simulation import write_workload
from benchmarks.simulation_ours import customers_of
from benchmarks.verdict import table
from tests.deployed.stack import OFFLINE

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_secure_sum(tmp_path: Path) -> None:
    """Against Flower's own functions and plain sums, in one JSON document."""
    document = tmp_path / "secure_sum.json"
    command = [sys.executable, "-m", "benchmarks.secure_sum", "--repeats", "1"]
    subprocess.run([*command, "--json", str(document)], cwd=ROOT, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {
        "n50_client_speedup", "n50_server_speedup", "mask_over_plain_add", "round20_cpu_s",
    }  # fmt: skip
    assert figures <= found.keys()
    assert all(found[name] > 0 for name in figures)
    assert found["bytes_up_over_bound"] < 1  # of 1.1 * 4 P + 200 n: no clock has a part in it


@pytest.mark.slow
def test_ledger(tmp_path: Path) -> None:
    """Charges, a large ledger and a year's epsilon, in one JSON document."""
    document = tmp_path / "ledger.json"
    command = [sys.executable, "-m", "benchmarks.ledger", "--repeats", "1"]
    command += ["--json", str(document), "--folder", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {
        "verify_10k_s", "open_10k_s", "charge_ms", "reserve_ms", "epsilon_1y_ms",
        "epsilon_1y_sampled_ms", "epsilon_1y_sampled_cold_ms",
    }  # fmt: skip
    assert figures <= found.keys()
    assert all(found[name] > 0 for name in figures)


@pytest.mark.slow
def test_simulation(tmp_path: Path) -> None:
    """Our engine, its core and a plain loop on a small workload, in one JSON document."""
    document = tmp_path / "simulation.json"
    command = [sys.executable, "-m", "benchmarks.simulation", "--json", str(document)]
    command += ["--systems", "ours,ours_masked,ours_core_alike,plain,pfl", "--turns", "1"]
    command += ["--merchants", "6", "--rows", "130", "--rounds", "3", "--cohort", "3"]
    command += ["--peers", str(tmp_path / "none")]
    environment = {**os.environ, **OFFLINE}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {"cpu_ratio_to_plain", "first_round_s", "peak_mib"}
    assert {*figures, "engine_overhead", "secure_sums_cpu_s"} <= found.keys()
    assert all(found[name] > 0 for name in figures)
    assert all(found["first_process"][name] > 0 for name in ("first_round_s", "peak_mib"))
    rows = found["systems"]
    assert rows.keys() == {"ours", "ours_masked", "ours_core_alike", "plain"}
    assert all(row["cpu_s"]["min"] > 0 and row["peak_mib"]["min"] > 10 for row in rows.values())
    assert "no virtual environment" in found["left_out"]["pfl"]


def test_the_workload_is_what_our_run_trains_on(tmp_path: Path) -> None:
    """Every merchant of our run trains on exactly the rows that the other simulators get."""
    write_workload(tmp_path, merchants=3, rows=70, rounds=2, cohort=2)
    work = Workload(str(tmp_path))
    found = customers_of(work)
    x, y = np.load(tmp_path / "x.npy"), np.load(tmp_path / "y.npy")
    for merchant in work.cohorts[0]:
        own = found[f"m{merchant:04d}"]
        trained = own.part(held_out=False)
        np.testing.assert_array_equal(trained[0], x[merchant])
        np.testing.assert_array_equal(trained[1], y[merchant])
        assert 0 < own.held_out.sum() < 10


@pytest.mark.slow
def test_scale(tmp_path: Path) -> None:
    """Both modes, each with its memory, in one JSON document."""
    document = tmp_path / "scale.json"
    command = [sys.executable, "-m", "benchmarks.scale", "--preset", "smoke", "--rounds", "2"]
    environment = {**os.environ, **OFFLINE}
    subprocess.run(
        [*command, "--json", str(document)], cwd=ROOT, env=environment, check=True, timeout=500
    )
    found = json.loads(document.read_text(encoding="utf-8"))
    assert found["runs"].keys() == {"distributed", "local"}
    assert all(run["merchants"] == 20 for run in found["runs"].values())
    assert 100 < found["peak_mib"] == max(run["peak_mib"] for run in found["runs"].values())
    assert found["fits_into_4_gib"]


@pytest.mark.slow
def test_dp_step(tmp_path: Path) -> None:
    """Beside plain SGD and every mode of Opacus, in one JSON document."""
    document = tmp_path / "dp_step.json"
    command = [sys.executable, "-m", "benchmarks.dp_step", "--quick", "--turns", "2"]
    command += ["--opacus-turns", "1", "--json", str(document)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {
        "worst_ratio_to_plain_sgd", "median_ratio_to_plain_sgd",
        "worst_speedup_over_opacus", "median_speedup_over_opacus",
    }  # fmt: skip
    assert figures <= found.keys()
    assert all(found[name] > 0 for name in figures)
    (row,) = found["settings"]
    assert set(row["microseconds"]) == {
        "plain", "ours", "noise", "opacus_hooks", "opacus_functorch", "opacus_ghost",
    }  # fmt: skip


@pytest.mark.slow
def test_assign(tmp_path: Path) -> None:
    """Against onnxruntime and numpy, and as a whole command, in one JSON document."""
    document = tmp_path / "assign.json"
    command = [sys.executable, "-m", "benchmarks.assign", "--rows", "20000", "--rounds", "1"]
    command += ["--json", str(document), "--folder", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    figures = {"fraction_of_onnxruntime", "fraction_of_numpy", "peak_mib", "peak_mib_tenth"}
    assert figures <= found.keys()
    assert all(found[name] > 0 for name in figures)
    assert found["models"].keys() == {"normal", "small", "tanh"}
    for model in found["models"].values():
        for name in ("onnxruntime", "numpy", "hansa"):
            spread = model[name]["rows_per_s"]
            assert 0 < spread["min"] <= spread["median"] <= spread["max"]
        assert model["largest_difference"] < 1e-5
    assert [run["rows"] for run in found["command"]] == [2000, 20_000]
    assert found["peak_mib"] == found["command"][1]["peak_mib"]
    assert [path.name for path in tmp_path.iterdir()] == ["assign.json"]


@pytest.mark.slow
def test_verdict(tmp_path: Path) -> None:
    """Every training in one group by signal over noise, in one JSON document."""
    document = tmp_path / "verdict.json"
    command = [sys.executable, "-m", "benchmarks.verdict", "--quick", "--seeds", "1"]
    subprocess.run([*command, "--json", str(document)], cwd=ROOT, check=True, timeout=500)
    found = json.loads(document.read_text(encoding="utf-8"))
    assert len(found["trainings"]) == 24
    rows = [*found["from_nothing"], *found["from_a_start"]]
    assert sum(row["trainings"] for row in rows) == 24
    loud = [one for one in found["trainings"] if one["run_ratio"] < 1]
    assert any(one["private"] != one["without_noise"] for one in loud)


def test_verdicts_table() -> None:
    """A group's bounds, means, ratio, and who is better or as good, of trainings made by hand."""

    def training(ratio: float, private: float, without: float) -> dict[str, float]:
        told = {"run_ratio": ratio, "private": private, "without_noise": without}
        return {**told, "begun": 0.5, "last_period": 0.6}

    found = [training(3.9, 0.4, 0.5), training(4.0, 0.5, 0.6), training(19.9, 0.7, 0.8)]
    drowned, weak = table(found)
    assert (drowned["from"], drowned["to"], drowned["trainings"]) == (0, 4, 1)
    assert drowned["gained"] == pytest.approx(-0.1)
    assert drowned["ratio"] is None
    assert (weak["from"], weak["to"], weak["trainings"]) == (4, 20, 2)
    assert weak["gained"] == pytest.approx(0.1)
    assert weak["gained_without_noise"] == pytest.approx(0.2)
    assert weak["ratio"] == pytest.approx(0.5)
    assert (weak["better_than_begun"], weak["as_good_as_begun"]) == (0.5, 1.0)
    assert weak["better_than_last_period"] == 0.5
    assert table([training(20.0, 0.7, 0.8)])[0]["to"] is None
