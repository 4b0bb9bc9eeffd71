"""What a run survives of its surroundings: a cut cable, wrong clocks, bad certificates, full disks.

Real processes over real TLS. A wrong clock is made by libfaketime in one merchant's processes.
"""

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from common.contract import read_contract
from server.certificates import issue, make_authority, read_pair
from tests.deployed.cable import Cable
from tests.deployed.stack import Stack, stack, until, wired_stack
from tests.deployed.test_outsiders import node_log
from tests.deployed.test_survival import check_paid, fill, finished, is_connected, last_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Stack, Cable]]:
    """Give four merchants that joined, the last one behind a cable; a sum needs three."""
    with wired_stack(tmp_path_factory.mktemp("federation"), rounds=4) as found:
        yield found


def everybody_is_there(up: Stack) -> None:
    """Wait until all nodes are connected."""
    everybody = range(up.merchants)
    until(lambda: all(is_connected(up, number) for number in everybody), 90, "all are there")


def test_a_merchant_is_disconnected_for_a_minute(wired: tuple[Stack, Cable]) -> None:
    """The others go on without it; it comes back by itself and is in the next run."""
    up, cable = wired
    everybody_is_there(up)
    run = up.run()
    up.rounds(run, 1)
    cut = time.monotonic()
    cable.cut()
    try:
        finished(up, run, less=(3,))
        until(lambda: not is_connected(up, 3), 60, "it is missed")
        time.sleep(max(0.0, 60 - (time.monotonic() - cut)))
    finally:
        cable.mend()
    everybody_is_there(up)
    assert "cannot be reached" in node_log(up.shop(3))
    finished(up, up.run())


@contextmanager
def certificate(up: Stack, pem: bytes, key_pem: bytes) -> Iterator[None]:
    """Have the operator's gateway show another certificate."""
    tls = up.operator / "tls"
    good = {name: (tls / name).read_bytes() for name in ("server.crt", "server.key")}

    def show(files: dict[str, bytes]) -> None:
        for name, content in files.items():
            (tls / name).write_bytes(content)
        before = up.pid(up.operator, "gateway")
        up.kill(before)
        until(lambda: up.pid(up.operator, "gateway") != before, 30, "another gateway")

    show({"server.crt": pem, "server.key": key_pem})
    try:
        yield
    finally:
        show(good)


@pytest.mark.parametrize("kind", ["expired", "foreign"])
def test_a_certificate(wired: tuple[Stack, Cable], kind: str) -> None:
    """Every merchant refuses it and says why; they come back when it is good again."""
    up, _ = wired
    everybody_is_there(up)
    before = {number: len(node_log(up.shop(number))) for number in range(up.merchants)}
    authority = read_pair(up.operator / "tls", "ca")
    if kind == "expired":
        pair = issue(authority, ["127.0.0.1"], datetime.now(UTC) - timedelta(days=1000))
    else:
        pair = issue(
            make_authority(read_contract(up.operator / "contract.toml").federation.name),
            ["127.0.0.1"],
        )
    words = {"expired": "certificate has expired", "foreign": "foreign certificate"}[kind]

    def told(number: int) -> bool:
        return words in node_log(up.shop(number))[before[number] :]

    with certificate(up, pair.pem, pair.key_pem):
        until(lambda: all(map(told, range(up.merchants))), 60, "every node says it")
        checked = up.hansa("merchant", "check", up.shop(0), code=None)
        assert checked.returncode
        assert kind in checked.stdout
    everybody_is_there(up)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a library that makes the clock of a process wrong."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    source = Path(__file__).with_name("clock.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library


@pytest.mark.parametrize(("shift", "words"), [(86_400, "24 h fast"), (-86_400, "24 h slow")])
def test_a_clock_is_off_by_a_day(
    wired: tuple[Stack, Cable], clock: Path, tmp_path: Path, shift: int, words: str
) -> None:
    """A merchant whose clock goes wrong is told so; the others go on; put right, it is back."""
    up, _ = wired
    everybody_is_there(up)
    up.hansa("merchant", "leave", up.shop(2))
    wrong = tmp_path / "shift"
    wrong.write_text("0")
    env = {"LD_PRELOAD": str(clock), "CLOCK_SHIFT_FILE": str(wrong)}
    joined = up.begin("merchant", "join", up.shop(2), "--rehearsal", env=env)
    try:
        everybody_is_there(up)
        before = len(node_log(up.shop(2)))
        wrong.write_text(str(shift))
        until(lambda: words in node_log(up.shop(2))[before:], 60, f"it is told {words}")
        finished(up, up.run("--wait", "3"), less=(2,))
        refused = up.hansa("merchant", "check", up.shop(2), code=None, env=env)
        assert refused.returncode
        assert words in refused.stdout
        wrong.write_text("0")
        everybody_is_there(up)
    finally:
        joined.terminate()
        joined.communicate(timeout=60)
        up.join([2])


@pytest.fixture
def on_a_small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Give a stack whose operator has a disk of its own."""
    folder = tmp_path_factory.mktemp("f")
    disk = folder / "coordinator"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)]
    if subprocess.run(mount, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with stack(folder, 3) as found:
            yield found
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_the_operators_disk_is_full(on_a_small_disk: Stack) -> None:
    """A run that cannot be kept stops and says so; with room again it goes on to its end."""
    up = on_a_small_disk
    up.up(rounds=4)
    run = up.run()
    up.rounds(run, 1)
    name = up.runs[run.pid]
    fill(up.operator)
    time.sleep(15)
    (up.operator / "filler").unlink()
    code, printed = up.verdict(run, timeout=400)
    assert "disk" in printed
    if code:  # the coordinator could not even write down why it ended
        assert "hansa server resume" in printed
        up.hansa("server", "resume", up.operator)
    assert last_run(up) == name
    check_paid(up, name, less=(0, 1, 2))
    assert "PASS" in up.audit()
    finished(up, up.run())
