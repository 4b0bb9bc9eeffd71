"""Tests of the ClientApp: the right worker, and no word of an error."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from clients.app import create_app, merchant_file, worker_of_node
from clients.secure_party import SecureParty
from clients.session_store import MemoryStore
from clients.worker import Customers, Worker
from common.budget import Budget
from common.contract import Contract, contract_toml
from common.errors import (
    BudgetRefusal,
    DataError,
    LedgerError,
    PolicyError,
    ReplayRefusal,
    WitnessRefusal,
)
from common.identity import Identity, Members, write_identity, write_members
from common.network import initial_parameters
from common.plan import lattice_of, plan_of
from common.session import occasion_hash, session_context
from common.wire import (
    Advertise,
    Advertised,
    Attest,
    Attested,
    Confirm,
    Confirmed,
    Reveal,
    Revealed,
    Share,
    Shared,
    SumAnswer,
    SumRequest,
    pack,
    unpack,
)
from server.secure_sum import CoordinatorSession
from simulations.grid import InProcessGrid
from tests.witnessed import COORDINATOR, charges_of, latest, ledger_at, reserved, seen

SECRET = "customer-4711"  # noqa: S105


def exchange(find_worker: Any, kind: str, content: RecordDict) -> Message:
    """Send one message through the app and Flower's serialisation."""
    grid = InProcessGrid(create_app(find_worker), 1, {})
    (node,) = grid.get_node_ids()
    (message_id,) = grid.push_messages([Message(content, dst_node_id=node, message_type=kind)])
    (reply,) = grid.pull_messages([message_id])
    return reply


def worker_of(contract: Contract, folder: Path, secure: SecureParty | None = None) -> Worker:
    """Return a worker of five customers."""
    inputs = np.zeros((5, contract.inputs))
    customers = Customers(inputs, np.zeros(5, dtype=np.int64), np.arange(5) < 2)
    identity = secure.identity if secure else Identity.generate("shop")
    ledger = ledger_at(folder / "ledger.sqlite", identity, Budget(1.0, 1e-5))
    return Worker(
        identity.merchant, contract, customers, ledger, accept_unmasked_sums=True, secure=secure
    )


@pytest.fixture
def worker(contract: Contract, tmp_path: Path) -> Worker:
    """Give a worker whose contract has plain sums."""
    return worker_of(contract.revised(aggregation={"secure": False}), tmp_path)


def request_of(worker: Worker, stage: str) -> SumRequest:
    """Return a proper request for a plain sum, of a run that is reserved."""
    contract = worker.contract
    countersigned = b"" if contract.aggregation.secure else reserved(worker, "r")
    parameters = initial_parameters(contract)
    return SumRequest(
        "r", contract.sha256, stage, 1, 0, 1.0, 0, 0, b"", b"", countersigned, parameters
    )


class TestMessages:
    """What each message type gets."""

    def test_attest(self, worker: Worker) -> None:
        """The worker's answer comes back."""
        content = pack(Attest("r", worker.contract.sha256))
        reply = exchange(lambda _: worker, "query.attest", content)
        assert unpack(Attested, reply.content).merchant == "shop"

    def test_reservation(self, worker: Worker) -> None:
        """With plain sums the first message of a run brings a head, and no keys."""
        message = Advertise("r", worker.contract.sha256, 0, b"")
        reply = exchange(lambda _: worker, "query.advertise", pack(message))
        answer = unpack(Advertised, reply.content)
        assert (answer.merchant, answer.advert) == ("shop", b"")
        assert list(worker.ledger.account().runs) == ["r"]
        assert seen(worker.ledger, answer.head)

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
        answer = unpack(SumAnswer, reply.content)
        assert answer.refusal == ""
        assert answer.vector.size > 0

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("query.share", Share("r", "c" * 64, 1, b"", [])),
            ("query.confirm", Confirm(1, 1, b"")),
            ("query.reveal", Reveal(1, 1, b"", b"")),
        ],
    )
    def test_no_session_with_plain_sums(self, worker: Worker, kind: str, message: Any) -> None:
        """A contract without secure sums has no sessions."""
        if isinstance(message, Share):
            message = replace(message, contract=worker.contract.sha256)
        reply = exchange(lambda _: worker, kind, pack(message))
        assert reply.has_error()
        assert "has no secure sums" in reply.error.reason

    @pytest.mark.parametrize("kind", ["query.rows", "train", "query"])
    def test_unknown_kind(self, worker: Worker, kind: str) -> None:
        """A message type that the protocol lacks is an error."""
        reply = exchange(lambda _: worker, kind, pack(request_of(worker, "update")))
        assert reply.has_error()
        assert charges_of(worker.ledger) == {}


class TestSecureMessages:
    """A secure sum of two merchants, message by message."""

    @pytest.mark.parametrize(
        ("kind", "stage"),
        [
            ("query.census", "census"),
            ("train.update", "update"),
            ("evaluate.confusion", "evaluation"),
            ("query.profile", "profile"),
        ],
    )
    def test_one_step(self, contract: Contract, tmp_path: Path, kind: str, stage: str) -> None:
        """Every message of a session gets its answer, in every stage, and the sum comes out."""
        names = ["one", "two"]
        identities = [Identity.generate(name) for name in names]
        enrolled = Members({identity.merchant: identity.public for identity in identities})
        workers = [
            worker_of(
                contract,
                tmp_path / identity.merchant,
                SecureParty(identity, enrolled, 2, MemoryStore()),
            )
            for identity in identities
        ]
        server = CoordinatorSession(session_context("r", 1, contract.sha256), enrolled, 2)

        def told(number: int, kind: str, message: Any, answer: type[Any]) -> Any:
            reply = exchange(lambda _: workers[number], kind, pack(message))
            assert not reply.has_error(), reply.error.reason
            found = unpack(answer, reply.content)
            assert found.merchant == names[number]
            return found

        advertise = Advertise("r", contract.sha256, 1, b"")
        for k in range(2):
            advertised = told(k, "query.advertise", advertise, Advertised)
            seen(workers[k].ledger, advertised.head)
            server.take_advert(advertised.advert, names[k])
        roster = server.close_roster()
        for k in range(2):
            share = Share("r", contract.sha256, 1, latest(workers[k].ledger), roster)
            shared = told(k, "query.share", share, Shared)
            seen(workers[k].ledger, shared.head)
            server.take_escrow(k, shared.escrow)
        request = request_of(workers[0], stage)
        release = plan_of(contract).release_of(stage, 1, 60)
        assert release is not None
        server.begin(occasion_hash(stage, 1, 0, 1.0, request.parameters), release.length, np.uint32)
        sent = []
        for k in range(2):
            active, boxes = server.request(k)
            asked = replace(request, session=1, step=1, active=active, boxes=boxes)
            asked = replace(asked, countersigned=latest(workers[k].ledger))
            answer = told(k, kind, asked, SumAnswer)
            assert answer.refusal == ""
            assert seen(workers[k].ledger, answer.head)
            sent.append(answer.vector)
            server.take_masked(k, answer.vector, answer.escrow)
        confirm = Confirm(1, 1, server.close_sum())
        for k in range(2):
            found = told(k, "query.confirm", confirm, Confirmed)
            server.take_confirmations(k, found.confirmations)
        for k in range(2):
            reveal = Reveal(1, 1, *server.confirmations_for(k))
            server.take_shares(k, told(k, "query.reveal", reveal, Revealed).shares)
        total = server.total()
        assert np.any(total != sent[0] + sent[1])  # masks were on the vectors
        small = np.abs(lattice_of(release, contract).from_ring(total)) * 2.0**-31
        assert small.max() < 0.5  # and are off the sum, which keeps away from the ring's end
        for worker in workers:
            assert list(charges_of(worker.ledger)) == [(stage, 1, 0)]
            assert worker.ledger.account().runs["r"].survivors == {(stage, 1, 0): 2}

    def test_a_step_that_was_not_prepared_is_an_error(
        self, contract: Contract, tmp_path: Path
    ) -> None:
        """What is wrong with a step is told as an error, not as a refusal; nothing is charged."""
        identity = Identity.generate("one")
        party = SecureParty(identity, Members({"one": identity.public}), 2, MemoryStore())
        worker = worker_of(contract, tmp_path, party)
        reply = exchange(lambda _: worker, "train.update", pack(request_of(worker, "update")))
        assert reply.has_error()
        assert "no session under way" in reply.error.reason
        assert [entry.document["kind"] for entry in worker.ledger.entries()] == ["open"]


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
            LedgerError(f"/home/{SECRET}/ledger.sqlite: entry 17 was changed"),
        ],
        ids=lambda error: type(error).__name__,
    )
    @pytest.mark.parametrize("kind", ["query.attest", "train.update", "query.advertise"])
    def test_unexpected(
        self, error: Exception, kind: str, caplog: pytest.LogCaptureFixture, worker: Worker
    ) -> None:
        """Whatever fails, the server learns that it failed; the merchant's log says why."""

        def fail(_: Context) -> Worker:
            raise error

        messages = {
            "query.attest": Attest("r", "c"),
            "train.update": request_of(worker, "update"),
            "query.advertise": Advertise("r", "c", 1, b""),
        }
        content = pack(messages[kind])
        with caplog.at_level(logging.ERROR, logger="hansa.merchant"):
            reply = exchange(fail, kind, content)
        assert reply.has_error()
        assert "its own log says why" in reply.error.reason
        assert SECRET not in reply.error.reason
        assert "17" not in reply.error.reason
        assert SECRET in caplog.text

    @pytest.mark.parametrize("refusal", [BudgetRefusal, ReplayRefusal, WitnessRefusal])
    def test_refusals_are_told(self, refusal: type[LedgerError], worker: Worker) -> None:
        """Why a merchant does not reserve may be said: it speaks of messages and caps alone."""

        def refuse(_: Context) -> Worker:
            raise refusal("the run would bring this merchant to epsilon 2, its cap is 1")

        content = pack(Advertise("r", worker.contract.sha256, 0, b""))
        reply = exchange(refuse, "query.advertise", content)
        assert "its cap is 1" in reply.error.reason

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
        plain = contract.revised(aggregation={"secure": False})
        (tmp_path / "contract.toml").write_text(contract_toml(plain))
        (folder / "table.csv").write_text(
            "customer_id,spend,age,visits,member,plan,segment\n1,10,30,2,1,basic,low\n"
        )
        (folder / "merchant.toml").write_text(
            '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "table.csv"\n'
            "[policy]\nepsilon = 2.0\ndelta = 1e-6\n[simulation]\nseed = 3\n"
        )
        identity = Identity.generate("shop")
        write_identity(identity, folder / "identity.key")
        write_members(
            Members({"shop": identity.public}, COORDINATOR.public), tmp_path / "members.toml"
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
