"""Tests of the worker behind its socket."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from clients.flower_records import content_from_bytes, content_to_bytes
from clients.joining import Opened
from clients.places import Places
from clients.worker import Worker
from clients.worker_link import WorkerLink
from clients.worker_service import WorkerService
from clients.worker_socket import bound
from common.contract import Contract
from common.errors import DataError, PolicyError, ServiceError
from common.service_lock import locked
from common.wire import Attest, Attested, pack, unpack
from common.worker_wire import CHANNEL_OPTIONS, UNAVAILABLE
from tests.clients.test_app import worker_of
from tests.fleet_world import running, until


def going_on() -> bool:
    """Wait for as long as it takes."""
    return True


@contextmanager
def served(
    places: Places, open_merchant: Callable[[], Opened], patience_s: float = 30.0
) -> Iterator[WorkerLink]:
    """Serve a merchant in a thread; give the way to it."""
    service = WorkerService(open_merchant)
    server = grpc.server(ThreadPoolExecutor(8), options=CHANNEL_OPTIONS)
    with bound(server, places.socket, None), running(lambda: service.serve(server), service.stop):
        link = WorkerLink(places.socket, patience_s)
        yield link
        link.close()


def opened(worker: Worker) -> Opened:
    """Return a merchant whose worker it is."""
    table: Any = None  # a worker's service never looks at it
    return Opened(worker, table, None)


@pytest.fixture
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Give a merchant's folder, with a short path."""
    found = Places(tmp_path_factory.mktemp("m"))
    found.run.mkdir(mode=0o700)
    return found


@pytest.fixture
def worker(contract: Contract, tmp_path: Path) -> Worker:
    """Give a worker whose contract has plain sums."""
    return worker_of(contract.revised(aggregation={"secure": False}), tmp_path)


class TestAnswers:
    """What comes back over the socket."""

    def test_an_answer(self, places: Places, worker: Worker) -> None:
        """The worker's answer, as the in-process app would give it."""
        content = content_to_bytes(pack(Attest("r", worker.contract.sha256)))
        with served(places, lambda: opened(worker)) as link:
            answer = link.ask("query.attest", content, 30, going_on)
        assert answer.error is None
        found = unpack(Attested, content_from_bytes(answer.content))
        assert (found.merchant, found.refusal) == ("shop", "")

    @pytest.mark.parametrize(
        ("kind", "content", "words"),
        [
            ("query.rows", content_to_bytes(pack(Attest("r", "c"))), "no answer to 'query.rows'"),
            ("query.share", content_to_bytes(pack(Attest("r", "c"))), "field 'type'"),
            ("query.attest", b"\xff\xff", "cannot be read"),
        ],
    )
    def test_errors(
        self, places: Places, worker: Worker, kind: str, content: bytes, words: str
    ) -> None:
        """What is wrong with a message is told; the next one is answered."""
        with served(places, lambda: opened(worker)) as link:
            assert words in str(link.ask(kind, content, 30, going_on).error)
            content = content_to_bytes(pack(Attest("r", worker.contract.sha256)))
            assert link.ask("query.attest", content, 30, going_on).error is None

    def test_budget(self, places: Places, worker: Worker) -> None:
        """What the ledger adds up to, and nothing else."""
        with served(places, lambda: opened(worker)) as link:
            until(lambda: (link.health() or {}).get("state") == "ready", "it is ready")
            assert link.budget() == {"epsilon": 0.0, "cap": 1.0, "delta": 1e-5}

    def test_log_has_no_content(
        self, places: Places, worker: Worker, caplog: pytest.LogCaptureFixture
    ) -> None:
        """One line a message: run, type, time, sizes."""
        content = content_to_bytes(pack(Attest("run-17", worker.contract.sha256)))
        with (
            caplog.at_level("INFO", logger="hansa.worker"),
            served(places, lambda: opened(worker)) as link,
        ):
            link.ask("query.attest", content, 30, going_on)
        (line,) = [vars(record) for record in caplog.records if hasattr(record, "ms")]
        assert (line["run"], line["type"], line["outcome"]) == ("run-17", "query.attest", "answer")
        assert line["bytes_out"] > 0


class TestHealth:
    """Who answers while the worker has no time."""

    def test_while_opening(self, places: Places, worker: Worker) -> None:
        """It is well, and says that it cannot answer yet; a message is told so after a while."""
        may_open = threading.Event()

        def open_merchant() -> Opened:
            assert may_open.wait(60)
            return opened(worker)

        with served(places, open_merchant, patience_s=0.5) as link:
            found = until(link.health, "an answer")
            assert found["state"] == "opening"
            answer = link.ask("query.attest", b"", 30, going_on)
            assert str(answer.error).startswith(UNAVAILABLE)
            may_open.set()
            found = until(
                lambda: (found := link.health()) and found["state"] == "ready" and found, "ready"
            )
            assert (found["merchant"], found["contract"]) == ("shop", worker.contract.sha256)

    def test_nobody(self, places: Places) -> None:
        """Where no worker is, there is no health, and a message is told so."""
        link = WorkerLink(places.socket, patience_s=0.2)
        assert link.health(0.5) is None
        assert link.budget() is None
        answer = link.ask("query.attest", b"", 30, going_on)
        assert answer.error == f"{UNAVAILABLE}: it cannot be reached"
        link.close()

    def test_leaving(self, places: Places) -> None:
        """Whoever asks may give up."""
        link = WorkerLink(places.socket)
        assert str(link.ask("query.attest", b"", 30, lambda: False).error).startswith(UNAVAILABLE)
        link.close()

    def test_it_cannot_be_opened(self, places: Places) -> None:
        """What is wrong with the merchant's files ends the service."""

        def broken() -> Opened:
            raise DataError("table.csv: is empty")

        service = WorkerService(broken)
        server = grpc.server(ThreadPoolExecutor(2))
        with bound(server, places.socket, None), pytest.raises(DataError, match="is empty"):
            service.serve(server)
        assert not places.socket.exists()


class TestSocket:
    """Who can reach it, and what may be in its way."""

    def test_mode(self, places: Places, worker: Worker) -> None:
        """It is its owner's alone."""
        with served(places, lambda: opened(worker)):
            assert places.socket.stat().st_mode & 0o777 == 0o600
        assert not places.socket.exists()

    def test_a_killed_worker_left_one(self, places: Places, worker: Worker) -> None:
        """A stale socket is taken away."""
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(places.socket))
        with served(places, lambda: opened(worker)) as link:
            assert until(link.health, "an answer")

    def test_something_else_is_there(self, places: Places) -> None:
        """Nothing but a socket is ever removed, nor is a link followed."""
        places.socket.symlink_to(places.folder / "merchant.toml")
        with (
            pytest.raises(ServiceError, match="no socket"),
            bound(grpc.server(ThreadPoolExecutor(1)), places.socket, None),
        ):
            raise AssertionError
        assert places.socket.is_symlink()

    def test_others_may_write_into_the_folder(self, places: Places) -> None:
        """Somebody else could put a socket there."""
        places.run.chmod(0o777)
        with (
            pytest.raises(ServiceError, match="chmod go-w"),
            bound(grpc.server(ThreadPoolExecutor(1)), places.socket, None),
        ):
            raise AssertionError

    def test_too_long(self, tmp_path: Path) -> None:
        """The kernel takes 107 bytes."""
        with (
            pytest.raises(PolicyError, match="shorter path"),
            bound(grpc.server(ThreadPoolExecutor(1)), tmp_path / ("x" * 100), None),
        ):
            raise AssertionError

    def test_an_unknown_user(self, places: Places) -> None:
        """A user that is not there is said."""
        with (
            pytest.raises(PolicyError, match="no user 'nobody-at-all'"),
            bound(grpc.server(ThreadPoolExecutor(1)), places.socket, "nobody-at-all"),
        ):
            raise AssertionError


def command(folder: Path, *options: str) -> list[str]:
    """Return the command of a worker."""
    return [sys.executable, "-m", "clients.worker_service", str(folder), *options]


class TestProcess:
    """The worker as a process of its own."""

    @pytest.mark.slow
    def test_seeded_noise_is_no_deployment(self, places: Places) -> None:
        """A merchant whose noise can be guessed opens for a rehearsal alone."""
        places.merchant.write_text(
            '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "table.csv"\n'
            "[policy]\nepsilon = 2.0\ndelta = 1e-6\n[simulation]\nseed = 3\n"
        )
        done = subprocess.run(
            command(places.folder), capture_output=True, text=True, timeout=60, check=False
        )
        line = json.loads(done.stderr.splitlines()[-1])
        assert done.returncode == 2
        assert "makes the noise guessable" in line["message"]

    def test_only_one(self, places: Places) -> None:
        """A second worker for the same folder is refused, and says who is there."""
        with locked(places.run, "worker.lock"):
            done = subprocess.run(
                command(places.folder), capture_output=True, text=True, timeout=60, check=False
            )
        assert done.returncode == 2
        assert f"process {os.getpid()}" in done.stderr
