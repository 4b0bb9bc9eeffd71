"""A small federation, and the coordinator run over the in-process grid."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from flwr.app import Context, Message

from clients.app import create_app
from clients.joining import customers_of
from clients.worker import Worker
from common.budget import Budget
from common.contract import Contract
from common.ledger import Ledger
from server.archive import open_archive
from server.coordinator import Coordinator
from server.outcome import Outcome, RoundReport
from simulations.datasets import Dataset, load
from simulations.federation import assemble
from simulations.grid import Fault, InProcessGrid
from simulations.members import Federation

MERCHANTS = 5

Answer = Callable[[Message, Context], Message]
Tamper = Callable[[Message, int, Answer], Message]  # (question, node's number, honest answer)
RunOverGrid = Callable[..., Outcome]
Federate = Callable[..., Federation]


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Generate five merchants of fifty customers."""
    return load("synthetic", preset="smoke", merchants=MERCHANTS)


@pytest.fixture
def secure(dataset: Dataset) -> Contract:
    """Give a contract of two rounds and secure sums; two of five merchants may be missing."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.02},
        model={"family": "linear"},
        training={"rounds": 2, "spare_rounds": 1},
        aggregation={"min_survivors": 3},
        publication={"evaluate_every": 1},
    )


@pytest.fixture
def plain(secure: Contract) -> Contract:
    """Give the same contract without secure sums: the coordinator sees single vectors."""
    return secure.revised(aggregation={"secure": False})


@pytest.fixture(params=["secure", "plain"])
def contract(request: pytest.FixtureRequest) -> Contract:
    """Give both contracts in turn."""
    found: Contract = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def federate(dataset: Dataset, tmp_path: Path) -> Federate:
    """Give the function that makes merchants; `caps` are the policies that differ."""

    def make(
        contract: Contract,
        *,
        seed: int | None = 7,
        caps: dict[int, float] | None = None,
        ledgers: str = "ledgers",
    ) -> Federation:
        federation = assemble(dataset, contract, tmp_path / ledgers, seed)
        members = list(federation.members)
        for number, cap in (caps or {}).items():
            member = members[number]
            party = member.worker._secure
            assert party is not None
            ledger = Ledger(
                tmp_path / "capped" / member.merchant / "ledger.sqlite",
                Budget(cap, contract.privacy.delta),
                party.identity,
                federation.enrolled.witness,
            )
            worker = Worker(
                member.merchant,
                contract,
                customers_of(federation.tables[member.merchant], contract),
                ledger,
                accept_unmasked_sums=True,
                secure=party,
            )
            members[number] = replace(member, worker=worker)
        return replace(federation, members=tuple(members))

    return make


@pytest.fixture
def run_over_grid() -> RunOverGrid:
    """Give the function that runs the coordinator; `tamper` may replace any merchant's answer."""

    def run(
        federation: Federation,
        *,
        tamper: Tamper | None = None,
        fault: Fault | None = None,
        on_round: Callable[[RoundReport], None] = lambda _report: None,
        grid_type: type[InProcessGrid] = InProcessGrid,
    ) -> Outcome:
        def number(context: Context) -> int:
            return int(context.node_config["partition-id"])

        honest = create_app(lambda context: federation.members[number(context)].worker)

        def answer(message: Message, context: Context) -> Message:
            if tamper is None:
                return honest(message, context)
            return tamper(message, number(context), lambda m, _c=None: honest(m, context))

        grid = grid_type(answer, len(federation.members), {}, fault)  # type: ignore[arg-type]
        archive = open_archive(federation.server)
        return Coordinator(grid, federation.contract, on_round, federation.enrolled, archive).run()

    return run
