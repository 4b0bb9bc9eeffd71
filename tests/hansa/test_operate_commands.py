"""Tests of `hansa server start, stop, run, resume, status`, the slow ones with real processes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from hansa.cli import app
from hansa.commands.verdict import tell_ending
from server.following import Ending
from server.runs import RunState, RunStore
from server.settings import Settings
from tests.operated import make_operator

BIN = Path(sys.executable).parent


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give the settings of a new operator's folder."""
    return make_operator(tmp_path / "operator")


def invoke(*words: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, ["server", *words], env={"COLUMNS": "160"})


def hansa(*words: str) -> "subprocess.CompletedProcess[str]":
    """Run a command in a process of its own."""
    return subprocess.run(
        [str(BIN / "hansa"), "server", *words],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


class TestWithoutServices:
    """What is said where nothing runs."""

    @pytest.mark.parametrize("command", ["run", "resume"])
    def test_a_run_needs_services(self, settings: Settings, command: str) -> None:
        """Exit code 2, and the command that starts them."""
        done = hansa(command, str(settings.folder))
        assert done.returncode == 2
        assert f"hansa server start {settings.folder} --background" in done.stderr

    def test_there_is_nothing_to_stop(self, settings: Settings) -> None:
        """That is no error."""
        done = invoke("stop", str(settings.folder))
        assert done.exit_code == 0
        assert "no services run" in done.output

    def test_status_is_told_all_the_same(self, settings: Settings) -> None:
        """What is there is shown, and what is not."""
        done = invoke("status", str(settings.folder))
        assert done.exit_code == 0
        assert "services: none run" in done.output

    def test_status_goes_to_machines_too(self, settings: Settings, tmp_path: Path) -> None:
        """A file, or the terminal alone; both keep the schema."""
        schema = json.loads((files("hansa") / "schemas/status.schema.json").read_text("utf-8"))
        assert (
            invoke("status", str(settings.folder), "--json", str(tmp_path / "s.json")).exit_code
            == 0
        )
        jsonschema.validate(json.loads((tmp_path / "s.json").read_text("utf-8")), schema)
        done = hansa("status", str(settings.folder), "--json", "-")
        jsonschema.validate(json.loads(done.stdout), schema)
        assert "services: none run" in done.stderr

    def test_a_damaged_server_toml_is_named(self, settings: Settings) -> None:
        """Exit code 2, no traceback."""
        (settings.folder / "server.toml").write_text("port = ", "ascii")
        done = hansa("start", str(settings.folder))
        assert done.returncode == 2
        assert "server.toml" in done.stderr
        assert "Traceback" not in done.stderr


class TestVerdict:
    """What is said at the end."""

    def test_a_finished_run_tells_its_bundle_and_its_privacy(
        self, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Epsilon at delta, for whom, and every note of the statement."""
        told = {
            "epsilon": 0.97121,
            "delta": 1e-5,
            "unit_of_privacy": "one customer",
            "notes": ["n"],
        }
        (tmp_path / "privacy.json").write_text(json.dumps(told), "utf-8")
        store = RunStore(settings.store_url)
        store.begin("r1", "c0ffee", 2, "1").finish(tmp_path)
        tell_ending(settings.folder, "r1", Ending(store.row("r1")))
        printed = capsys.readouterr().out
        assert f"bundle {tmp_path}" in printed
        assert "epsilon 0.9713 at delta 1e-05, for one customer" in printed

    @pytest.mark.parametrize(
        ("end", "expected", "told"),
        [
            ("fail", True, "failed: too few"),
            ("stop", True, "stopped: too few"),
            (None, False, "the coordinator ended unexpectedly; continue with: hansa server resume"),
        ],
    )
    def test_whatever_did_not_finish_ends_with_1(
        self,
        settings: Settings,
        capsys: pytest.CaptureFixture[str],
        end: str | None,
        expected: bool,
        told: str,
    ) -> None:
        """With the run's own reason, and how to go on."""
        store = RunStore(settings.store_url)
        lease = store.begin("r1", "c0ffee", 2, "1")
        if end is not None:
            getattr(lease, end)("too few")
        with pytest.raises(Exception) as ending:  # noqa: PT011  # typer's own, of click
            tell_ending(settings.folder, "r1", Ending(store.row("r1"), expected))
        assert getattr(ending.value, "exit_code", None) == 1
        printed = capsys.readouterr().err
        assert told in printed
        assert f"hansa server resume {settings.folder} r1" in printed

    def test_a_run_that_never_began_points_to_the_logs(
        self, settings: Settings, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """There is nothing to resume."""
        with pytest.raises(Exception) as ending:  # noqa: PT011
            tell_ending(settings.folder, "r1", Ending(None, expected=False))
        assert getattr(ending.value, "exit_code", None) == 1
        assert "ended before it began" in capsys.readouterr().err


@pytest.fixture
def started(settings: Settings) -> Iterator[Settings]:
    """Start the services in the background."""
    done = hansa("start", str(settings.folder), "--background")
    assert done.returncode == 0, done.stderr
    yield settings
    hansa("stop", str(settings.folder))


def until_waiting(process: "subprocess.Popen[str]") -> str:
    """Read what a run says until it waits for merchants; return the run's name."""
    assert process.stdout is not None
    run = ""
    for line in process.stdout:
        run = line.split()[1] if line.startswith("run ") else run
        if "waits for" in line:
            return run
    raise AssertionError(process.stderr and process.stderr.read())


def began(settings: Settings, *words: str) -> "subprocess.Popen[str]":
    """Begin a run, or go on with one, and follow it in a process."""
    return subprocess.Popen(
        [str(BIN / "hansa"), "server", words[0], str(settings.folder), *words[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


def coordinator(settings: Settings) -> int:
    """Return the process of the coordinator."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.endswith(b"/flwr-serverapp") for word in words) and (
            f"127.0.0.1:{settings.superlink_port}".encode() in words
        ):
            return int(process.name)
    raise AssertionError("no coordinator runs")


def last_run(settings: Settings) -> Any:
    """Return the newest run."""
    return RunStore(settings.store_url).last()


@pytest.mark.slow
class TestRuns:
    """Runs that wait for merchants who never come: everything but the rounds."""

    def test_too_few_merchants_fail_with_the_reason(self, started: Settings) -> None:
        """The limit of --wait holds, and the verdict is the run's own."""
        done = hansa("run", str(started.folder), "--wait", "3")
        assert done.returncode == 1
        assert "waits for 3 more merchants" in done.stdout
        assert "failed: 0 of 0 merchants take part" in done.stderr
        assert last_run(started).state == RunState.FAILED

    def test_a_second_run_is_refused(self, started: Settings) -> None:
        """While the first one waits; ending the follower leaves the run going."""
        with began(started, "run", "--wait", "120") as process:
            run = until_waiting(process)
            done = hansa("run", str(started.folder))
            assert done.returncode == 2
            assert f"run {run} is under way" in done.stderr
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 130
            assert "the run goes on" in out
        row = last_run(started)
        assert row.run == run
        assert RunStore(started.store_url).is_alive(row)

    def test_stop_ends_the_run_first_and_it_can_be_resumed(self, started: Settings) -> None:
        """Its follower ends with 1; after a new start the same run goes on."""
        with began(started, "run", "--wait", "120") as process:
            run = until_waiting(process)
            done = hansa("stop", str(started.folder))
            assert done.returncode == 0
            assert f"hansa server resume {started.folder} {run}" in done.stdout
            _, err = process.communicate(timeout=120)
            assert process.returncode == 1
            assert "stopped" in err
        assert last_run(started).state == RunState.STOPPED
        assert hansa("start", str(started.folder), "--background").returncode == 0
        with began(started, "resume") as process:
            assert until_waiting(process) == f"{run}:"
            assert last_run(started).epoch == 2
            process.terminate()

    def test_a_killed_coordinator_is_noticed_and_resumed(self, started: Settings) -> None:
        """The follower says how to go on; the run is taken up under its own name."""
        with began(started, "run", "--wait", "600") as process:
            run = until_waiting(process)
            os.kill(coordinator(started), signal.SIGKILL)
            _, err = process.communicate(timeout=240)
            assert process.returncode == 1
            assert "the coordinator ended unexpectedly; continue with: hansa server resume " in err
        with began(started, "resume", run) as process:
            until_waiting(process)
            row = last_run(started)
            assert (row.run, row.epoch) == (run, 2)
            process.terminate()

    def test_resume_right_after_a_kill_waits_for_silence(self, started: Settings) -> None:
        """A coordinator that was killed a moment ago may still count as alive."""
        with began(started, "run", "--wait", "600") as process:
            run = until_waiting(process)
            os.kill(coordinator(started), signal.SIGKILL)
            process.terminate()
        with began(started, "resume", run) as process:
            assert process.stdout is not None
            assert "to be sure that the old coordinator is gone" in process.stdout.readline()
            until_waiting(process)
            process.terminate()

    def test_status_shows_a_run_that_waits(self, started: Settings) -> None:
        """With its message, while the services are healthy."""
        with began(started, "run", "--wait", "120") as process:
            until_waiting(process)
            until = time.monotonic() + 60
            while not re.search(r"waits for 3 more", hansa("status", str(started.folder)).stdout):
                assert time.monotonic() < until
            process.terminate()
