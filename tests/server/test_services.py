"""Tests of the operator's processes, the last ones with real ones over TLS on loopback."""

import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any

import pytest

from common.errors import ServiceError, SettingsError
from common.service_lock import state_of
from server.certificates import issue, make_tls, read_pair
from server.log_files import last_lines, rotate
from server.readiness import check_ready
from server.services import (
    NAMES,
    Moves,
    Places,
    answers,
    gateway_answers,
    pid_of,
    services,
    store_environment,
    store_for_run,
)
from server.settings import Settings, checked_settings
from tests.operated import make_operator

BIN = Path(sys.executable).parent


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give the settings of a new operator's folder."""
    return make_operator(tmp_path / "operator")


class Well(BaseHTTPRequestHandler):
    """Says that it is well."""

    def do_GET(self) -> None:
        """Answer `/health` with 200 and every other path with 404."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


@pytest.fixture
def well(tmp_path: Path) -> Iterator[tuple[tuple[str, int], Path]]:
    """Run a server that is well; give its address and the folder of its certificates."""
    make_tls(tmp_path / "tls", "test", ["example.org"])
    server = HTTPServer(("127.0.0.1", 0), Well)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls" / "server.crt", tmp_path / "tls" / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ("127.0.0.1", int(server.server_address[1])), tmp_path / "tls"
    server.shutdown()
    server.server_close()


class TestHealth:
    """Questions after health."""

    def test_an_answer_over_tls_is_health(self, well: tuple[tuple[str, int], Path]) -> None:
        """Whoever answers 200 with a certificate of our authority is well."""
        address, tls = well
        assert answers(address, tls)

    def test_another_status_is_no_health(self, well: tuple[tuple[str, int], Path]) -> None:
        """Not found is not well."""
        address, tls = well
        assert not answers(address, tls, "/other")

    def test_a_foreign_certificate_is_no_health(
        self, well: tuple[tuple[str, int], Path], tmp_path: Path
    ) -> None:
        """Somebody else on our port does not pass for ours."""
        make_tls(tmp_path / "others", "other", ["example.org"])
        assert not answers(well[0], tmp_path / "others")

    def test_nobody_is_no_health(self, settings: Settings) -> None:
        """A port without a listener is not well, and neither is a folder without certificates."""
        assert not gateway_answers(settings)
        assert not answers(("127.0.0.1", settings.port), settings.folder / "none")

    def test_a_process_that_is_stopped_does_not_move(self) -> None:
        """What sleeps and wakes up moves; after a SIGSTOP and a while it does not."""
        now = [0.0]
        loop = "import time\nwhile True: time.sleep(0.01)"
        with subprocess.Popen([sys.executable, "-c", loop]) as process:
            moves = Moves(lambda: process.pid, lambda: now[0])
            assert not moves()  # seen for the first time
            while not moves():
                time.sleep(0.02)
            process.send_signal(signal.SIGSTOP)
            while "T (stopped)" not in Path(f"/proc/{process.pid}/status").read_text("ascii"):
                time.sleep(0.02)
            moves()
            now[0] += 30
            assert moves()  # it may only be waiting for the SuperLink
            now[0] += 30
            assert not moves()
            process.kill()
        assert not moves()

    def test_a_new_process_must_move_anew(self) -> None:
        """What an earlier process did says nothing about the next one."""
        pids = iter([os.getpid(), 1, os.getpid(), None])
        moves = Moves(lambda: next(pids))
        assert [moves() for _ in range(4)] == [False] * 4

    def test_a_state_file_that_is_missing_or_half_written_names_nobody(
        self, tmp_path: Path
    ) -> None:
        """The process of a service is only known where the supervisor wrote it down."""
        assert pid_of(tmp_path, "superexec") is None
        for text in ("{", "{}", '{"children": {"superexec": {"pid": null}}}'):
            (tmp_path / "state.json").write_text(text, encoding="ascii")
            assert pid_of(tmp_path, "superexec") is None
        (tmp_path / "state.json").write_text('{"children": {"superexec": {"pid": 7}}}', "ascii")
        assert pid_of(tmp_path, "superexec") == 7


class TestCommands:
    """What is started."""

    def test_the_superlink_is_shut_to_the_outside(self, settings: Settings) -> None:
        """It listens on loopback, with TLS, and takes neither strange nodes nor strange tasks."""
        superlink = services(settings.folder, settings)[0].command
        words = " ".join(superlink)
        assert "--host 127.0.0.1" in words
        assert "--isolation process" in words
        assert {"--enable-supernode-auth", "--ssl-keyfile", "--superexec-auth-secret-file"} <= set(
            superlink
        )
        assert "--insecure" not in words

    def test_flower_keeps_its_files_in_the_folder(self, settings: Settings) -> None:
        """No process of Flower's writes to somebody's home, and none calls home."""
        for child in services(settings.folder, settings):
            assert Path(child.env["FLWR_HOME"]).is_relative_to(settings.folder)
            assert child.env["FLWR_TELEMETRY_ENABLED"] == "0"
            assert child.env["FLWR_DISABLE_UPDATE_CHECK"] == "1"
            assert child.log.is_relative_to(settings.logs)

    def test_no_secret_is_in_a_command(self, tmp_path: Path) -> None:
        """`ps` shows no password, and neither does a run's configuration."""
        url = "postgresql://hansa:s3cret@127.0.0.1/runs"
        settings = checked_settings({"database": url}, tmp_path)
        for child in services(tmp_path, settings):
            assert "s3cret" not in " ".join(child.command)
        assert store_for_run(settings) == "postgresql://hansa@127.0.0.1/runs"
        assert services(tmp_path, settings)[1].env["PGPASSWORD"] == "s3cret"
        assert "PGPASSWORD" not in services(tmp_path, settings)[2].env

    def test_a_store_in_a_file_needs_no_password(self, settings: Settings) -> None:
        """The default is told as it is."""
        assert store_for_run(settings) == settings.store_url
        assert store_environment(settings) == {}


class TestReadiness:
    """What must hold before the services are started."""

    def test_a_new_folder_is_ready(self, settings: Settings) -> None:
        """Nothing is missing in what `hansa server init` makes."""
        check_ready(settings.folder, settings)

    @pytest.mark.parametrize(
        "name",
        [
            "contract.toml",
            "tls/ca.crt",
            "tls/server.crt",
            "tls/server.key",
            "superlink/superexec.secret",
            "server/identity.key",
        ],
    )
    def test_a_missing_file_is_named(self, settings: Settings, name: str) -> None:
        """The message says which file is missing, and which command makes it."""
        (settings.folder / name).unlink()
        with pytest.raises(ServiceError, match=rf"{name}: is missing; first: hansa server init"):
            check_ready(settings.folder, settings)

    def test_an_empty_secret_is_noticed(self, settings: Settings) -> None:
        """A file that was truncated is not used."""
        (settings.folder / "superlink" / "superexec.secret").write_bytes(b"")
        with pytest.raises(ServiceError, match=r"superexec\.secret: is empty"):
            check_ready(settings.folder, settings)

    def test_a_key_that_others_can_read_is_refused(self, settings: Settings) -> None:
        """The message says how to put it right."""
        (settings.tls / "server.key").chmod(0o644)
        with pytest.raises(SettingsError, match="chmod 600"):
            check_ready(settings.folder, settings)

    def test_the_key_of_another_certificate_is_refused(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        """Key and certificate must belong together."""
        make_tls(tmp_path / "other", "other", ["127.0.0.1"])
        (settings.tls / "server.key").write_bytes((tmp_path / "other/server.key").read_bytes())
        with pytest.raises(SettingsError, match=r"is not the key of server\.crt"):
            check_ready(settings.folder, settings)

    def test_a_certificate_of_another_authority_is_refused(
        self, settings: Settings, tmp_path: Path
    ) -> None:
        """No merchant would accept it."""
        make_tls(tmp_path / "other", "other", ["127.0.0.1"])
        for name in ("server.crt", "server.key"):
            (settings.tls / name).write_bytes((tmp_path / "other" / name).read_bytes())
        with pytest.raises(ServiceError, match=r"is not signed by ca\.crt"):
            check_ready(settings.folder, settings)

    def test_an_expired_certificate_is_told_with_the_remedy(self, settings: Settings) -> None:
        """Nothing is started that every merchant would refuse."""
        old = issue(
            read_pair(settings.tls, "ca"), ["127.0.0.1"], datetime.now(UTC) - timedelta(days=500)
        )
        (settings.tls / "server.crt").write_bytes(old.pem)
        (settings.tls / "server.key").write_bytes(old.key_pem)
        with pytest.raises(ServiceError, match=r"server\.crt: expired on .* rotate .* --tls"):
            check_ready(settings.folder, settings)

    def test_a_clock_that_is_far_behind_is_noticed(self, settings: Settings) -> None:
        """Certificates that are not valid yet point to the clock."""
        with pytest.raises(ServiceError, match="is this machine's clock right"):
            check_ready(settings.folder, settings, datetime.now(UTC) - timedelta(days=30))

    @pytest.mark.parametrize("setting", ["port", "superlink_port", "metrics_port"])
    def test_a_taken_port_is_told_with_its_setting(self, settings: Settings, setting: str) -> None:
        """The message says who wanted the port and which key changes it."""
        port = getattr(settings, setting)
        with (
            closing(socket.create_server(("127.0.0.1", port))),
            pytest.raises(ServiceError, match=rf"127\.0\.0\.1:{port}: .* change {setting} in"),
        ):
            check_ready(settings.folder, settings)


class TestLogFiles:
    """Files that collect what services print."""

    def test_a_long_file_is_put_aside_and_goes_on(self, tmp_path: Path) -> None:
        """The process that writes needs not be told; older parts are kept, the oldest is not."""
        path = tmp_path / "superlink.log"
        with path.open("ab", buffering=0) as file:
            for number in range(5):
                file.write(f"part {number}\n".encode())
                assert rotate(path, limit_bytes=3, kept=3)
            file.write(b"end\n")
        assert path.read_text("ascii") == "end\n"
        kept = [(tmp_path / f"superlink.log.{n}").read_text("ascii") for n in (1, 2, 3)]
        assert kept == ["part 4\n", "part 3\n", "part 2\n"]
        assert not (tmp_path / "superlink.log.4").exists()

    def test_nothing_of_a_structured_log_is_lost(self, tmp_path: Path) -> None:
        """It is moved, and its writer makes a new one."""
        path = tmp_path / "services.jsonl"
        handler = WatchedFileHandler(path)
        for number in (1, 2):
            handler.emit(logging.LogRecord("x", 20, "", 0, f"line {number}", (), None))
            assert rotate(path, limit_bytes=3)
        handler.close()
        kept = [(tmp_path / f"services.jsonl.{n}").read_text("ascii") for n in (2, 1)]
        assert kept == ["line 1\n", "line 2\n"]

    def test_a_short_or_missing_file_stays(self, tmp_path: Path) -> None:
        """Nothing is done where nothing is too long."""
        (tmp_path / "a.log").write_text("short", "ascii")
        assert not rotate(tmp_path / "a.log")
        assert not rotate(tmp_path / "none.log")
        assert (tmp_path / "a.log").read_text("ascii") == "short"

    def test_the_end_of_a_log_is_told(self, tmp_path: Path) -> None:
        """The last lines, of a file of any length and of none."""
        path = tmp_path / "a.log"
        path.write_text("".join(f"line {n}\n" for n in range(100_000)), "ascii")
        assert last_lines(path, 2) == ["line 99998", "line 99999"]
        assert last_lines(tmp_path / "none.log") == []


def hansa(*words: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command with a home of its own."""
    return subprocess.run(
        [str(BIN / "hansa"), *words],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def processes(folder: Path) -> list[str]:
    """Return the commands of all processes that name a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command and int(process.name) != os.getpid():
            found.append(command)
    return found


def wait_for(what: Any, seconds: float = 120.0) -> None:
    """Wait until something holds; it must come."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.2)


def health(settings: Settings) -> tuple[int, dict[str, Any]]:
    """Return what the supervisor says of itself."""
    url = f"http://127.0.0.1:{settings.metrics_port}/health"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Give an empty home."""
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


@pytest.fixture
def started(settings: Settings, home: Path) -> Iterator[Settings]:
    """Start the services in the background."""
    done = hansa("server", "start", str(settings.folder), "--background", home=home)
    assert done.returncode == 0, done.stderr
    yield settings
    hansa("server", "stop", str(settings.folder), home=home)
    assert processes(settings.folder) == []


@pytest.mark.slow
class TestForReal:
    """SuperLink, SuperExec and gateway, real processes over real TLS."""

    def test_whatever_is_killed_comes_back(self, started: Settings, home: Path) -> None:
        """Each service is started again and healthy; nothing is written to anybody's home."""
        run = started.run_folder
        assert health(started)[0] == 200
        for name in NAMES:
            pid = pid_of(run, name)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

            def back(name: str = name, pid: int = pid) -> bool:
                state = (state_of(run) or {"children": {}})["children"][name]
                return state["pid"] not in {None, pid} and state["state"] == "running"

            wait_for(back)
        wait_for(lambda: gateway_answers(started))
        assert health(started) == (
            200,
            {
                "healthy": True,
                "services": dict.fromkeys(("superlink", "superexec", "gateway"), "running"),
            },
        )
        assert list(home.iterdir()) == []

    def test_a_service_that_hangs_is_killed_and_started_again(self, started: Settings) -> None:
        """A gateway that is stopped answers nobody, which is noticed."""
        pid = pid_of(started.run_folder, "gateway")
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        wait_for(lambda: pid_of(started.run_folder, "gateway") not in {None, pid})
        wait_for(lambda: gateway_answers(started))

    def test_a_second_start_and_a_run_too_early_are_refused(
        self, started: Settings, home: Path
    ) -> None:
        """Only one supervisor runs in a folder; the message says which process it is."""
        done = hansa("server", "start", str(started.folder), home=home)
        assert done.returncode == 2
        assert "the services run already (process" in done.stderr

    def test_a_supervisor_that_is_killed_leaves_nothing(self, started: Settings) -> None:
        """Its children end with it, whatever ends it."""
        state = state_of(started.run_folder)
        assert state is not None
        os.kill(state["pid"], signal.SIGKILL)
        wait_for(lambda: not processes(started.folder), 30)

    def test_a_port_conflict_leaves_nothing_running(self, settings: Settings, home: Path) -> None:
        """Exit code 2 with the port, and no process."""
        with closing(socket.create_server(("127.0.0.1", settings.superlink_port))):
            done = hansa("server", "start", str(settings.folder), "--background", home=home)
        assert done.returncode == 2
        assert f"127.0.0.1:{settings.superlink_port}" in done.stderr
        assert "Traceback" not in done.stderr
        assert processes(settings.folder) == []

    def test_a_service_that_cannot_start_is_named(self, settings: Settings, home: Path) -> None:
        """The message has the service and the end of its log, and nothing is left running."""
        (settings.folder / "contract.sig").write_text("00", "ascii")  # the gateway refuses that
        done = hansa("server", "start", str(settings.folder), "--background", home=home)
        assert done.returncode == 1
        assert "gateway" in done.stderr
        assert "contract.sig" in done.stderr
        assert processes(settings.folder) == []

    def test_files_of_the_services_are_the_owner_s(self, started: Settings) -> None:
        """Nobody else can read databases and logs."""
        places = Places(started.folder)
        for path in (
            places.flower_state,
            *started.logs.glob("*.log*"),
            *started.logs.glob("*.jsonl"),
        ):
            assert path.stat().st_mode & 0o077 == 0, path


def test_a_folder_without_settings_is_no_operators(tmp_path: Path, home: Path) -> None:
    """The message says which command makes it."""
    done = hansa("server", "start", str(tmp_path), home=home)
    assert done.returncode == 2
    assert "hansa server init" in done.stderr
