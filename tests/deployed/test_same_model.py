"""Real processes and the simulator give one model, also where the coordinator was killed."""

import shutil
import time
from pathlib import Path

import pytest

from tests.deployed.stack import Stack, lengthy
from tests.deployed.test_survival import check_paid, last_run

pytestmark = pytest.mark.slow

ROUNDS = 4


@pytest.fixture
def both(fresh: Stack) -> tuple[Stack, bytes]:
    """Give three merchants that joined, and the model that the simulator makes of their files."""
    profiles = {"profiles": True, "evaluate_every": 2}
    fresh.make(rounds=ROUNDS, publication=profiles)
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
    """Byte for byte, with the same seed."""
    stack, simulated = both
    code, printed = stack.verdict(stack.run())
    assert code == 0, printed
    assert model(stack) == simulated
    assert "PASS" in stack.audit()


@pytest.mark.parametrize("after_s", [0.0, pytest.param(1.3, marks=lengthy)])
def test_a_killed_coordinator_is_resumed_to_the_same_model(
    both: tuple[Stack, bytes], after_s: float
) -> None:
    """Wherever in a round it was killed: what was asked is asked again and answered the same."""
    stack, simulated = both
    run = stack.run()
    stack.rounds(run, 2)
    time.sleep(after_s)
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
