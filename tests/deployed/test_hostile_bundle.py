"""An operator that ships a hostile app bundle gets no row, no key and no budget."""

import json
import os
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest

from server.flower_control import run_status, start_run
from server.settings import read_settings
from tests.deployed.stack import BIN, OFFLINE, Stack, free_ports, until

pytestmark = pytest.mark.slow

CLIENT = """
import json, os
from pathlib import Path
from flwr.app import Message, RecordDict, ConfigRecord
from flwr.clientapp import ClientApp
app = ClientApp()
SHOP = Path({shop!r})

@app.query()
def steal(message, context):
    found = {{}}
    for path in ["identity.key", "customers.parquet", "ledger.sqlite", "session.sealed",
                 "merchant.toml", "node.key"]:
        try:
            found[path] = (SHOP / path).read_bytes()[:64].hex()
        except OSError as error:
            found[path] = type(error).__name__
    try:
        (SHOP / "ledger.sqlite").unlink()
        found["removed"] = True
    except OSError:
        found["removed"] = False
    Path({out!r}).write_text(json.dumps(found))
    return Message(RecordDict({{"x": ConfigRecord({{"y": json.dumps(found)}})}}), reply_to=message)
"""
SERVER = """
import time
from flwr.app import Message, RecordDict
from flwr.serverapp import ServerApp
app = ServerApp()

@app.main()
def main(grid, context):
    for _ in range(100):
        nodes = list(grid.get_node_ids())
        if nodes:
            break
        time.sleep(0.2)
    messages = [Message(RecordDict(), dst_node_id=n, message_type="query") for n in nodes]
    ids = list(grid.push_messages(messages))
    end = time.monotonic() + 40
    waiting = set(ids)
    while waiting and time.monotonic() < end:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
        time.sleep(0.2)
"""
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "hostile"
version = "0.1.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]
[tool.flwr.app]
publisher = "hostile"
fab-format-version = 1
flwr-version-target = "1.41.0"
[tool.flwr.app.components]
serverapp = "hostile.server:app"
clientapp = "hostile.client:app"
[tool.flwr.app.config]
x = ""
"""


def hostile(shop: Path, out: Path) -> bytes:
    """Return an app bundle that tells what it can read of a merchant's folder."""
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        root = Path(scratch) / "hostile"
        (root / "hostile").mkdir(parents=True)
        (root / "pyproject.toml").write_text(PROJECT)
        (root / "LICENSE").write_text("none\n")
        (root / "hostile" / "__init__.py").write_text("")
        (root / "hostile" / "server.py").write_text(SERVER)
        (root / "hostile" / "client.py").write_text(CLIENT.format(shop=str(shop), out=str(out)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Flower's own
            return build_fab_from_disk(root)


@pytest.fixture
def joined(fresh: Stack) -> Stack:
    """Give three merchants that joined."""
    fresh.up(rounds=2)
    return fresh


def test_a_node_runs_no_bundle(joined: Stack, tmp_path: Path) -> None:
    """Our node never fetches it: nothing of it runs at a merchant, and nothing was spent."""
    out = tmp_path / "stolen.json"
    settings = read_settings(joined.operator)
    run = start_run(settings, hostile(joined.shop(0), out), {})
    until(lambda: run_status(settings, run).startswith("finished"), 120, "the hostile run ends")
    assert not out.exists()
    for account in joined.ledgers().values():
        assert not account.runs
    code, printed = joined.verdict(joined.run())
    assert code == 0, printed


def test_the_code_of_a_bundle_as_another_user_reads_nothing(joined: Stack) -> None:
    """What a bundle could do as the user of a node: rows, keys and ledger are closed to it.

    The interpreter may not be there for that user, so the attempt is made by programs of the
    system.
    """
    if os.geteuid() != 0:
        pytest.skip("needs the right to start a process as another user")
    shop = joined.shop(0)
    secrets = ["identity.key", "node.key", "ledger.sqlite", "session.sealed", "customers.parquet"]
    for folder in [shop, *shop.parents]:
        if folder.stat().st_mode & 0o1000:  # a folder for everybody
            break
        folder.chmod(folder.stat().st_mode | 0o011)  # the way there is open, as in a real home
    for name in secrets:
        if not (shop / name).exists():
            continue
        read = subprocess.run(
            ["cat", str(shop / name)], user=65534, group=65534, extra_groups=[],
            capture_output=True, check=False,
        )  # fmt: skip
        assert read.returncode, f"{name} can be read by another user"
        assert not read.stdout
    for command in (["rm", "-f", str(shop / "ledger.sqlite")], ["touch", str(shop / "x")]):
        done = subprocess.run(
            command, user=65534, group=65534, extra_groups=[], capture_output=True, check=False
        )
        assert done.returncode
    assert joined.ledgers()


def test_the_shim_hands_on_and_holds_nothing(joined: Stack, tmp_path: Path) -> None:
    """A hostile run over Flower's own node: the worker answers by its own rules alone."""
    shop = joined.shop(2)
    joined.hansa("merchant", "leave", shop)
    worker = subprocess.Popen(
        [str(BIN / "python"), "-m", "clients.worker_service", str(shop), "--rehearsal"],
        env={**os.environ, **OFFLINE},
    )
    (port,) = free_ports(1)
    settings = read_settings(joined.operator)
    enrolment = json.loads((shop / "enrolment.json").read_text())
    (tmp_path / "ca.crt").write_text(enrolment["ca_pem"])
    node = subprocess.Popen(
        [
            str(BIN / "flower-supernode"), "--root-certificates", str(tmp_path / "ca.crt"),
            "--superlink", f"127.0.0.1:{settings.port}", "--auth-supernode-private-key",
            str(shop / "node.key"), "--host", "127.0.0.1", "--port", str(port), "--node-config",
            f'worker="{shop / "run" / "worker.sock"}"',
        ],
        env={**os.environ, **OFFLINE, "FLWR_HOME": str(tmp_path / "home"),
             "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        until((shop / "run" / "worker.sock").exists, 60, "the worker")
        code, printed = joined.verdict(joined.run("--wait", "60"), timeout=400)
        assert code == 0, printed
        assert len(joined.ledgers()[joined.name(2)].runs) == 1
    finally:
        os.killpg(node.pid, 15)
        node.wait(30)
        worker.terminate()
        worker.wait(30)
