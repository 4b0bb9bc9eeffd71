"""Random faults in ten-round runs: kill, pause, cut; whatever happens, the books are right.

`HANSA_FAULT_SEQUENCES` says how many runs are hurt (default 2), `HANSA_FAULT_SEED` which.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.deployed.cable import Cable
from tests.deployed.stack import Stack, wired_stack
from tests.deployed.test_survival import last_run, record_of

pytestmark = pytest.mark.slow

SEQUENCES = int(os.environ.get("HANSA_FAULT_SEQUENCES", "2"))
FIRST = int(os.environ.get("HANSA_FAULT_SEED", "0"))
FAULTS_A_RUN = 4
ROUNDS = 10


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Cable]]:
    """Give four merchants, one of them behind a cable that can be cut."""
    with wired_stack(
        tmp_path_factory.mktemp("federation"),
        rounds=ROUNDS,
        federation={"round_timeout_s": 20.0},
    ) as found:
        yield found


def fault(chance: random.Random, found: Stack, cable: Cable) -> str:
    """Do one thing to one process, or to the cable; return what."""
    shop = found.shop(chance.randrange(4))
    kind = chance.choice(
        ["kill worker", "kill node", "kill superlink", "kill gateway", "pause worker",
         "pause node", "pause superlink", "cut", "kill coordinator"]
    )  # fmt: skip
    word, _, child = kind.partition(" ")
    if word == "cut":
        cable.cut()
        time.sleep(chance.uniform(1, 8))
        cable.mend()
        return kind
    folder = found.operator if child in {"superlink", "gateway"} else shop
    with suppress(AssertionError, ProcessLookupError):
        pid = found.coordinator_pid() if child == "coordinator" else found.pid(folder, child)
        found.kill(pid, signal.SIGKILL if word == "kill" else signal.SIGSTOP)
        if word == "pause":
            time.sleep(chance.uniform(0.5, 6))
            with suppress(ProcessLookupError):
                found.kill(pid, signal.SIGCONT)
    return f"{kind} of {folder.name}"


def ended(found: Stack, run: "subprocess.Popen[str]") -> tuple[int, str]:
    """Return how a run ended, taken up again wherever its coordinator was lost."""
    code, printed = found.verdict(run, timeout=600)
    for _ in range(FAULTS_A_RUN + 1):
        if "ended unexpectedly" not in printed:
            break
        done = found.hansa("server", "resume", found.operator, code=None, timeout=600)
        code, printed = done.returncode, done.stdout + done.stderr
    return code, printed


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEQUENCES))
def test_a_hurt_run(hurt: tuple[Stack, Cable], seed: int) -> None:
    """It completes, or stops with a reason; ledgers verify, and nobody was charged twice."""
    found, cable = hurt
    chance = random.Random(seed)  # noqa: S311 - which process is hurt is no secret
    run, done = found.run("--wait", "60"), []
    for _ in range(FAULTS_A_RUN):
        time.sleep(chance.uniform(1, 8))
        if run.poll() is not None:
            break
        done.append(fault(chance, found, cable))
    code, printed = ended(found, run)
    assert code in {0, 1}, (done, printed)
    name = found.runs[run.pid]
    if code and "before it began" in printed:  # killed before its first word: nothing was asked
        assert any("coordinator" in one or "superlink" in one for one in done), (done, printed)
        assert all(name not in account.runs for account in found.ledgers().values())
        return
    assert name == last_run(found)
    if code:
        assert "ended unexpectedly" not in printed, (done, printed)
        assert found.status()["run"]["reason"], (done, printed)
    asked = [
        (line["stage"], line["round"], line["attempt"])
        for line in record_of(found, name)
        if line["kind"] == "sum"
    ]
    assert len({*asked}) == len(asked), done
    for account in found.ledgers().values():  # reading them checks every link and signature
        if name in account.runs:
            released = [*account.runs[name].released]
            assert len({*released}) == len(released)
            if code == 0:
                assert {*released} <= {*asked}, done
    print(f"sequence {seed}: exit code {code}; {', '.join(done)}")  # shown with -rP


def test_everything_together_passes_an_audit(hurt: tuple[Stack, Cable]) -> None:
    """After all of it."""
    found, _ = hurt
    assert "PASS" in found.audit()
