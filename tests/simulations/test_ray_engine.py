"""The engine `ray`: what it refuses, what it numbers, and the same bytes as the engine `cohort`."""

import importlib.util
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import ServerApp

from clients.worker import Worker
from common.errors import BudgetRefusal, ContractError, RunError
from common.ledger_entries import read_ledger
from common.network import parameters_sha256
from common.wire import Attest, Attested
from server.outcome import Outcome, RoundReport
from simulations.datasets import load, write_federation
from simulations.engines import ENDED, Computing
from simulations.federation import assemble, open_federation
from simulations.grid import FIRST_NODE, InProcessGrid
from simulations.members import Federation
from simulations.ray_engine import _Coordinator, _NumberedGrid, refuse_without_ray
from simulations.rounds import run_rounds
from simulations.run import prepare_folder

ROOT = Path(__file__).parents[2]
RAY = Computing("ray", 2)
needs_ray = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="the extra `ray` is not installed"
    ),
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and files to the garbage collector
]
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "masked": {},
    "plain": {"aggregation": {"secure": False}, "training": {"mode": "local", "local_steps": 2}},
}


def federation_of(folder: Path, sums: str = "masked") -> Federation:
    """Return a small federation with seeded noise."""
    dataset = load("synthetic", preset="smoke", merchants=5)
    sections = {name: dict(section) for name, section in SECTIONS[sums].items()}
    sections["training"] = {"rounds": 2, "spare_rounds": 2, **sections.get("training", {})}
    sections["publication"] = {"evaluate_every": 2}
    folder.mkdir()
    return assemble(dataset, dataset.contract.revised(**sections), folder, seed=3)


def told(federation: Federation, outcome: Outcome) -> tuple[Any, ...]:
    """Return what a run ended in, but for its name and its signatures."""
    kinds = {}
    for member in federation.members:
        ledger = member.worker.ledger
        stored = read_ledger(ledger.path, ledger.budget, ledger.identity.public)
        kinds[member.merchant] = [entry.document["kind"] for entry in stored.entries]
    return (
        parameters_sha256(outcome.parameters),
        [one.total.tolist() for one in outcome.evaluations],
        outcome.cohorts,
        outcome.refusals,
        outcome.failures,
        kinds,
    )


def failed(make: Callable[[], Worker]) -> Worker:
    """Return a worker that cannot say whether it takes part."""

    def attest(_message: Attest) -> Attested:
        raise ZeroDivisionError

    worker = make()
    worker.attest = attest  # type: ignore[method-assign]
    return worker


def interrupting(process: int, make: Callable[[], Worker]) -> Worker:
    """Return a worker that interrupts a process and then answers, but not at once."""
    worker = make()
    attest = worker.attest

    def interrupt(message: Attest) -> Attested:
        os.kill(process, signal.SIGINT)
        time.sleep(2)
        return attest(message)

    worker.attest = interrupt  # type: ignore[method-assign]
    return worker


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Python find no Ray."""
    monkeypatch.setattr("simulations.ray_engine.find_spec", lambda _: None)


class TestRefusals:
    """What cannot run is refused before anything is written."""

    def test_ray_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The message says what to install."""
        without_ray(monkeypatch)
        with pytest.raises(ContractError, match=r"pip install 'hansa\[ray\]'"):
            refuse_without_ray(0)

    def test_the_command_writes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without Ray the command ends before it makes its folder."""
        from hansa.cli import app

        without_ray(monkeypatch)
        arguments = ["simulate", "--preset", "smoke", "--engine", "ray"]
        with pytest.raises(ContractError, match="--engine ray needs Ray"):
            app([*arguments, "--out", str(tmp_path / "out")], standalone_mode=False)
        assert not (tmp_path / "out").exists()

    def test_processes_of_a_cluster(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A running cluster has as many processes as it has processors."""
        monkeypatch.setattr("simulations.ray_engine.find_spec", lambda _: object())
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        with pytest.raises(ContractError, match="leave it out, or unset RAY_ADDRESS"):
            refuse_without_ray(2)
        monkeypatch.setenv("RAY_ADDRESS", "local")
        refuse_without_ray(2)

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "[::1]:1"])
    def test_nobody_answers(self, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
        """A wrong address is told at once; Ray would try for minutes."""
        monkeypatch.setattr("simulations.ray_engine.find_spec", lambda _: object())
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(RunError, match=r"RAY_ADDRESS: nobody answers at .*:1 "):
            refuse_without_ray(0)

    def test_faults(self, tmp_path: Path) -> None:
        """Flower carries the messages: nobody can lose one on purpose."""
        federation = federation_of(tmp_path / "f")
        with pytest.raises(ValueError, match="expected no fault"):
            run_rounds(federation, tmp_path / "f", lambda _: None, lambda _: None, RAY)


class FlowersGrid(InProcessGrid):
    """A grid whose nodes Flower numbered as it likes, and registers one after the other."""

    NUMBERS = (901, 77, 350)

    def __init__(self, reply: Callable[[Message], Message]) -> None:
        super().__init__(ClientApp(), len(self.NUMBERS), {})
        self.reply, self.looks = reply, 0
        self.messages: dict[str, Message] = {}

    def get_node_ids(self) -> Iterable[int]:
        """Return one more node at every look."""
        self.looks += 1
        return self.NUMBERS[: self.looks]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep the messages."""
        for message in messages:
            self.messages[str(len(self.messages))] = message
        return list(self.messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return a reply to each."""
        return [self.reply(self.messages[one]) for one in message_ids]


def failing(code: int, reason: str) -> Callable[[Message], Message]:
    """Return what replies with an error of Flower's."""
    return lambda message: Message(Error(code, reason), reply_to=message)


class TestNumberedGrid:
    """Node k is the k-th merchant, whatever number Flower gave it."""

    def test_numbers(self) -> None:
        """All nodes are waited for; a message goes to one node and names its merchant."""
        flowers = FlowersGrid(failing(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "no"))
        grid = _NumberedGrid(flowers, 3, threading.Event())
        nodes = list(grid.get_node_ids())
        assert nodes == [FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2]
        sent = grid.push_messages([Message(RecordDict(), node, "query.attest") for node in nodes])
        reached = [message.metadata for message in flowers.messages.values()]
        assert [to.dst_node_id for to in reached] == sorted(FlowersGrid.NUMBERS)
        assert [to.group_id for to in reached] == ["0", "1", "2"]
        assert len(list(grid.pull_messages(sent))) == 3

    @pytest.mark.parametrize(
        ("reason", "match"),
        [
            ("<class 'ray.exceptions.RayTaskError(ActorDiedError)'>:<'...'>", "enough memory"),
            ("Traceback:\n  ...\nModuleNotFoundError: No module named 'clients'\n", "No module"),
        ],
    )
    def test_the_engine_fails(self, reason: str, match: str) -> None:
        """A merchant that Ray could not ask ends the run; it is no merchant that failed."""
        grid = _NumberedGrid(FlowersGrid(failing(ErrorCode.UNKNOWN, reason)), 3, threading.Event())
        sent = grid.push_messages([Message(RecordDict(), FIRST_NODE, "query.attest")])
        with pytest.raises(RunError, match=match):
            grid.pull_messages(sent)

    def test_the_engine_ended(self) -> None:
        """Whoever still asks, or waits for nodes, is told to stop."""
        over = threading.Event()
        grid = _NumberedGrid(FlowersGrid(failing(0, "")), 3, over)
        over.set()
        with pytest.raises(RunError, match="ended before the run"):
            grid.pull_messages([])
        with pytest.raises(RunError, match="ended before the run"):
            _NumberedGrid(FlowersGrid(failing(0, "")), 4, over)


def test_what_the_coordinator_raises() -> None:
    """The very exception of the ServerApp comes back, from whatever thread."""
    server_app, error = ServerApp(), BudgetRefusal("spent")

    @server_app.main()
    def main(_grid: Any, context: Context) -> None:
        assert context.run_config == {"contract": "c"}
        raise error

    coordinator = _Coordinator(server_app, 1, {"contract": "c"})
    grid = FlowersGrid(failing(0, ""))
    context = Context(1, 1, {}, RecordDict(), {})
    thread = threading.Thread(target=lambda: coordinator.app(grid=grid, context=context))
    thread.start()
    thread.join()
    coordinator.end()
    with pytest.raises(BudgetRefusal) as raised:
        coordinator.raise_failure()
    assert raised.value is error


def test_a_worker_made_elsewhere(tmp_path: Path) -> None:
    """A merchant travels as bytes; what arrives is the same merchant with the same ledger."""
    federation = federation_of(tmp_path / "f")
    member = federation.members[1]
    sent = pickle.dumps(member.elsewhere)
    worker = pickle.loads(sent)()  # noqa: S301  # our own
    assert repr(member.elsewhere).count("private") == 0
    asked = Attest("run", federation.contract.sha256)
    assert worker.attest(asked) == Attested(member.merchant, "", True, 0)
    assert worker.ledger.path == member.worker.ledger.path.absolute()
    assert worker.ledger.identity.public == member.worker.ledger.identity.public
    worker.ledger.close()


def test_a_session_left_behind(tmp_path: Path) -> None:
    """The folder of a run that was killed may be overwritten, a merchant's own may not."""
    federation = federation_of(tmp_path / "f")
    (tmp_path / "f" / "contract.toml").write_text("")
    own = federation.members[0].worker.ledger.path.parent
    for name in ("session.sealed", ".session.sealed.lock", ".session.sealed.77"):
        (own / name).write_bytes(b"")
    prepare_folder(tmp_path / "f", overwrite=True)
    assert not own.exists()


class TestRay:
    """With a real Ray on this machine."""

    pytestmark = needs_ray

    @pytest.mark.parametrize("sums", SECTIONS)
    def test_same_bytes(self, tmp_path: Path, sums: str) -> None:
        """Model, evaluations, ledgers and reports of rounds are those of the engine cohort."""
        results, rounds = [], []
        for name, computing in (("cohort", Computing()), ("ray", RAY)):
            federation = federation_of(tmp_path / name, sums)
            seen: list[RoundReport] = []
            outcome = run_rounds(federation, tmp_path / name, seen.append, computing=computing)
            results.append(told(federation, outcome))
            rounds.append([(one.round, one.rounds, one.cohort, one.epsilon) for one in seen])
        assert results[1] == results[0]
        assert rounds[1] == rounds[0]
        assert not list(tmp_path.glob("ray/merchants/*/*session*"))

    def test_a_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Actors open the merchants' own files, wherever the command stands."""
        dataset = load("synthetic", preset="smoke", merchants=5)
        contract = dataset.contract.revised(training={"rounds": 2})
        write_federation(replace(dataset, contract=contract), tmp_path / "ray", seed=3)
        shutil.copytree(tmp_path / "ray", tmp_path / "cohort")
        monkeypatch.chdir(tmp_path)
        results = []
        for name, computing in (("cohort", Computing()), ("ray", RAY)):
            federation = open_federation(Path(name))
            out = tmp_path / "out" / name
            out.mkdir(parents=True)
            outcome = run_rounds(federation, out, lambda _: None, computing=computing)
            results.append(told(federation, outcome))
        assert results[1] == results[0]
        assert len(list(tmp_path.glob("ray/merchants/*/session.sealed"))) == 5

    def test_a_merchant_that_fails(self, tmp_path: Path) -> None:
        """The others go on; it is told in the same words, with the same number of its node."""
        results = []
        for name, computing in (("cohort", Computing()), ("ray", RAY)):
            federation = federation_of(tmp_path / name)
            *others, last = federation.members
            broken = replace(
                last, worker=failed(last.elsewhere), elsewhere=partial(failed, last.elsewhere)
            )
            federation = replace(federation, members=(*others, broken))
            outcome = run_rounds(federation, tmp_path / name, lambda _: None, computing=computing)
            results.append(told(federation, outcome))
            assert "ZeroDivisionError" in outcome.failures["node 6"]
            assert outcome.cohorts == [4, 4]
        assert results[1] == results[0]

    def test_an_error_of_the_caller(self, tmp_path: Path) -> None:
        """What is raised where rounds are reported comes out as it is."""

        def report(_report: RoundReport) -> None:
            raise BudgetRefusal("enough")

        federation = federation_of(tmp_path / "f")
        with pytest.raises(BudgetRefusal, match="enough"):
            run_rounds(federation, tmp_path / "f", report, computing=RAY)
        assert threads_left() == ["MainThread"]
        assert not list(tmp_path.glob("f/merchants/*/*session*"))

    def test_an_interrupt_while_an_actor_works(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ray ends after Flower's threads that wait for it: some would wait for ever."""
        import ray

        ends: list[list[str]] = []
        end = ray.shutdown

        def shutdown() -> None:
            names = (thread.name for thread in threading.enumerate())
            ends.append([name for name in names if name.startswith("ThreadPoolExecutor")])
            end()

        monkeypatch.setattr(ray, "shutdown", shutdown)
        federation = federation_of(tmp_path / "f")
        *others, last = federation.members
        slow = partial(interrupting, os.getpid(), last.elsewhere)
        federation = replace(federation, members=(*others, replace(last, elsewhere=slow)))
        with pytest.raises(KeyboardInterrupt):
            run_rounds(federation, tmp_path / "f", lambda _: None, computing=RAY)
        assert ends == [[], []]  # Flower ends it, and we make sure of it
        assert threads_left() == ["MainThread"]
        assert not list(tmp_path.glob("f/merchants/*/*session*"))

    @pytest.mark.parametrize("how", ["interrupt", "actor"])
    def test_nothing_is_left(self, tmp_path: Path, how: str) -> None:
        """Ctrl-C, or an actor that is killed, ends the command and every process of it."""
        mark = f"HANSA_TEST={tmp_path}"
        command = subprocess.Popen(
            [
                sys.executable, "-m", "hansa.cli", "simulate", "--preset", "smoke", "--merchants",
                "5", "--out", str(tmp_path / "out"), "--engine", "ray", "--processes", "2",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "HANSA_TEST": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            until(lambda: len(list(tmp_path.glob("out/merchants/*/session.sealed"))) == 5)
            if how == "interrupt":
                os.killpg(command.pid, signal.SIGINT)  # as a terminal does
            else:
                actor = min(number for number, title in processes(mark).items() if "Actor" in title)
                os.kill(actor, signal.SIGKILL)
            printed = command.communicate(timeout=120)[1]
        finally:
            command.kill()
            command.wait()
        if how == "interrupt":
            assert (command.returncode, "hansa: interrupted" in printed) == (130, True)
        else:
            assert (command.returncode, ENDED in printed) == (1, True), printed
        until(lambda: not processes(mark))
        assert not list(tmp_path.glob("out/merchants/*/*session*"))


def threads_left() -> list[str]:
    """Return the threads that keep this process alive."""
    return [thread.name for thread in threading.enumerate() if not thread.daemon]


def until(done: Callable[[], bool], limit_s: float = 180) -> None:
    """Wait until something is so."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


def processes(mark: str) -> dict[int, str]:
    """Return the processes whose environment has the mark."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found[int(process.name)] = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found
