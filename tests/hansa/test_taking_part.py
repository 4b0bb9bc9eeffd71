"""Tests of `hansa merchant join`, `leave` and of a merchant's processes."""

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from clients.enrolling import enrol, see_offer
from clients.merchant import read_merchant
from clients.node_user import prepare_for
from clients.places import Places
from clients.pulse import read_pulse
from clients.supervising import WorkerHealth, standing
from common.errors import HansaError, PolicyError
from common.supervision import state_of, stop
from hansa.cli import app
from hansa.commands import taking_part
from tests.clients.conftest import build_contract
from tests.enrolment_world import World, gateway, make_world, merchant_folder
from tests.fleet_world import until

TABLE = (
    "customer_id,spend,age,visits,member,plan,segment\n"
    + "".join(f"{k},10,30,2,1,basic,low\n" for k in range(20))
)  # fmt: skip


@dataclass
class Shop:
    """An enrolled merchant with a table."""

    world: World
    folder: Path

    @property
    def places(self) -> Places:
        """Where things are."""
        return Places(self.folder)

    def add(self, text: str) -> None:
        """Add to its file."""
        path = self.folder / "merchant.toml"
        path.write_text(path.read_text() + text)

    def child(self, name: str) -> dict[str, Any]:
        """Return what the supervisor says of a process."""
        state = state_of(self.places.run) or {"children": {}}
        found: dict[str, Any] = state["children"].get(name, {})
        return found

    def running(self, name: str, other_than: int = 0) -> int:
        """Wait until a process runs, and is another one than that."""

        def pid() -> int:
            found = self.child(name)
            known = found.get("state") == "running" and found["pid"] != other_than
            return int(found["pid"]) if known else 0

        return int(until(pid, f"{name} runs", 120))


@pytest.fixture
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    """Give a merchant that just enrolled; end its processes."""
    root = tmp_path_factory.mktemp("f")
    contract = build_contract(segments={"names": ["low", "high"]})
    with gateway(make_world(root / "operator", contract)) as world:
        world.clock.at = time.time()
        folder = merchant_folder(root / "shop")
        (folder / "customers.csv").write_text(TABLE)
        enrol(see_offer(world.token("shop"), folder), folder)
        yield Shop(world, folder)
    stop(folder / "run")


def hansa(*words: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, ["merchant", *map(str, words)])


class TestJoin:
    """What is refused before anything is started."""

    def test_not_enrolled(self, tmp_path: Path) -> None:
        """A merchant needs a token first."""
        folder = merchant_folder(tmp_path / "shop")
        done = hansa("join", folder)
        assert "is not enrolled yet" in str(done.exception)
        assert isinstance(done.exception, HansaError)

    def test_a_seed(self, shop: Shop) -> None:
        """Guessable noise takes part in nothing but a rehearsal."""
        shop.add("\n[simulation]\nseed = 3\n")
        done = hansa("join", shop.folder, "--background")
        assert "makes the noise guessable" in str(done.exception)
        assert state_of(shop.places.run) is None

    def test_a_newer_list(self, shop: Shop, tmp_path: Path) -> None:
        """A list that is not pinned is shown, and nothing is started."""
        other = merchant_folder(tmp_path / "other")
        enrol(see_offer(shop.world.token("other"), other), other)
        done = hansa("join", shop.folder, "--background")
        assert "added    other" in done.output
        assert "--accept-members" in str(done.exception)
        assert state_of(shop.places.run) is None

    def test_the_nodes_user_needs_root(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever is not root cannot start a process as somebody else."""
        shop.add('\n[node]\nuser = "nobody"\n')
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        done = hansa("join", shop.folder)
        assert isinstance(done.exception, PolicyError)
        assert "only root" in str(done.exception)

    def test_nobody_to_leave(self, shop: Shop) -> None:
        """Who does not take part cannot leave, and that is no error."""
        done = hansa("leave", shop.folder)
        assert done.exit_code == 0
        assert "did not take part" in done.output


@pytest.mark.slow
class TestProcesses:
    """A merchant's processes, started as a person starts them; its operator has no SuperLink."""

    def test_it_goes_on_trying(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is not connected yet says why, is left running, and ends with `leave`."""
        monkeypatch.setattr(taking_part, "_READY_S", 40.0)
        done = hansa("join", shop.folder, "--background", "--accept-members")
        assert done.exit_code == 1, done.output
        assert "not connected yet: disconnected: the operator's gateway answers" in done.output
        pids = [shop.running("worker"), shop.running("node")]
        assert "takes part already" in hansa("join", shop.folder, "--background").output
        assert shop.places.socket.stat().st_mode & 0o777 == 0o600
        assert "left" in hansa("leave", shop.folder).output
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "all are gone")
        assert standing(shop.places) == (False, "does not take part")

    def test_killed_and_stopped(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """A worker or node that is killed or stands still is started again."""
        monkeypatch.setattr(taking_part, "_READY_S", 1.0)
        hansa("join", shop.folder, "--background")
        for name in ("worker", "node"):
            first = shop.running(name)
            os.kill(first, signal.SIGKILL)
            second = shop.running(name, other_than=first)
            os.kill(second, signal.SIGSTOP)
            shop.running(name, other_than=second)
            assert shop.child(name)["restarts"] == 2

    def test_a_table_that_cannot_be_used(self, shop: Shop) -> None:
        """The worker's own words are told, and it is left trying."""
        (shop.folder / "customers.csv").write_text("customer_id,spend\n1,2\n")
        done = hansa("join", shop.folder, "--background")
        assert done.exit_code == 1
        assert "its worker is" in done.output
        assert "customers.csv" in done.output
        (shop.folder / "customers.csv").write_text(TABLE)
        shop.running("worker")
        until(lambda: read_pulse(shop.places.node_state)["state"] == "disconnected", "it tries")


class TestHealth:
    """Whether a worker is well."""

    def test_a_busy_worker_has_time(self) -> None:
        """One that said that it computes may be silent for a while; another may not."""
        now = 0.0
        found: dict[str, Any] | None = None
        health = WorkerHealth(lambda: found, clock=lambda: now)
        assert not health()
        found = {"state": "computing"}
        assert health()
        found, now = None, 10.0
        assert health()
        now = 20.0
        assert not health()
        found = {"state": "ready"}
        assert health()
        found = None
        assert not health()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
class TestNodeUser:
    """A user of the node's own."""

    def test_it_can_read_customers(self, shop: Shop) -> None:
        """A table that the node's user can read is refused."""
        for folder in (shop.folder, *shop.folder.parents):
            if folder.stat().st_mode & 0o001 == 0:
                folder.chmod(0o711)
        with pytest.raises(PolicyError, match=r"customers\.csv: the user 'nobody' .* must not"):
            prepare_for("nobody", shop.places, read_merchant(shop.places.merchant))

    def test_it_cannot_reach_its_key(self, shop: Shop) -> None:
        """A folder that it cannot pass through is said."""
        (shop.folder / "customers.csv").chmod(0o600)
        shop.folder.chmod(0o700)
        with pytest.raises(PolicyError, match=r"node\.key: the user 'nobody' .* cannot read"):
            prepare_for("nobody", shop.places, read_merchant(shop.places.merchant))
