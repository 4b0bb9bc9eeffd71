"""Tests of supervision, with real processes."""

import json
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from common.errors import NotReady, PolicyError, RunError, ServiceError
from common.service_lock import restart
from common.supervision import Child, Supervisor, start_in_background, state_of, stop
from tests.common.supervised import BEATING

SCRIPT = Path(__file__).parent / "supervised.py"
ROOT = SCRIPT.parent.parent.parent
SLEEPING = "import time\ntime.sleep(600)\n"
STUBBORN = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + BEATING
PATIENCE_S = 60.0


def until(question: Callable[[], Any], what: str) -> Any:
    """Wait until a question has a true answer; return it."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        answer = question()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"never: {what}")


def is_gone(pid: int) -> bool:
    """Tell whether a process has ended; one that nobody waited for has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Running:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, *children: dict[str, Any]) -> None:
        self.folder = folder
        spec = folder / "spec.json"
        spec.write_text(json.dumps(children))
        self.command = [sys.executable, str(SCRIPT), str(folder), str(spec)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.pids: set[int] = set()

    def child(self, name: str) -> dict[str, Any]:
        """Return what the state file says of a child."""
        state = state_of(self.folder) or {"children": {}}
        found: dict[str, Any] = state["children"].get(name, {})
        if found.get("pid"):
            self.pids.add(found["pid"])
        return found

    def running(self, name: str, other_than: int = 0) -> int:
        """Wait until a child runs, in a process other than that; return its id."""

        def pid() -> int:
            found = self.child(name)
            known = found.get("state") == "running" and found["pid"] != other_than
            return int(found["pid"]) if known else 0

        return int(until(pid, f"{name} runs"))

    def end(self) -> list[dict[str, Any]]:
        """End it; return its events."""
        self.process.terminate()
        assert self.process.stdout is not None
        lines = self.process.stdout.read().splitlines()
        self.process.stdout.close()
        self.process.wait(PATIENCE_S)
        return [json.loads(line) for line in lines]


Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Give a function that starts a supervisor; end what it left."""
    started: list[Running] = []

    def start(*children: dict[str, Any]) -> Running:
        started.append(Running(tmp_path, *children))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
        running.process.wait()
        if running.process.stdout is not None:
            running.process.stdout.close()
        for pid in running.pids:
            assert until(lambda pid=pid: is_gone(pid), f"{pid} is gone")


def beating(name: str, **more: Any) -> dict[str, Any]:
    """Return a child that shows that it is well."""
    return {"name": name, "code": BEATING.format(name=name), "beats": True, **more}


class TestRestarts:
    """What ended or hangs comes back."""

    @pytest.mark.slow
    def test_a_killed_child_is_started_again(self, run: Run) -> None:
        """Another process takes its place, and the state counts it."""
        supervisor = run({"name": "one", "code": SLEEPING})
        first = supervisor.running("one")
        os.kill(first, signal.SIGKILL)
        supervisor.running("one", other_than=first)
        state = supervisor.child("one")
        assert (state["restarts"], state["last_exit"]) == (1, -signal.SIGKILL)

    @pytest.mark.slow
    def test_a_stopped_child_is_noticed(self, run: Run) -> None:
        """One that shows no sign of health is killed and started again."""
        supervisor = run(beating("one"))
        first = supervisor.running("one")
        os.kill(first, signal.SIGSTOP)
        supervisor.running("one", other_than=first)
        events = [event["event"] for event in supervisor.end()]
        assert events == [
            "started", "healthy", "hung", "ended", "started", "healthy", "stopped",
        ]  # fmt: skip

    @pytest.mark.slow
    def test_a_child_that_never_gets_well(self, run: Run) -> None:
        """It is killed when its time to start is over."""
        supervisor = run({"name": "one", "code": SLEEPING, "beats": True, "start_s": 0.5})
        until(lambda: supervisor.child("one").get("restarts"), "started again")
        assert any("not healthy within 0.5 s" in str(event) for event in supervisor.end())

    @pytest.mark.slow
    def test_a_failing_child_is_put_off_and_says_why(self, run: Run) -> None:
        """The state has the last line of its log, and pauses grow."""
        code = "import sys\nprint('no such table')\nsys.exit(3)\n"
        supervisor = run({"name": "one", "code": code})
        until(lambda: supervisor.child("one").get("restarts", 0) >= 3, "started again")
        events = [event for event in supervisor.end() if event["event"] == "ended"]
        assert [event["again_in_s"] for event in events][:3] == [0.5, 1.0, 2.0]
        assert {(event["status"], event["reason"]) for event in events[:3]} == {
            (3, "no such table")
        }

    @pytest.mark.slow
    def test_a_program_that_is_not_there(self, tmp_path: Path) -> None:
        """It is a failure like any other, with the reason in the state."""
        events: list[dict[str, Any]] = []
        child = Child("one", (str(tmp_path / "none"),), tmp_path / "one.log")
        supervisor = Supervisor(tmp_path / "run", [child], events.append)

        def stop_later(event: dict[str, Any]) -> None:
            events.append(event)
            if event["event"] == "ended":
                supervisor.stop()

        supervisor = Supervisor(tmp_path / "run", [child], stop_later)
        assert supervisor.run() == 0
        assert "No such file" in str(events)

    def test_a_child_is_started_anew_on_demand(self, run: Run) -> None:
        """In good order; who is not there is not."""
        supervisor = run(beating("one"))
        first = supervisor.running("one")
        assert restart(supervisor.folder, "one")
        supervisor.running("one", other_than=first)
        assert not restart(supervisor.folder, "two")
        supervisor.end()
        assert not restart(supervisor.folder, "one")


class TestTogether:
    """Order, and the end of all."""

    def test_order(self, run: Run) -> None:
        """A child waits until the one that it needs is well."""
        supervisor = run(beating("first"), {"name": "second", "code": SLEEPING, "after": ["first"]})
        supervisor.running("second")
        told = [(event["event"], event["child"]) for event in supervisor.end()]
        assert told.index(("healthy", "first")) < told.index(("started", "second"))
        assert told.index(("stopped", "first")) < told.index(("stopped", "second"))

    def test_sigterm_ends_all(self, run: Run) -> None:
        """Children are gone, the lock is free, and the state file says so."""
        supervisor = run(beating("one"), beating("two"))
        pids = [supervisor.running("one"), supervisor.running("two")]
        supervisor.end()
        assert supervisor.process.returncode == 0
        assert all(is_gone(pid) for pid in pids)
        assert state_of(supervisor.folder) is None
        left = json.loads((supervisor.folder / "state.json").read_text())["children"]
        assert {child["state"] for child in left.values()} == {"stopped"}
        assert {child["pid"] for child in left.values()} == {None}

    def test_a_stopped_child_ends_too(self, run: Run) -> None:
        """SIGTERM reaches a process that stands still."""
        supervisor = run(beating("one", hang_s=60))
        pid = supervisor.running("one")
        os.kill(pid, signal.SIGSTOP)
        supervisor.end()
        assert is_gone(pid)

    @pytest.mark.slow
    def test_a_stubborn_child_is_killed(self, run: Run) -> None:
        """One that does not mind SIGTERM is killed after a while."""
        supervisor = run({"name": "one", "code": STUBBORN.format(name="one"), "beats": True})
        pid = supervisor.running("one")
        events = supervisor.end()
        assert events[-1] == {"event": "stopped", "child": "one", "status": -signal.SIGKILL}
        assert is_gone(pid)

    def test_children_die_with_a_killed_supervisor(self, run: Run) -> None:
        """Even kill -9 of the supervisor leaves nobody behind."""
        supervisor = run(beating("one"), {"name": "two", "code": SLEEPING})
        pids = [supervisor.running("one"), supervisor.running("two")]
        supervisor.process.kill()
        until(lambda: all(is_gone(pid) for pid in pids), "children are gone")
        assert until(lambda: state_of(supervisor.folder) is None, "the lock is free")

    def test_what_a_child_started_ends_with_it(self, run: Run, tmp_path: Path) -> None:
        """A grandchild is not left behind when its parent is killed."""
        code = (
            "import pathlib, subprocess, sys, time\n"
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
            "pathlib.Path(sys.argv[1], 'grandchild').write_text(str(child.pid))\n"
            "time.sleep(600)\n"
        )
        supervisor = run({"name": "one", "code": code})
        first = supervisor.running("one")
        grandchild = int(until(lambda: (tmp_path / "grandchild").is_file()
            and (tmp_path / "grandchild").read_text(), "a grandchild"))  # fmt: skip
        os.kill(first, signal.SIGKILL)
        assert until(lambda: is_gone(grandchild), "the grandchild is gone")

    def test_only_one_supervisor(self, run: Run, tmp_path: Path) -> None:
        """A second one is refused, with the process id of the first."""
        supervisor = run({"name": "one", "code": SLEEPING})
        supervisor.running("one")
        with pytest.raises(ServiceError, match=f"process {supervisor.process.pid} runs here"):
            Supervisor(tmp_path, [], print).run()
        assert supervisor.running("one")


class TestFromOutside:
    """Starting in the background, looking, stopping."""

    def test_nobody(self, tmp_path: Path) -> None:
        """Where nobody runs there is no state, and nothing to stop."""
        assert state_of(tmp_path) is None
        assert stop(tmp_path) is False

    def test_start_and_stop(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It goes on alone, in a session of its own, until it is stopped."""
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        spec = tmp_path / "spec.json"
        spec.write_text(json.dumps([beating("one")]))
        command = [sys.executable, str(SCRIPT), str(tmp_path), str(spec)]

        def ready() -> bool:
            state = state_of(tmp_path) or {"children": {}}
            return bool(state["children"].get("one", {}).get("state") == "running")

        pid = start_in_background(command, tmp_path, tmp_path / "log.jsonl", ready, PATIENCE_S)
        state = state_of(tmp_path)
        assert state is not None
        assert state["pid"] == pid == os.getsid(pid)
        with pytest.raises(ServiceError, match="runs here already"):
            start_in_background(command, tmp_path, tmp_path / "log.jsonl", ready, 1)
        assert stop(tmp_path) is True
        assert os.waitpid(pid, 0)[1] == 0
        assert is_gone(state["children"]["one"]["pid"])

    def test_it_ends_at_once(self, tmp_path: Path) -> None:
        """The error has the last line of its log."""
        command = [sys.executable, "-c", "raise SystemExit('no settings')"]
        with pytest.raises(RunError, match="no settings"):
            start_in_background(command, tmp_path, tmp_path / "log", lambda: False, PATIENCE_S)

    def test_it_is_not_ready_in_time(self, tmp_path: Path) -> None:
        """It is left running, and the error says so."""
        command = [sys.executable, "-c", SLEEPING]
        with pytest.raises(NotReady, match="was not ready") as caught:
            start_in_background(command, tmp_path, tmp_path / "log", lambda: False, 0.2)
        pid = int(str(caught.value).partition("process ")[2].partition(")")[0])
        assert not is_gone(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


class TestUsers:
    """A child as another user of the operating system."""

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
    def test_as_another_user(self, run: Run) -> None:
        """It has that user's rights and still dies with its supervisor."""
        supervisor = run({"name": "one", "command": ["sleep", "600"], "user": "nobody"})
        pid = supervisor.running("one")
        uid = pwd.getpwnam("nobody").pw_uid
        until(lambda: Path(f"/proc/{pid}").stat().st_uid == uid, "it runs as nobody")
        supervisor.process.kill()
        assert until(lambda: is_gone(pid), "it is gone")

    def test_not_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever is not root is told that this cannot be."""
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        child = Child("node", ("true",), tmp_path / "log", user="nobody")
        with pytest.raises(PolicyError, match="only root can start"):
            Supervisor(tmp_path, [child], print)
