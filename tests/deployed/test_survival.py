"""What a run survives, with real processes over real TLS: each test hurts one thing.

Every test says how the run ends and that everybody paid exactly for what was asked of it.
"""

import base64
import json
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from clients.joining import open_worker
from common.accounting import epsilon
from common.contract import read_contract
from common.network import initial_parameters
from common.plan import UPDATE, lattice_of, plan_of
from tests.deployed.stack import Stack, alive, lengthy, until

pytestmark = pytest.mark.slow


def last_run(up: Stack) -> str:
    """Return the newest run's name."""
    found: str = up.status()["run"]["run"]
    return found


def record_of(up: Stack, run: str) -> list[dict[str, object]]:
    """Return the lines of a run's record."""
    path = up.operator / "server" / "runs" / run / "run.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def check_paid(up: Stack, run: str, *, less: tuple[int, ...] = ()) -> None:
    """Hold every ledger against the record: nobody paid for what was not asked, or twice.

    Args:
        up: The federation.
        run: The run.
        less: Merchants that may be in fewer sums, because they were away.
    """
    sums = [line for line in record_of(up, run) if line["kind"] == "sum"]
    asked = [(line["stage"], line["round"], line["attempt"]) for line in sums]
    assert len({*asked}) == len(asked), "a sum was recorded twice"
    contract = read_contract(up.operator / "contract.toml")
    for number, account in enumerate(up.ledgers().values()):
        if run not in account.runs:
            assert number in less
            continue
        released = account.runs[run].released
        assert {*released} <= {*asked}, "a merchant paid for a sum that no record has"
        named = {
            occasion
            for line, occasion in zip(sums, asked, strict=True)
            if up.name(number) in cast("list[str]", line["merchants"])
        }
        assert named <= {*released}, "a merchant is in a sum that it did not pay for"
        if number not in less:
            assert {*released} == {*asked}
        spent = epsilon([charge.event for charge in released.values()], contract.privacy.delta)
        assert spent <= contract.privacy.epsilon * (1 + 1e-9)


def finished(up: Stack, run: "subprocess.Popen[str]", *, less: tuple[int, ...] = ()) -> str:
    """Wait for a run to finish well; check ledgers; return its name."""
    code, printed = up.verdict(run)
    assert code == 0, printed
    name = last_run(up)
    check_paid(up, name, less=less)
    return name


def test_a_quiet_run(up: Stack) -> None:
    """Nothing is hurt: everybody is in every sum, and an audit of all evidence passes."""
    name = finished(up, up.run())
    sums = [line for line in record_of(up, name) if line["kind"] == "sum"]
    planned = plan_of(read_contract(up.operator / "contract.toml"))
    assert planned.profile is None
    assert len(sums) == 1 + 4 + 1
    assert all(line["merchants"] == up.names for line in sums)
    assert "PASS" in up.audit()


def test_the_superlink_is_killed_in_mid_round(up: Stack) -> None:
    """It is started again, and the run goes on where it was."""
    run = up.run()
    up.rounds(run, 2)
    before = up.pid(up.operator, "superlink")
    up.kill(before)
    # a node that the new one lets in again after the round's time limit is out of that round
    finished(up, run, less=(0, 1, 2, 3))
    assert up.pid(up.operator, "superlink") != before
    everybody = range(up.merchants)
    until(lambda: all(is_connected(up, n) for n in everybody), 60, "all nodes are back")


@lengthy
def test_the_gateway_is_killed(up: Stack) -> None:
    """Nodes wait for it."""
    run = up.run()
    up.rounds(run, 2)
    up.kill(up.pid(up.operator, "gateway"))
    finished(up, run)


def test_a_worker_is_killed_between_stages(up: Stack) -> None:
    """The session is on its disk, sealed: it answers the next stage, and pays nothing again."""
    run = up.run()
    up.rounds(run, 2)
    for _ in range(3):
        up.kill(up.pid(up.shop(1), "worker"))
        time.sleep(1.0)
    finished(up, run, less=(1,))


def test_a_node_is_killed_and_comes_back_within_a_minute(up: Stack) -> None:
    """Flower lets it in again when it has missed it; until then it tries."""
    run = up.run()
    up.rounds(run, 1)
    up.kill(up.pid(up.shop(1), "node"))
    finished(up, run, less=(1,))
    until(lambda: is_connected(up, 1), 60, "the node is back")


def is_connected(up: Stack, number: int) -> bool:
    """Tell whether a merchant's node is connected."""
    found = {one["merchant"]: one for one in up.status()["merchants"]}
    return bool(found[up.name(number)]["connected"])


@pytest.mark.parametrize("child", ["worker", pytest.param("node", marks=lengthy)])
def test_a_process_hangs(up: Stack, child: str) -> None:
    """Its supervisor notices, ends it and starts another; the run does not wait for ever."""
    run = up.run()
    up.rounds(run, 1)
    hung = up.pid(up.shop(2), child)
    up.kill(hung, signal.SIGSTOP)
    finished(up, run, less=(2,))
    until(lambda: not alive(hung), 60, f"the hung {child} is ended")
    until(lambda: is_connected(up, 2), 60, "the merchant is back")


@lengthy
def test_a_slow_merchant(up: Stack) -> None:
    """Whoever answers before the time is up is in every sum."""
    run = up.run()
    up.rounds(run, 1)
    slow = up.pid(up.shop(3), "worker")
    for _ in range(3):
        up.kill(slow, signal.SIGSTOP)
        time.sleep(4.0)
        up.kill(slow, signal.SIGCONT)
        time.sleep(1.0)
    finished(up, run)


def test_a_merchant_is_killed_for_good(up: Stack) -> None:
    """The run ends without it; it pays for what it answered and no more."""
    until(lambda: is_connected(up, 3), 60, "the merchant is there")
    run = up.run()
    up.rounds(run, 1)
    state = json.loads((up.shop(3) / "run" / "state.json").read_text())
    children = up.children(up.shop(3))
    up.kill(state["pid"])
    until(lambda: not any(alive(pid) for pid in children.values()), 30, "its children are gone")
    finished(up, run, less=(3,))
    up.join([3])
    until(lambda: is_connected(up, 3), 60, "the merchant is back")
    assert "PASS" in up.audit()


def test_a_merchant_joins_late(up: Stack) -> None:
    """A run begins without it, and takes it in when it sets up its next session."""
    up.hansa("merchant", "leave", up.shop(3))
    run = up.run("--wait", "3")
    up.rounds(run, 1)
    up.join([3])
    finished(up, run, less=(3,))
    assert "PASS" in up.audit()


def fill(disk: Path) -> None:
    """Fill a small disk to its last byte."""
    with (disk / "filler").open("wb", buffering=0) as filler:
        for size in (65536, 512, 1):
            written = size
            while written == size:
                try:
                    written = filler.write(bytes(size))
                except OSError:
                    break


def test_a_disk_of_a_merchant_is_full(up: Stack, tmp_path: Path) -> None:
    """A merchant that cannot write into its ledger releases nothing; the others go on."""
    shop = up.shop(0)
    up.hansa("merchant", "leave", shop)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    ledger = shop / "ledger.sqlite"
    try:
        for part in shop.glob("ledger.sqlite*"):
            shutil.move(part, small / part.name)
        text = (shop / "merchant.toml").read_text()
        moved = text + f'\n[ledger]\npath = "{small / "ledger.sqlite"}"\n'
        (shop / "merchant.toml").write_text(moved)
        up.join([0])
        until(lambda: is_connected(up, 0), 60, "the merchant is there")
        fill(small)
        code, printed = up.verdict(up.run())
        assert code == 0, printed
        name = last_run(up)
        assert all(
            up.name(0) not in (line["merchants"] or ())  # type: ignore[operator]
            for line in record_of(up, name)
            if line["kind"] == "sum"
        )
        told = {one["merchant"]: one for one in up.status()["merchants"]}[up.name(0)]
        assert "edger" in told["last_error"]
    finally:
        up.hansa("merchant", "leave", shop, code=None)
        for part in small.glob("ledger.sqlite*"):
            shutil.copy(part, ledger.parent / part.name)
        subprocess.run(["umount", str(small)], check=True)
        (shop / "merchant.toml").write_text(text)
    up.join([0])
    until(lambda: is_connected(up, 0), 60, "the merchant is back")
    finished(up, up.run())


def test_too_few_merchants(up: Stack) -> None:
    """The run waits, says for whom, and ends when its time is up; nobody paid."""
    up.hansa("merchant", "leave", up.shop(0), up.shop(1))
    try:
        code, printed = up.verdict(up.run("--wait", "4"))
        assert code == 1
        assert "waits for 2 more merchants (2 of 4 are here" in printed
        assert "2 merchants take part" in printed.replace("2 of 2 merchants", "2 merchants")
        run = last_run(up)
        assert all(run not in account.runs for account in up.ledgers().values())
    finally:
        up.join([0, 1])
    until(lambda: is_connected(up, 0) and is_connected(up, 1), 60, "they are back")


@lengthy
def test_a_second_node_with_the_same_identity(up: Stack, tmp_path: Path) -> None:
    """A copy of a merchant's folder is kept out while the merchant is there."""
    copy = tmp_path / up.name(1)
    shutil.copytree(up.shop(1), copy, ignore=shutil.ignore_patterns("run", "logs", "*.sock"))
    second = up.begin("merchant", "join", copy, "--rehearsal")
    try:
        log = copy / "logs" / "node.jsonl"
        until(lambda: log.exists() and "another node" in log.read_text(), 60, "it is told so")
        finished(up, up.run())
    finally:
        second.send_signal(signal.SIGTERM)
        second.communicate(timeout=30)


def test_another_contract(up: Stack) -> None:
    """A merchant that pinned another contract refuses, and says so; the others go on."""
    path = up.shop(1) / "contract.toml"
    text = path.read_text()
    up.hansa("merchant", "leave", up.shop(1))
    path.write_text(text.replace("rounds = 4", "rounds = 5"))
    try:
        checked = up.hansa("merchant", "check", up.shop(1), code=None)
        assert checked.returncode
        assert "contract" in checked.stdout + checked.stderr
        up.join([1])
        finished(up, up.run(), less=(1,))
        told = {one["merchant"]: one for one in up.status()["merchants"]}[up.name(1)]
        assert told["state"] == "refused"
        assert "this merchant pinned contract" in told["last_error"]
    finally:
        path.write_text(text)
        up.hansa("merchant", "leave", up.shop(1))
        up.join([1])
    until(lambda: is_connected(up, 1), 60, "the merchant is back")


def single_vectors(up: Stack) -> list[np.ndarray]:
    """Return what every merchant masked in the first round, which only its seed tells us."""
    found = []
    for number in range(up.merchants):
        worker = open_worker(up.shop(number) / "merchant.toml").worker
        contract, network = worker.contract, worker._network
        release = plan_of(contract).release_of(UPDATE, 1, contract.training.rounds)
        assert release is not None
        theta = initial_parameters(contract)
        exact = worker._gradient_sum(network, theta, *worker._train, release.event.sensitivity)
        noisy = worker._noisy(release, exact, worker._noise_for(UPDATE, 1, 0))
        found.append(lattice_of(release, contract).to_ring(noisy))
        worker.ledger.close()
    return found


def test_no_vector_of_a_single_merchant_is_on_the_operators_disk(up: Stack) -> None:
    """Neither in a database, freed pages included, nor in a log: what came was masked."""
    name = finished(up, up.run())
    vectors = single_vectors(up)
    update = next(line for line in record_of(up, name) if line.get("stage") == UPDATE)
    total = np.frombuffer(base64.b64decode(str(update["total"])), dtype="<i8")
    summed = np.sum(vectors, axis=0, dtype=np.uint32).view(np.int32)
    np.testing.assert_array_equal(summed, total)  # so these are the vectors that were masked
    needles = [
        vector.tobytes()[start : start + 16]
        for vector in vectors
        for start in range(0, vector.nbytes - 16, 16)
    ]
    needles += [needle.hex().encode() for needle in needles]
    looked = 0
    for path in up.operator.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            looked += len(content)
            assert not any(needle in content for needle in needles), path
    assert looked > 100_000
