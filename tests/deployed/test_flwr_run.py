"""The same apps under Flower's own simulation, started as a person starts it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from clients.secure_sum import Phase, State
from clients.session_store import FileStore
from common.budget import Budget
from common.contract import contract_toml, read_contract
from common.identity import read_identity, read_members
from common.ledger_entries import read_ledger
from server.witness import Witness

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BIN / "ray").exists(), reason="the extra `ray` is not installed"),
]


@pytest.fixture
def flower_home(tmp_path: Path) -> Iterator[Path]:
    """Give Flower a home of its own; end the SuperLink that `flwr run` leaves running."""
    home = tmp_path / "flower"
    yield home
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"flower-superlink" in command and str(home).encode() in command:
            os.kill(int(process.name), signal.SIGTERM)


def run(*command: str, home: Path) -> str:
    """Run a command of the virtual environment and return what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",  # never a cluster that ran, or runs, beside us
    }
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_plain(federation: Path) -> None:
    """Let a written federation sum without secure aggregation, and every merchant accept that."""
    path = federation / "contract.toml"
    contract = read_contract(path).revised(aggregation={"secure": False})
    path.write_text(contract_toml(contract))
    for file in federation.glob("merchants/*/merchant.toml"):
        text = file.read_text()
        accepted = text.replace("accept_unmasked_sums = false", "accept_unmasked_sums = true")
        assert accepted != text
        file.write_text(accepted)


@pytest.mark.parametrize("secure", [True, False], ids=["secure", "plain"])
def test_flwr_run_gives_the_model_that_simulate_gives(
    tmp_path: Path, flower_home: Path, secure: bool
) -> None:
    """Ray processes and the in-process grid end in byte-identical models for one seed.

    Any process may answer any message of a merchant: a session of secure sums lives in a file.
    """
    ours, flowers = tmp_path / "ours", tmp_path / "flowers"
    run(
        "hansa", "data", "generate", str(ours), "--preset", "smoke", "--merchants", "5",
        "--seed", "7", home=flower_home,
    )  # fmt: skip
    if not secure:
        make_plain(ours)
    shutil.copytree(ours, flowers)
    run("hansa", "simulate", "--data", str(ours), "--out", str(tmp_path / "out"), home=flower_home)
    printed = run(
        "flwr", "run", ".", "--run-config", f'federation="{flowers}"', "--federation-config",
        "num-supernodes=5 client-resources-num-cpus=1", "--stream", home=flower_home,
    )  # fmt: skip
    theirs = flowers / "bundle" / "model.safetensors"
    assert theirs.is_file(), printed
    assert theirs.read_bytes() == (tmp_path / "out" / "bundle" / "model.safetensors").read_bytes()
    assert "not for release" in (flowers / "bundle" / "privacy.json").read_text()
    told = json.loads((flowers / "bundle" / "privacy.json").read_text())
    assert told["secure_aggregation"] == secure
    for file in flowers.glob("merchants/*/merchant.toml"):
        key = read_members(flowers / "members.toml").keys[file.parent.name]
        kept = read_ledger(file.with_name("ledger.sqlite"), Budget(1.0, 1e-5), key)
        account = kept.account.runs[told["run"]]
        assert len(account.released) > 60
        assert kept.countersignatures  # by whatever process ran the ServerApp
        if secure:
            assert account.survivors == dict.fromkeys(account.released, 5)
            assert account.settled
        sealed = file.with_name("session.sealed")
        assert sealed.exists() == secure
        if secure:  # the last sum was unmasked: what was sent is kept, and no key
            identity = read_identity(file.parent.name, file.with_name("identity.key"))
            left = FileStore(sealed, identity).load()
            empty = State(left.context, left.number, Phase.OVER, b"", b"", left.own_advert)
            assert replace(left, replies={}) == empty
    heads = Witness(
        flowers / "server" / "witness.sqlite",
        read_identity("coordinator", flowers / "server" / "identity.key"),
    ).log()
    assert {head["merchant"] for head in heads} == {p.name for p in flowers.glob("merchants/*")}
    record = flowers / "server" / "runs" / told["run"]
    assert (record / "bundle" / "model.safetensors").read_bytes() == theirs.read_bytes()
