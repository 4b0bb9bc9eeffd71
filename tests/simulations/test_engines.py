"""All engines give the same result, byte for byte, and merchants' errors are told alike."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context

from clients.app import create_app as create_client_app
from clients.handling import answered_together
from clients.worker import Worker
from common.contract import contract_toml
from common.errors import BudgetRefusal, RunError, SecureSumError
from common.identity import write_members
from common.ledger_entries import read_ledger
from common.network import parameters_sha256
from common.wire import Attest, pack
from server.app import create_app as create_server_app
from server.outcome import Outcome
from simulations.datasets import load
from simulations.engines import Computing, Engine, _sendable, running
from simulations.federation import assemble
from simulations.grid import run_in_process
from simulations.members import Federation
from simulations.rounds import run_rounds

MODES: dict[str, dict[str, dict[str, Any]]] = {
    "distributed": {},
    "local": {"training": {"mode": "local", "local_steps": 2}},
    "momentum": {"training": {"mode": "local", "local_steps": 2, "local_momentum": 0.9}},
    "adam": {
        "training": {
            "mode": "local",
            "local_steps": 2,
            "local_optimizer": "adam",
            "local_learning_rate": 0.01,
        }
    },
    "plain": {"aggregation": {"secure": False}},
    "opacus": {"training": {"engine": "opacus"}},
}


def federation_of(folder: Path, mode: str) -> Federation:
    """Return a small federation with seeded noise."""
    dataset = load("synthetic", preset="smoke", merchants=5)
    sections = {name: dict(section) for name, section in MODES[mode].items()}
    sections["training"] = {"rounds": 3, "spare_rounds": 2, **sections.get("training", {})}
    sections["publication"] = {"evaluate_every": 2}
    return assemble(dataset, dataset.contract.revised(**sections), folder, seed=3)


def one_by_one(federation: Federation, folder: Path) -> Outcome:
    """Run with every message answered by the ClientApp, as in a deployment."""
    outcomes: list[Outcome] = []

    def worker_of(context: Context) -> Worker:
        return federation.members[int(context.node_config["partition-id"])].worker

    (folder / "contract.toml").write_text(contract_toml(federation.contract), encoding="utf-8")
    write_members(federation.enrolled, folder / "members.toml")
    run_in_process(
        create_server_app(lambda _: None, lambda outcome, *_: outcomes.append(outcome)),
        create_client_app(worker_of),
        len(federation.members),
        {
            "contract": str(folder / "contract.toml"),
            "out": str(folder / "bundle"),
            "server": str(federation.server),
        },
    )
    return outcomes[0]


def released(federation: Federation) -> dict[str, list[str]]:
    """Return what every ledger says was released, but for the run's name and signatures."""
    found = {}
    for member in federation.members:
        ledger = member.worker.ledger
        stored = read_ledger(ledger.path, ledger.budget, ledger.identity.public)
        found[member.merchant] = [entry.document["kind"] for entry in stored.entries]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_same_bytes(tmp_path: Path, mode: str) -> None:
    """One by one, together, and over processes: model, evaluations and ledgers are the same."""
    results: dict[str, tuple[Any, ...]] = {}
    ways: dict[str, Callable[[Federation, Path], Outcome]] = {
        "one by one": one_by_one,
        "cohort": lambda f, out: run_rounds(f, out, lambda _: None),
        "process": lambda f, out: run_rounds(
            f, out, lambda _: None, computing=Computing("process", 2)
        ),
    }
    for name, run in ways.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        federation = federation_of(folder, mode)
        outcome = run(federation, folder)
        results[name] = (
            parameters_sha256(outcome.parameters),
            [one.total.tolist() for one in outcome.evaluations],
            outcome.cohorts,
            released(federation),
        )
    assert results["cohort"] == results["one by one"]
    assert results["process"] == results["one by one"]


@pytest.mark.parametrize("engine", ["cohort", "process"])
def test_refusals_are_told_alike(tmp_path: Path, engine: Engine) -> None:
    """Of what a merchant cannot answer the very error arrives, and the others are answered."""
    federation = federation_of(tmp_path, "distributed")
    workers = [member.worker for member in federation.members]
    right, wrong = (pack(Attest("run", sha)) for sha in (federation.contract.sha256, "00" * 32))
    with running(engine, workers, 2) as answers:
        given = answers("query.attest", [(0, right), (1, wrong), (4, right)])
        told = [one() for one in given]
        unknown = answers("query.nothing", [(2, right)])
    alone = answered_together("query.attest", [(workers[1], wrong)])[0]()
    assert dict(told[1]["hansa"]) == dict(alone["hansa"])
    assert len(told) == 3
    with pytest.raises(Exception, match=r"has no answer to 'query\.nothing'"):
        unknown[0]()


def test_a_process_that_ends(tmp_path: Path) -> None:
    """A process that is killed ends the run with a sentence that says what to do."""
    federation = federation_of(tmp_path, "distributed")
    workers = [member.worker for member in federation.members]
    asked = [(k, pack(Attest("run", federation.contract.sha256))) for k in range(5)]
    with running("process", workers, 2) as answers:
        answers("query.attest", asked)
        child = multiprocessing.active_children()[0]
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        with pytest.raises(RunError, match="--processes"):
            answers("query.attest", asked)


@pytest.mark.parametrize("error", [BudgetRefusal("spent"), SecureSumError("no"), RunError("x")])
def test_errors_cross_processes(error: Exception) -> None:
    """An error is the same one at the other end."""

    def give() -> Any:
        raise error

    sent = _sendable(give)
    assert type(sent) is type(error)
    assert str(sent) == str(error)


def test_an_error_that_cannot_be_sent() -> None:
    """Its name and text arrive all the same."""

    class Odd(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} {two}")

    def give() -> Any:
        raise Odd(1, 2)

    sent = _sendable(give)
    assert isinstance(sent, RunError)
    assert "1 2" in str(sent)


def test_numbers_do_not_depend_on_the_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups of two give what groups of 32 give."""
    models = []
    for size in (32, 2):
        monkeypatch.setattr("clients.cohort.AT_ONCE", size)
        folder = tmp_path / str(size)
        folder.mkdir()
        outcome = run_rounds(federation_of(folder, "local"), folder, lambda _: None)
        models.append(outcome.parameters)
    assert np.array_equal(*models)
