"""Tests of the ClientApp: the right worker, and no word of an error."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import create_app, merchant_file, worker_of_node
from clients.worker import Customers, Worker
from common.contract import Contract, contract_toml
from common.errors import DataError, PolicyError
from common.ledger import Budget, Ledger
from common.network import initial_parameters
from common.wire import Attest, SumRequest, pack, unpack_attested, unpack_sum_answer
from simulations.grid import InProcessGrid

SECRET = "customer-4711"  # noqa: S105


def exchange(find_worker: Any, kind: str, content: RecordDict) -> Message:
    """Send one message through the app and Flower's serialisation."""
    grid = InProcessGrid(create_app(find_worker), 1, {})
    (node,) = grid.get_node_ids()
    (message_id,) = grid.push_messages([Message(content, dst_node_id=node, message_type=kind)])
    (reply,) = grid.pull_messages([message_id])
    return reply


@pytest.fixture
def worker(contract: Contract, tmp_path: Path) -> Worker:
    """Give a worker of five customers."""
    inputs = np.zeros((5, contract.inputs))
    customers = Customers(inputs, np.zeros(5, dtype=np.int64), np.arange(5) < 2)
    ledger = Ledger(tmp_path / "ledger.sqlite", Budget(1.0, 1e-5))
    return Worker("shop", contract, customers, ledger, accept_unmasked_sums=True)


def request_of(worker: Worker, stage: str) -> SumRequest:
    """Return a proper request."""
    contract = worker.contract
    return SumRequest("r", contract.sha256, stage, 1, 0, 1.0, initial_parameters(contract))


class TestMessages:
    """What each message type gets."""

    def test_attest(self, worker: Worker) -> None:
        """The worker's answer comes back."""
        content = pack(Attest("r", worker.contract.sha256))
        reply = exchange(lambda _: worker, "query.attest", content)
        assert unpack_attested(reply.content).merchant == "shop"

    @pytest.mark.parametrize(
        ("kind", "stage"),
        [
            ("query.census", "census"),
            ("train.update", "update"),
            ("evaluate.confusion", "evaluation"),
            ("query.profile", "profile"),
        ],
    )
    def test_sums(self, worker: Worker, kind: str, stage: str) -> None:
        """Every stage of the coordinator is answered."""
        reply = exchange(lambda _: worker, kind, pack(request_of(worker, stage)))
        answer = unpack_sum_answer(reply.content)
        assert answer.refusal == ""
        assert answer.vector.size > 0

    @pytest.mark.parametrize("kind", ["query.rows", "train", "query"])
    def test_unknown_kind(self, worker: Worker, kind: str) -> None:
        """A message type that the protocol lacks is an error."""
        reply = exchange(lambda _: worker, kind, pack(request_of(worker, "update")))
        assert reply.has_error()
        assert worker.ledger.entries() == []


class TestNothingTold:
    """Errors reach the server without any text of the data."""

    @pytest.mark.parametrize(
        "error",
        [
            ValueError(SECRET),
            KeyError(SECRET),
            MemoryError(SECRET),
            DataError(f"{SECRET}.csv: row 17: the category is not in the contract"),
            PolicyError(f"/home/{SECRET}/merchant.toml: policy.epsilon: got {SECRET}"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("kind", ["query.attest", "train.update"])
    def test_unexpected(
        self, error: Exception, kind: str, caplog: pytest.LogCaptureFixture, worker: Worker
    ) -> None:
        """Whatever fails, the server learns that it failed; the merchant's log says why."""

        def fail(_: Context) -> Worker:
            raise error

        content = pack(Attest("r", "c") if kind == "query.attest" else request_of(worker, "update"))
        with caplog.at_level(logging.ERROR, logger="hansa.merchant"):
            reply = exchange(fail, kind, content)
        assert reply.has_error()
        assert "its own log says why" in reply.error.reason
        assert SECRET not in reply.error.reason
        assert "17" not in reply.error.reason
        assert SECRET in caplog.text

    def test_failing_computation(self, worker: Worker) -> None:
        """A label that breaks the computation is not told either."""
        worker._train = (worker._train[0], worker._train[1] + 4711)
        reply = exchange(lambda _: worker, "train.update", pack(request_of(worker, "update")))
        assert "its own log says why" in reply.error.reason
        assert "4711" not in reply.error.reason

    def test_wrong_messages_are_explained(self, worker: Worker) -> None:
        """What is wrong with the server's own message may be said."""
        content = RecordDict({"hansa": ConfigRecord({"protocol": 99})})
        reply = exchange(lambda _: worker, "train.update", content)
        assert "field 'protocol'" in reply.error.reason


class TestMerchantFile:
    """Which merchant a node speaks for."""

    @staticmethod
    def context(node: dict[str, Any], run: dict[str, Any]) -> Context:
        """Return a node's context."""
        return Context(1, 2, node, RecordDict(), run)

    def test_own_configuration_wins(self, tmp_path: Path) -> None:
        """The node's own file is taken, whatever the run configuration says."""
        node = {"merchant": "/own/merchant.toml", "partition-id": 0}
        found = merchant_file(self.context(node, {"federation": str(tmp_path)}))
        assert found == Path("/own/merchant.toml")

    def test_simulation(self, tmp_path: Path) -> None:
        """Node k speaks for the k-th merchant of the folder."""
        for name in ("b", "a"):
            (tmp_path / "merchants" / name).mkdir(parents=True)
            (tmp_path / "merchants" / name / "merchant.toml").touch()
        run = {"federation": str(tmp_path)}
        found = merchant_file(self.context({"partition-id": 1}, run))
        assert found.parent.name == "b"
        with pytest.raises(PolicyError, match="has 2 merchants"):
            merchant_file(self.context({"partition-id": 2}, run))

    @pytest.mark.parametrize("node", [{}, {"partition-id": 0}])
    def test_nobody(self, node: dict[str, Any]) -> None:
        """A node without a merchant says what to set."""
        with pytest.raises(PolicyError, match="speaks for no merchant"):
            merchant_file(self.context(node, {}))

    def test_seeded_noise_is_no_deployment(self, tmp_path: Path, contract: Contract) -> None:
        """A merchant whose noise can be guessed opens for nobody but a simulation."""
        folder = tmp_path / "merchants" / "shop"
        folder.mkdir(parents=True)
        (tmp_path / "contract.toml").write_text(contract_toml(contract))
        (folder / "table.csv").write_text(
            "customer_id,spend,age,visits,member,plan,segment\n1,10,30,2,1,basic,low\n"
        )
        (folder / "merchant.toml").write_text(
            '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "table.csv"\n'
            "[policy]\nepsilon = 2.0\ndelta = 1e-6\n[simulation]\nseed = 3\n"
        )
        node = {"merchant": str(folder / "merchant.toml")}
        with pytest.raises(PolicyError, match="makes the noise guessable"):
            worker_of_node(self.context(node, {}))
        simulated = self.context({"partition-id": 0}, {"federation": str(tmp_path)})
        assert worker_of_node(simulated).merchant == "shop"

    def test_worker_of_node_opens_it(self, tmp_path: Path) -> None:
        """A file that is not there is a `PolicyError`, at every message anew."""
        context = self.context({"merchant": str(tmp_path / "merchant.toml")}, {})
        for _ in range(2):
            with pytest.raises(PolicyError, match="no such merchant file"):
                worker_of_node(context)
