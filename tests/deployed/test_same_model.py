"""Real processes and the simulator give one model, also where the coordinator was killed."""

import shutil
import time
from pathlib import Path

import pytest

from tests.deployed.stack import Stack
from tests.deployed.test_survival import check_paid, finished, last_run
from tests.postgres import database_url, postgres

pytestmark = pytest.mark.slow

ROUNDS = 4
AFTER_S = 1.3  # some moment between two sums

__all__ = ["database_url", "postgres"]  # fixtures


@pytest.fixture
def both(fresh: Stack, database_url: str) -> tuple[Stack, bytes]:
    """Give three merchants that joined, and the model that the simulator makes of their files."""
    profiles = {"profiles": True, "evaluate_every": 2}
    fresh.make(rounds=ROUNDS, database=database_url, publication=profiles)
    shutil.copytree(fresh.folder / "shops", fresh.folder / "copy")
    fresh.hansa("simulate", "--data", "copy", "--out", "simulated")
    simulated = (fresh.folder / "simulated" / "bundle" / "model.safetensors").read_bytes()
    fresh.start()
    fresh.enrol()
    fresh.join()
    return fresh, simulated


def model(stack: Stack) -> bytes:
    """Return the model that the last run published."""
    bundle = Path(str(stack.status()["run"]["bundle"]))
    return (bundle / "model.safetensors").read_bytes()


def test_real_processes_give_the_simulated_model(both: tuple[Stack, bytes]) -> None:
    """Byte for byte, with the same seed; also where the coordinator is killed in the middle.

    What was asked is asked again and answered the same.
    """
    stack, simulated = both
    finished(stack, stack.run())
    assert model(stack) == simulated
    run = stack.run()
    stack.rounds(run, 2)
    time.sleep(AFTER_S)
    stack.kill(stack.coordinator_pid())
    code, printed = stack.verdict(run)
    assert code == 1
    assert "ended unexpectedly" in printed
    name = last_run(stack)
    assert f"hansa server resume {stack.operator}" in printed
    done = stack.hansa("server", "resume", stack.operator, name, timeout=240)
    assert model(stack) == simulated, done.stdout
    check_paid(stack, name)
    assert "PASS" in stack.audit()
