"""Tests of the node: a real SuperLink on one side, a real worker on the other."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from clients.handling import HANDLERS
from clients.joining import Opened
from clients.node import Node
from clients.places import Places
from clients.preparing import make_node_key
from clients.pulse import Pulse, read_pulse
from clients.worker import Worker
from clients.worker_link import WorkerLink
from clients.worker_service import WorkerService
from clients.worker_socket import bound
from common.contract import Contract
from common.wire import Attest, Attested, pack, unpack
from common.worker_wire import CHANNEL_OPTIONS, UNAVAILABLE
from tests.clients.test_app import worker_of
from tests.fleet_world import SuperLink, node_folder, running, until


@dataclass
class Merchant:
    """A merchant's node, worker and place at the SuperLink."""

    places: Places
    superlink: SuperLink
    worker: Worker
    public: bytes
    node_id: int = 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Serve its worker in a thread."""
        table: Any = None
        service = WorkerService(lambda: Opened(self.worker, table, None))
        server = grpc.server(ThreadPoolExecutor(8), options=CHANNEL_OPTIONS)
        with (
            bound(server, self.places.socket, None),
            running(lambda: service.serve(server), service.stop),
        ):
            yield

    @contextmanager
    def node(self, patience_s: float = 30.0) -> Iterator[None]:
        """Run its node in a thread."""
        link = WorkerLink(self.places.socket, patience_s)
        pulse = Pulse(self.places.node_state, frozenset(HANDLERS))
        node = Node(self.places, link, pulse, 0.2)
        with running(node.run, node.stop):
            yield
        pulse.close()
        link.close()

    def state(self) -> tuple[str, str]:
        """Return what the node says of itself."""
        found = read_pulse(self.places.node_state)
        return found.get("state", ""), found.get("reason", "")

    def until(self, state: str, words: str = "") -> None:
        """Wait until the node says that."""
        until(
            lambda: self.state()[0] == state and words in self.state()[1],
            f"{state} {words}, but {self.state()}",
        )

    def ask(self, run: int, kind: str = "query.attest", ttl: float = 60.0) -> Message:
        """Send a message, wait for the answer."""
        content = pack(Attest("r", self.worker.contract.sha256))
        sent = self.superlink.send(run, self.node_id, kind, content, ttl)
        return self.superlink.reply(run, sent)


@pytest.fixture
def merchant(contract: Contract, tmp_path_factory: pytest.TempPathFactory) -> Merchant:
    """Give a merchant that is registered."""
    folder = tmp_path_factory.mktemp("m")
    superlink = SuperLink(folder / "superlink")
    places, public = node_folder(folder / "shop", superlink)
    worker = worker_of(contract.revised(aggregation={"secure": False}), folder)
    return Merchant(places, superlink, worker, public, superlink.register(public))


class TestMessages:
    """What comes is answered."""

    def test_an_answer(self, merchant: Merchant, caplog: pytest.LogCaptureFixture) -> None:
        """The worker's answer comes back; the log has one line, without what was in it."""
        with (
            caplog.at_level("INFO", logger="hansa.node"),
            merchant.superlink.up(),
            merchant.working(),
            merchant.node(),
        ):
            merchant.until("connected")
            run = merchant.superlink.begin_run()
            reply = merchant.ask(run)
            assert unpack(Attested, reply.content).merchant == "shop"
            until(lambda: read_pulse(merchant.places.node_state)["messages"], "it is counted")
        (line,) = [vars(record) for record in caplog.records if hasattr(record, "ms")]
        assert (line["type"], line["run"], line["outcome"]) == ("query.attest", str(run), "answer")
        assert line["bytes_in"] > 0
        assert line["bytes_out"] > 0
        assert merchant.worker.contract.sha256 not in caplog.text
        assert merchant.state() == ("stopped", "")

    def test_an_error_and_then_an_answer(self, merchant: Merchant) -> None:
        """A message that the worker refuses is an error; the node goes on."""
        with merchant.superlink.up(), merchant.working(), merchant.node():
            merchant.until("connected")
            run = merchant.superlink.begin_run()
            reply = merchant.ask(run, "query.invented")
            assert "no answer to 'query.invented'" in reply.error.reason
            assert merchant.ask(run).has_content()

    def test_what_is_no_message_of_ours(self, merchant: Merchant) -> None:
        """Content of another protocol is refused by the worker, not by a crash."""
        with merchant.superlink.up(), merchant.working(), merchant.node():
            merchant.until("connected")
            run, node = merchant.superlink.begin_run(), merchant.node_id
            for content in (RecordDict(), RecordDict({"other": ConfigRecord({"a": 1})})):
                sent = merchant.superlink.send(run, node, "query.attest", content)
                assert "no such record" in merchant.superlink.reply(run, sent).error.reason
            assert merchant.ask(run).has_content()

    @pytest.mark.slow
    def test_the_worker_ends_and_comes_back(self, merchant: Merchant) -> None:
        """A message waits for a worker that is started again; not for ever."""
        with merchant.superlink.up(), ExitStack() as first:
            first.enter_context(merchant.working())
            with merchant.node(patience_s=1.0):
                merchant.until("connected")
                first.close()
                run = merchant.superlink.begin_run()
                assert merchant.ask(run).error.reason.startswith(UNAVAILABLE)
                with merchant.working():
                    assert merchant.ask(run).has_content()


class TestConnection:
    """A node never gives up, and says why it is not connected."""

    def test_no_worker_no_login(self, merchant: Merchant) -> None:
        """A node without a worker is not counted among those that take part."""
        with merchant.superlink.up(), merchant.node():
            merchant.until("waiting", "for its worker")
            with merchant.working():
                merchant.until("connected")

    def test_the_server_comes_late_and_goes(self, merchant: Merchant) -> None:
        """It connects when the server is there, and again after it was away."""
        with merchant.working(), merchant.node():
            merchant.until("disconnected", "cannot be reached")
            for _ in range(2):
                with merchant.superlink.up():
                    merchant.until("connected")
                    run = merchant.superlink.begin_run()
                    assert merchant.ask(run).has_content()
                merchant.until("disconnected")

    @pytest.mark.slow
    def test_revoked_and_let_in_again(self, merchant: Merchant) -> None:
        """It says that the server does not know it, and comes back with a new key."""
        with merchant.superlink.up(), merchant.working(), merchant.node():
            merchant.until("connected")
            merchant.superlink.revoke(merchant.node_id)
            merchant.until("disconnected", "does not know")
            merchant.until("disconnected", "revoked or replaced")
            content = make_node_key()
            key: Any = load_ssh_private_key(content, None)
            merchant.superlink.register(public_key_to_bytes(key.public_key()))
            merchant.places.node_key.write_bytes(content)
            merchant.until("connected")

    def test_two_nodes_with_one_key(self, merchant: Merchant) -> None:
        """The second one is not let in while the first one runs, and is when it has left."""
        copy = Places(merchant.places.folder.with_name("copy"))
        copy.run.mkdir(parents=True, mode=0o700)
        for name in ("node.key", "enrolment.json"):
            (copy.folder / name).write_bytes((merchant.places.folder / name).read_bytes())
            (copy.folder / name).chmod(0o600)
        second = Merchant(copy, merchant.superlink, merchant.worker, merchant.public)
        with merchant.superlink.up(), merchant.working(), second.working():
            with merchant.node():
                merchant.until("connected")
                with second.node():
                    second.until("disconnected", "another node uses this key")
                    assert merchant.ask(merchant.superlink.begin_run()).has_content()
            with second.node():
                second.until("connected")

    def test_files_that_a_person_puts_right(self, merchant: Merchant) -> None:
        """A key that is missing is said; the node goes on when it is there."""
        content = merchant.places.node_key.read_bytes()
        merchant.places.node_key.unlink()
        with merchant.superlink.up(), merchant.working(), merchant.node():
            merchant.until("disconnected", "there is no node key")
            merchant.places.node_key.touch(mode=0o600)
            merchant.places.node_key.write_bytes(content)
            merchant.until("connected")


class TestProcess:
    """The node as a process of its own."""

    def test_it_is_light(self) -> None:
        """It imports nothing that knows a row, a model or the ledger."""
        code = (
            "import sys, clients.node\n"
            "heavy = {'torch', 'pandas', 'opacus', 'pyarrow', 'sqlalchemy', 'dp_accounting',\n"
            "         'clients.worker', 'clients.table', 'clients.merchant', 'common.ledger'}\n"
            "print(sorted(heavy & set(sys.modules)))\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_it_ends_when_it_is_told_to(self, merchant: Merchant) -> None:
        """SIGTERM ends it at once, connected or not, with a line in its log."""
        process = subprocess.Popen(
            [sys.executable, "-m", "clients.node", str(merchant.places.folder)],
            stderr=subprocess.PIPE,
            text=True,
        )
        with merchant.working():
            merchant.until("disconnected", "cannot be reached")
            process.terminate()
            _, log = process.communicate(timeout=30)
        assert process.returncode == 0
        lines = [json.loads(line) for line in log.splitlines()]
        assert {line["component"] for line in lines} == {"node"}
        assert lines[-1]["message"] == "stopped"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    """A node without a folder to write in says so."""
    done = subprocess.run(
        [sys.executable, "-m", "clients.node", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
