"""`hansa sweep` as people and programs meet it, also where it is broken off."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import jsonschema
import pandas as pd
import pytest

from common.contract import contract_toml
from simulations.datasets import load

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "hansa.cli", "sweep"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
SMALL = ["--preset", "smoke", "--merchants", "3", "--rounds", "2", "--seed", "1"]
CHANCE = ["seconds", "peak_mib"]


def hansa(*arguments: str, cwd: Path, code: int = 0) -> "subprocess.CompletedProcess[str]":
    """Run the command and check its exit code."""
    done = subprocess.run(
        [*COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
        cwd=cwd,
    )
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def started(*arguments: str, cwd: Path) -> "subprocess.Popen[str]":
    """Start the command, in a process group of its own as a terminal does."""
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
        process_group=0,
    )


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait until something is so, or fail after a minute."""
    end = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.01)


def kept(out: Path) -> dict[str, bytes]:
    """Return the records of a folder."""
    return {path.name: path.read_bytes() for path in (out / "cells").glob("[!.]*.json")}


def descendants(pid: int) -> set[int]:
    """Return the processes below a process."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            after = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if after[0] != "Z":
            parents[int(path.parent.name)] = int(after[1])
    found, more = set(), {pid}
    while more:
        more = {child for child, parent in parents.items() if parent in more}
        found |= more
    return found


def alive(pid: int) -> bool:
    """Tell whether a process runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def table(out: Path) -> pd.DataFrame:
    """Read what a seeded sweep found, but for what chance decides."""
    return pd.read_parquet(out / "sweep.parquet").drop(columns=CHANCE)


class TestSweep:
    """A whole grid."""

    @pytest.mark.slow
    def test_a_grid_gives_table_picture_and_json(self, tmp_path: Path) -> None:
        """All of them about the same runs; a second call computes nothing."""
        axes = ("--epsilon", "20,40", "--clip-norm", "1", "--clip-norm", "2", "--seeds", "1")
        done = hansa(*SMALL, *axes, "--out", "o", "--json", "s.json", cwd=tmp_path)
        assert "4 runs, 0 of them finished already" in done.stdout
        assert done.stderr.count("noisy accuracy") == 4
        assert "spends nobody's privacy" in " ".join(done.stdout.split())
        document = json.loads((tmp_path / "s.json").read_text())
        schema = json.loads((files("hansa") / "schemas" / "sweep.schema.json").read_text())
        jsonschema.validate(document, schema)
        frame = pd.read_parquet(tmp_path / "o" / "sweep.parquet")
        told = [(row["clip_norm"], row["epsilon"], row["accuracy"]["mean"]) for row in
                document["rows"]]  # fmt: skip
        assert told == list(zip(frame.clip_norm, frame.epsilon, frame.accuracy, strict=True))
        assert (frame.epsilon_spent <= frame.epsilon).all()
        pd.testing.assert_frame_equal(
            pd.read_csv(tmp_path / "o/sweep.csv")[["key", "accuracy"]], frame[["key", "accuracy"]]
        )
        assert (tmp_path / "o" / "sweep.png").read_bytes().startswith(b"\x89PNG")
        assert "clip norm" in (tmp_path / "o" / "sweep.svg").read_text()
        assert not (tmp_path / "o" / "runs").exists()

        before = kept(tmp_path / "o")
        again = hansa(*SMALL, *axes, "--out", "o", "--json", "-", cwd=tmp_path)
        assert "4 of them finished already" in again.stderr
        assert json.loads(again.stdout) == document
        assert kept(tmp_path / "o") == before

    @pytest.mark.slow
    def test_real_customers_are_spoken_for(self, tmp_path: Path) -> None:
        """Choosing by their figures spends what no run's epsilon counts."""
        arguments = ("--data", "cdnow", "--merchants", "3", "--rounds", "2", "--epsilon", "1,2")
        done = hansa(*arguments, "--seeds", "1", "--out", "o", cwd=tmp_path)
        told = " ".join(done.stdout.split())
        assert "Choosing by this table spends privacy" in told
        assert "all of the 2 runs in this folder. Together they cost an epsilon of at most" in told
        assert float(told.partition("epsilon of at most ")[2].split()[0]) > 2.0

    @pytest.mark.slow
    def test_a_failed_run_ends_with_one_and_keeps_the_rest(self, tmp_path: Path) -> None:
        """The reason is in the table, and the next call tries it again."""
        contract = load("synthetic", preset="smoke", merchants=3).contract
        crowded = contract.revised(training={"rounds": 2}, aggregation={"max_customers": 1})
        (tmp_path / "c.toml").write_text(contract_toml(crowded))
        arguments = ("c.toml", "--preset", "smoke", "--merchants", "3", "--seeds", "1")
        for attempts in (1, 2):
            done = hansa(
                *arguments, "--epsilon", "5", "--out", "o", "--json", "s.json", cwd=tmp_path, code=1
            )
            assert "hansa: 1 of 1 runs failed" in done.stderr
            assert "Failed: epsilon 5, clip norm" in done.stdout
            assert "max_customers" in done.stdout
            (reason,) = (row["reason"] for row in json.loads((tmp_path / "s.json").read_text())
                         ["failed"])  # fmt: skip
            assert "max_customers" in reason
            frame = pd.read_parquet(tmp_path / "o" / "sweep.parquet")
            assert frame.attempts.tolist() == [attempts]

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (("--epsilon", "1,x"), "--epsilon: expected numbers with commas"),
            (("--merchants", "2.5"), "--merchants: expected whole numbers"),
            (("--merchants", "1,3"), "--merchants: a secure sum hides nothing"),
            pytest.param(
                ("--epsilon", "1", "--epsilon", "0"),
                "epsilon 0: privacy.epsilon",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                ("--clip-norm", "1,nan"), "clip_norm nan: privacy.clip_norm", marks=pytest.mark.slow
            ),
            pytest.param(
                ("--sampling-rate", "0.5"),
                "sampling_rate 0.5: mode 'distributed'",
                marks=pytest.mark.slow,
            ),
            pytest.param(
                ("--merchants", "3,200000"), "merchants 200000: synthetic", marks=pytest.mark.slow
            ),
            (("--data", "none"), "unknown data set 'none'"),
        ],
        ids=str,
    )
    def test_bad_input_is_named_before_anything_runs(
        self, tmp_path: Path, arguments: tuple[str, ...], told: str
    ) -> None:
        """One line, exit code 2, and no folder."""
        done = hansa("--preset", "smoke", *arguments, "--out", "o", cwd=tmp_path, code=2)
        assert done.stderr.startswith(f"hansa: {told}")
        assert len(done.stderr.splitlines()) == 1
        assert not (tmp_path / "o").exists()


class TestBrokenOff:
    """Whatever ends a sweep, what is finished is kept."""

    AXES = ("--epsilon", "10,20,30", "--seeds", "2", "--workers", "1")

    @pytest.mark.slow
    def test_a_killed_sweep_goes_on_to_the_same_end(self, tmp_path: Path) -> None:
        """Finished runs are not made again; nothing of the sweep outlives it."""
        out = tmp_path / "killed"
        process = started(*SMALL, *self.AXES, "--out", "killed", cwd=tmp_path)
        try:
            wait_for(lambda: len(kept(out)) >= 2)
            wait_for(lambda: any(out.glob(".running-*/*.log")))
            below = descendants(process.pid)
        finally:
            process.kill()
            process.communicate()
        assert len(below) >= 2  # what forks, and a run
        wait_for(lambda: not any(map(alive, below)))
        before = kept(out)
        assert 2 <= len(before) < 6
        assert any(out.glob(".running-*"))

        done = hansa(*SMALL, *self.AXES, "--out", "killed", cwd=tmp_path)
        assert f"6 runs, {len(before)} of them finished already" in done.stdout
        after = kept(out)
        assert len(after) == 6
        assert before.items() <= after.items()
        assert not any(out.glob(".running-*"))

        hansa(*SMALL, *self.AXES, "--out", "whole", cwd=tmp_path)
        pd.testing.assert_frame_equal(table(out), table(tmp_path / "whole"))
        assert (table(out).status == "done").all()
        assert (out / "sweep.svg").read_bytes() == (tmp_path / "whole/sweep.svg").read_bytes()

    @pytest.mark.slow
    def test_ctrl_c_keeps_what_is_finished(self, tmp_path: Path) -> None:
        """Exit code 130, how to go on, no run left behind, no traceback."""
        process = started(*SMALL, *self.AXES, "--out", "o", cwd=tmp_path)
        try:
            wait_for(lambda: len(kept(tmp_path / "o")) >= 1)
            below = descendants(process.pid)
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all of them
            _, told = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == 130
        assert "Traceback" not in told
        assert "kept in o; the same command goes on" in told
        assert told.strip().endswith("hansa: interrupted")
        wait_for(lambda: not any(map(alive, below)))
        assert 1 <= len(kept(tmp_path / "o")) < 6
        assert not any((tmp_path / "o").glob(".running-*"))
        assert not (tmp_path / "o" / "sweep.png").exists()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name
    )
    def test_no_run_outlives_the_sweep(self, tmp_path: Path, number: signal.Signals) -> None:
        """Even one that would go on for many minutes, whatever ended the sweep."""
        long = [*SMALL[:4], "--rounds", "20000", "--epsilon", "50,60", "--out", "o"]
        process = started(*long, cwd=tmp_path)
        try:
            run_of(process, tmp_path / "o")
            below = descendants(process.pid)
            process.send_signal(number)
            process.communicate(timeout=60)
        finally:
            process.kill()
        wait_for(lambda: not any(map(alive, below)))
        assert kept(tmp_path / "o") == {}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("number", "ends"), [(signal.SIGKILL, ["done", "failed"]), (signal.SIGINT, ["done"] * 2)]
    )
    def test_a_run_that_is_killed_is_a_failed_cell(
        self, tmp_path: Path, number: signal.Signals, ends: list[str]
    ) -> None:
        """The others go on, and the signal is named; Ctrl-C is for the sweep alone to hear."""
        arguments = ("--epsilon", "20,30", "--seeds", "1", "--workers", "1", "--out", "o")
        slow = [*SMALL[:4], "--rounds", "60", "--seed", "1"]
        process = started(*slow, *arguments, cwd=tmp_path)
        try:
            os.kill(run_of(process, tmp_path / "o"), number)
            told, _ = process.communicate(timeout=120)
        finally:
            process.kill()
        frame = pd.read_parquet(tmp_path / "o" / "sweep.parquet")
        assert sorted(frame.status) == ends
        assert process.returncode == ends.count("failed")
        assert ("by SIGKILL, as when memory runs out" in told) == (number == signal.SIGKILL)


def run_of(process: "subprocess.Popen[str]", out: Path) -> int:
    """Wait for a run of a sweep; return its process."""
    found: list[int] = []

    def at_work() -> bool:
        logs = {log.resolve() for log in out.glob(".running-*/*.log")}
        found.extend(pid for pid in descendants(process.pid) if _output(pid) in logs)
        return bool(found)

    wait_for(at_work)
    return found[0]


def _output(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/fd/1").resolve()
    except OSError:
        return None
