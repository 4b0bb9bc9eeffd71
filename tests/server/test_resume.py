"""A coordinator that dies at any moment, and a second process that takes the run up.

Every run here has seeded noise, so that a run that was broken off and taken up must end in the
very model of a run that nobody disturbed, and must have cost the same.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from audit.verify import verify
from clients.app import create_app
from clients.evidence import Books, write_books
from clients.worker import Worker
from common.contract import Contract
from common.errors import ArchiveError, RunError
from common.events import to_document
from common.identity import Members
from common.ledger_entries import read_ledger
from common.plan import CENSUS, EVALUATION, PROFILE, UPDATE
from common.wire import SumRequest, unpack
from server.archive import Archive, open_archive
from server.attendance import Enrolled
from server.circumstances import Circumstances, Stopped
from server.coordinator import Coordinator
from server.evidence import coordinator_evidence
from server.outcome import Outcome
from server.publishing import publish
from simulations.datasets import Dataset
from simulations.federation import assemble
from simulations.grid import FIRST_NODE, Fault, InProcessGrid
from simulations.members import Federation

RUN = "00c0ffee00c0ffee"
SUMS = [(CENSUS, 0), (UPDATE, 1), (EVALUATION, 1), (PROFILE, 1)]
Occasion = tuple[str, int, int]


class Crash(BaseException):
    """The coordinator's process is dead: nothing in it may handle this."""


@dataclass
class Clock:
    """Counts what happens, and ends the process at a moment."""

    end_at: int | None = None
    moments: list[str] = field(default_factory=list)

    def tick(self, what: str) -> None:
        """Die here if it is time."""
        self.moments.append(what)
        if len(self.moments) - 1 == self.end_at:
            raise Crash(what)


@dataclass
class Memory:
    """Keeps checkpoints for as long as the test lasts; the process may die at each side of one."""

    clock: Clock
    run: str = RUN
    kept: list[bytes] = field(default_factory=list)
    told: list[tuple[int, float, int]] = field(default_factory=list)
    stop: bool = False

    @property
    def checkpoint(self) -> bytes | None:
        """Return the last one."""
        return self.kept[-1] if self.kept else None

    def save(self, checkpoint: bytes, *, round: int, epsilon: float, cohort: int) -> None:
        """Keep one."""
        self.clock.tick("before a save")
        self.kept.append(checkpoint)
        self.told.append((round, epsilon, cohort))
        self.clock.tick("after a save")

    def beat(self, message: str | None = None) -> bool:
        """Say whether to stop."""
        del message
        return self.stop

    def attendance(self, states: Mapping[str, tuple[str, str]]) -> None:
        """Look at nothing."""


class DyingGrid(InProcessGrid):
    """Lets the coordinator die when a merchant has answered and nobody has heard of it."""

    clock: Clock
    deployment: "Deployment"

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes of the merchants that are there."""
        here = self.deployment.here
        return [node for node in self.contexts if here is None or node - FIRST_NODE in here]

    def _reply(self, message: Message, answer: Callable[[], Message]) -> Message:
        reply = super()._reply(message, answer)
        self.clock.tick(f"after {message.metadata.dst_node_id} answered")
        return reply


@dataclass
class Deployment:
    """Merchants that live on, and coordinators that do not."""

    federation: Federation
    enrolled: Members | None = None
    present: set[int] | None = None  # numbers of the merchants that are there; None: all
    late: int | None = None  # number of one that comes when `arrived` says so
    arrived: bool = False
    fault: Fault | None = None
    kept: list[bytes] = field(default_factory=list)
    processes: int = 0

    @property
    def archive(self) -> Archive:
        """Open the coordinator's folder."""
        return open_archive(self.federation.server)

    @property
    def lines(self) -> list[dict[str, Any]]:
        """Return the run's record, as it is on the disk."""
        path = self.federation.server / "runs" / RUN / "run.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    @property
    def recorded(self) -> list[Occasion]:
        """Return the sums that the record tells of."""
        return [
            (line["stage"], line["round"], line["attempt"])
            for line in self.lines
            if line["kind"] == "sum"
        ]

    def charged(self, number: int) -> dict[Occasion, dict[str, Any]]:
        """Return what a merchant's ledger holds of the run."""
        member = self.federation.members[number]
        run = member.worker.ledger.account().runs.get(RUN)
        released = {} if run is None else run.released
        return {what: to_document(charge.event) for what, charge in released.items()}

    @property
    def here(self) -> set[int] | None:
        """Return the numbers of the merchants that can be reached."""
        come = {self.late} if self.arrived and self.late is not None else set[int]()
        return None if self.present is None else self.present | come

    def process(
        self, clock: Clock | None = None, *, stop: bool = False, keeper: Memory | None = None
    ) -> Outcome:
        """Let one process carry the run on, to its end or its own."""
        clock = clock or Clock()
        self.processes += 1

        def worker_at(context: Context) -> Worker:
            number = int(context.node_config["partition-id"])
            return self.federation.members[number].worker

        grid = DyingGrid(create_app(worker_at), len(self.federation.members), {}, self._fate)
        grid.clock = clock
        grid.deployment = self
        members = self.enrolled or self.federation.enrolled
        keeper = keeper or Memory(clock, kept=self.kept, stop=stop)
        circumstances = Circumstances(keeper, Enrolled())
        return Coordinator(
            grid,
            self.federation.contract,
            lambda _report: None,
            members,
            self.archive,
            circumstances,
        ).run()

    def _fate(self, message: Message) -> str | None:
        return None if self.fault is None else self.fault(message)

    def survive(self, moments: Iterator[int]) -> Outcome:
        """Carry the run to its end; each process dies at the next of some moments."""
        for moment in moments:
            try:
                return self.process(Clock(moment))
            except Crash:
                continue
        return self.process()

    def findings(self, outcome: Outcome, folder: Path) -> set[str]:
        """Publish, hand everything to an auditor, and return the grave findings."""
        archive, federation = self.archive, self.federation
        publish(outcome, federation.contract, folder / "bundle", archive.identity.key)
        archive.keep_bundle(RUN, folder / "bundle")
        return audited(self, folder / "evidence")

    def check_whole(self, outcome: Outcome, undisturbed: Outcome) -> None:
        """Check that a run is what it would have been, and that it cost no more."""
        assert outcome.parameters.tobytes() == undisturbed.parameters.tobytes()
        assert outcome.document == undisturbed.document
        assert self.recorded == [(*what, 0) for what in SUMS]
        assert [line["kind"] for line in self.lines].count("end") == 1
        self.check_covered(outcome)

    def check_covered(self, outcome: Outcome) -> None:
        """Check that every charge is counted, in the outcome and in the record."""
        counted = dict(
            zip(outcome.occasions, (to_document(e) for _, e in outcome.events), strict=True)
        )
        asked = {
            (line["stage"], line["round"], line["attempt"]): {*line["asked"]}
            for line in self.lines
            if line["kind"] == "sum"
        }
        assert sorted(asked) == sorted(counted)
        assert len(asked) == len(self.recorded)
        for number, member in enumerate(self.federation.members):
            for what, event in self.charged(number).items():
                assert counted[what] == event
                assert member.merchant in asked[what]


def audited(deployment: Deployment, folder: Path) -> set[str]:
    """Return the codes of what an auditor finds grave in everybody's evidence."""
    federation = deployment.federation
    coordinator_evidence(deployment.archive, federation.enrolled, folder / "server.zip")
    for member in federation.members:
        ledger = member.worker.ledger
        run = ledger.account().runs.get(RUN)
        if run is not None and not run.settled:
            ledger.settle(RUN)
        stored = read_ledger(ledger.path, ledger.budget, ledger.identity.public)
        books = Books(stored, federation.enrolled, (federation.contract,), 2)
        write_books(books, ledger.identity, folder / "merchants" / f"{member.merchant}.zip")
    found = verify([folder]).findings
    return {finding.code for finding in found if finding.severity == "fail"}


@pytest.fixture
def small(secure: Contract) -> Contract:
    """Give a contract of one round for three merchants, of whom one may be missing."""
    return secure.revised(
        federation={"min_merchants": 3, "round_timeout_s": 0.01},
        training={"rounds": 1, "spare_rounds": 3},
        aggregation={"min_survivors": 2},
    )


Deploy = Callable[..., Deployment]


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """Give a folder that no disk slows down: what dies here are objects, not machines."""
    memory = Path("/dev/shm")  # noqa: S108
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def deploy(dataset: Dataset, small: Contract, in_memory: Path) -> Deploy:
    """Give the function that makes a deployment of three merchants, or more."""
    made = 0

    def make(contract: Contract = small, count: int = 3, **options: Any) -> Deployment:
        nonlocal made
        made += 1
        few = replace(dataset, merchants=dict([*dataset.merchants.items()][:count]))
        federation = assemble(few, contract, in_memory / str(made), 7)
        return Deployment(federation, **options)

    return make


@pytest.fixture
def whole(deploy: Deploy) -> tuple[Outcome, list[str]]:
    """Give the outcome of a run that nobody disturbs, and what happened in it."""
    clock = Clock()
    outcome = deploy().process(clock)
    return outcome, clock.moments


def at_stage(kind: str, number: int) -> Fault:
    """Return a fault: what is asked of a merchant at a stage is lost."""

    def fault(message: Message) -> str | None:
        to, what = message.metadata.dst_node_id - FIRST_NODE, message.metadata.message_type
        return "silent" if (to, what) == (number, kind) else None

    return fault


class TestAnyMoment:
    """The coordinator dies once, or again and again."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("first", "step"),
        [(0, 5), *(pytest.param(first, 5, marks=pytest.mark.slow) for first in range(1, 5))],
    )
    def test_every_single_moment(
        self,
        deploy: Deploy,
        whole: tuple[Outcome, list[str]],
        in_memory: Path,
        first: int,
        step: int,
    ) -> None:
        """After every answer and at both sides of every checkpoint, the run goes on."""
        undisturbed, moments = whole
        assert len(moments) > 60
        for moment in range(first, len(moments), step):
            deployment = deploy()
            outcome = deployment.survive(iter([moment]))
            assert deployment.processes == 2, moments[moment]
            deployment.check_whole(outcome, undisturbed)
        assert deployment.findings(outcome, in_memory / "out") == set()

    @pytest.mark.slow
    def test_both_sides_of_every_checkpoint(
        self, deploy: Deploy, whole: tuple[Outcome, list[str]], in_memory: Path
    ) -> None:
        """What was noted before a checkpoint is written once, by whoever comes next."""
        undisturbed, moments = whole
        saves = [n for n, what in enumerate(moments) if "save" in what]
        assert len(saves) >= 2 * (2 + 2 * len(SUMS))
        for moment in saves:
            deployment = deploy()
            outcome = deployment.survive(iter([moment]))
            deployment.check_whole(outcome, undisturbed)
            if moment in saves[1::6]:
                folder = in_memory / f"out-{moment}"
                assert deployment.findings(outcome, folder) == set()

    @pytest.mark.slow
    @pytest.mark.parametrize("step", [1, 3])
    def test_again_and_again(
        self, deploy: Deploy, whole: tuple[Outcome, list[str]], in_memory: Path, step: int
    ) -> None:
        """Each process comes a little further than the one before, and then it dies as well."""
        deployment = deploy()
        outcome = deployment.survive(iter(range(0, 1000, step)))
        assert deployment.processes > 5
        deployment.check_whole(outcome, whole[0])
        assert deployment.findings(outcome, in_memory / "out") == set()

    @pytest.mark.slow
    def test_plain_sums(self, deploy: Deploy, small: Contract, in_memory: Path) -> None:
        """The same where the coordinator sees single vectors."""
        contract = small.revised(aggregation={"secure": False})
        clock = Clock()
        undisturbed = deploy(contract).process(clock)
        for moment in range(1, len(clock.moments), 4):
            deployment = deploy(contract)
            outcome = deployment.survive(iter([moment]))
            deployment.check_whole(outcome, undisturbed)
        assert deployment.findings(outcome, in_memory / "out") == set()


class TestOtherMerchants:
    """The merchants of the second process are not those of the first."""

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["query.census", "query.confirm", "query.reveal"])
    @pytest.mark.parametrize("lost", ["before", "after"])
    def test_other_survivors(self, deploy: Deploy, in_memory: Path, kind: str, lost: str) -> None:
        """A merchant is silent to one process only: all charges are counted, the run ends."""
        deployment = deploy(count=4)
        clock = Clock()
        deploy(count=4).process(clock)
        for moment in (9, 16, 22):  # in set-up and census
            deployment = deploy(count=4)
            fault = at_stage(kind, 1)
            deployment.fault = fault if lost == "before" else None
            with pytest.raises(Crash):
                deployment.process(Clock(moment))
            deployment.fault = fault if lost == "after" else None
            outcome = deployment.process()
            deployment.check_covered(outcome)
            assert outcome.cohorts[0] >= 3
        assert deployment.findings(outcome, in_memory / "out") == set()

    def test_split_survivors(self, deploy: Deploy, in_memory: Path) -> None:
        """Members that confirmed one set to the first process refuse another: a new attempt."""
        deployment = deploy(count=4, fault=at_stage("query.census", 1))
        clock = Clock()
        deploy(count=4, fault=at_stage("query.census", 1)).process(clock)
        saves = [n for n, what in enumerate(clock.moments) if what == "after a save"]
        confirmed = saves[2] + 3 + 2  # three vectors, and two of three confirmations
        with pytest.raises(Crash, match="answered"):
            deployment.process(Clock(confirmed))
        deployment.fault = None
        outcome = deployment.process()
        deployment.check_covered(outcome)
        assert outcome.occasions[:3] == [(CENSUS, 0, 0), (CENSUS, 0, 1), (UPDATE, 1, 0)]
        assert outcome.survivors[:2] == [None, 4]
        assert deployment.findings(outcome, in_memory / "out") == set()

    def test_a_revoked_merchant_is_gone(self, deploy: Deploy) -> None:
        """Who was revoked meanwhile is asked nothing more; what it paid is counted."""
        moments = Clock()
        deploy(count=4).process(moments)
        saves = [n for n, what in enumerate(moments.moments) if what == "after a save"]
        deployment = deploy(count=4)
        with pytest.raises(Crash):
            deployment.process(Clock(saves[2] + 4))  # all four paid for the census
        names = [member.merchant for member in deployment.federation.members]
        enrolled = deployment.federation.enrolled
        fewer = {name: key for name, key in enrolled.keys.items() if name != names[1]}
        deployment.enrolled = Members(fewer, enrolled.witness)
        with pytest.raises(Crash):
            deployment.process(Clock(9))  # in the new set-up, which is checkpointed
        outcome = deployment.process()
        deployment.check_covered(outcome)
        assert deployment.charged(1).keys() == {(CENSUS, 0, 0)}
        (first, *later) = [line for line in deployment.lines if line["kind"] == "sum"]
        assert first["asked"] == names
        assert first["merchants"] is None
        assert all(names[1] not in line["asked"] for line in later)

    @pytest.mark.parametrize("mode", ["secure", "plain"])
    def test_too_few_are_left_for_the_profile(
        self, deploy: Deploy, small: Contract, mode: str
    ) -> None:
        """A run can end without its profile, not without the record of who paid for it."""
        contract = small.revised(aggregation={"secure": mode == "secure"})
        moments = Clock()
        deploy(contract).process(moments)
        saves = [n for n, what in enumerate(moments.moments) if what == "before a save"]
        deployment = deploy(contract)
        with pytest.raises(Crash):
            deployment.process(Clock(saves[-2] - 1))  # the profile is there, and not written down
        assert (PROFILE, 1, 0) in deployment.charged(0)
        enrolled = deployment.federation.enrolled
        first = deployment.federation.members[0].merchant
        deployment.enrolled = Members({first: enrolled.keys[first]}, enrolled.witness)
        outcome = deployment.process()
        assert outcome.profile is None
        deployment.check_covered(outcome)


class TestEnds:
    """How a process ends without dying."""

    def test_a_run_that_is_stopped_goes_on(
        self, deploy: Deploy, whole: tuple[Outcome, list[str]]
    ) -> None:
        """It is asked to, says so, and a later process takes it up."""
        deployment = deploy()
        with pytest.raises(Crash):
            deployment.process(Clock(20))
        with pytest.raises(Stopped, match="can go on from its last checkpoint"):
            deployment.process(stop=True)
        deployment.check_whole(deployment.process(), whole[0])

    def test_a_process_that_was_overtaken_writes_nothing(self, deploy: Deploy) -> None:
        """A checkpoint that is refused leaves the record as the other process wrote it."""
        deployment = deploy()
        with pytest.raises(Crash):
            deployment.process(Clock(30))
        before = deployment.lines

        class Fenced(Memory):
            def save(self, checkpoint: bytes, **about: Any) -> None:
                raise ArchiveError("taken over")

        keeper = Fenced(Clock(), kept=deployment.kept)
        with pytest.raises(ArchiveError, match="taken over"):
            deployment.process(keeper=keeper)
        assert deployment.lines == before
        deployment.check_covered(deployment.process())

    def test_a_federation_that_is_too_large_is_recorded(
        self, deploy: Deploy, small: Contract, in_memory: Path
    ) -> None:
        """The run ends after its census, which is in the record, and is not asked for again."""
        contract = small.revised(aggregation={"max_customers": 60})
        deployment = deploy(contract)
        for _ in range(2):
            with pytest.raises(RunError, match="has room for 60 customers"):
                deployment.process()
            assert deployment.recorded == [(CENSUS, 0, 0)]
            assert deployment.charged(0).keys() == {*deployment.recorded}
        assert audited(deployment, in_memory / "out") == set()

    def test_another_contract_is_another_run(self, deploy: Deploy, small: Contract) -> None:
        """A checkpoint is taken up under its own contract only."""
        deployment = deploy()
        with pytest.raises(Crash):
            deployment.process(Clock(30))
        other = small.revised(training={"rounds": 2})
        deployment.federation = replace(deployment.federation, contract=other)
        with pytest.raises(RunError, match="was begun under contract"):
            deployment.process()

    def test_a_line_that_a_crash_left_unfinished(
        self, deploy: Deploy, whole: tuple[Outcome, list[str]]
    ) -> None:
        """Half a line is cut off; it is in the checkpoint, and written anew."""
        deployment = deploy()
        saves = [n for n, what in enumerate(whole[1]) if what == "after a save"]
        with pytest.raises(Crash):
            deployment.process(Clock(saves[3]))  # the census is in the checkpoint
        path = deployment.federation.server / "runs" / RUN / "run.jsonl"
        pending = json.loads(deployment.kept[-1])["record"]
        assert len(pending) == 1
        with path.open("a") as file:
            file.write(pending[0][:40])
        deployment.check_whole(deployment.process(), whole[0])


class TestLate:
    """Merchants that come when the run is under way."""

    @pytest.fixture
    def long(self, small: Contract) -> Contract:
        """Give a contract in which sessions are renewed after the tenth sum."""
        return small.revised(
            training={"rounds": 11}, publication={"evaluate_every": 11, "profiles": True}
        )

    @staticmethod
    def come(deployment: Deployment) -> Fault:
        """Return what lets the fourth merchant come with the third round."""

        def fault(message: Message) -> str | None:
            if message.metadata.message_type == "train.update":
                number = unpack(SumRequest, message.content).round
                deployment.arrived |= number >= 3
            return None

        return fault

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["secure", "plain"])
    def test_is_taken_in_and_recorded(
        self, deploy: Deploy, long: Contract, in_memory: Path, mode: str
    ) -> None:
        """From the eleventh sum on it takes part; the audit has nothing to say."""
        contract = long.revised(aggregation={"secure": mode == "secure"})
        deployment = deploy(contract, count=4, present={0, 1, 2}, late=3)
        deployment.fault = self.come(deployment)
        outcome = deployment.process()
        name = deployment.federation.members[3].merchant
        assert outcome.cohorts == [3] * 9 + [4] * 2
        assert name in outcome.merchants
        assert [line["merchants"] for line in deployment.lines if line["kind"] == "late"] == [
            [name]
        ]
        deployment.check_covered(outcome)
        assert deployment.findings(outcome, in_memory / "out") == set()

    @pytest.mark.slow
    def test_survives_a_crash_at_its_coming(
        self, deploy: Deploy, long: Contract, in_memory: Path
    ) -> None:
        """Whatever moment of the new set-up the process dies in."""
        clock = Clock()
        model = deploy(long, count=4, present={0, 1, 2}, late=3)
        model.fault = self.come(model)
        undisturbed = model.process(clock)
        node = f"after {3 + FIRST_NODE} answered"
        first = clock.moments.index(node)
        for moment in range(first, first + 16, 4):
            deployment = deploy(long, count=4, present={0, 1, 2}, late=3)
            deployment.fault = self.come(deployment)
            outcome = deployment.survive(iter([moment]))
            deployment.check_covered(outcome)
            assert outcome.parameters.tobytes() == undisturbed.parameters.tobytes()
            lates = [line for line in deployment.lines if line["kind"] == "late"]
            assert len(lates) == 1
        assert deployment.findings(outcome, in_memory / "out") == set()

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("hide", "codes"),
        [
            (lambda line: line["kind"] == "late", {"sum-differs"}),
            (lambda line: line["kind"] == "sum" and line["round"] == 11, {"unknown-to-server"}),
            (lambda line: line["kind"] == "session" and line["session"] == 2, {"release-differs"}),
        ],
        ids=["its coming", "a sum", "its session"],
    )
    def test_hiding_it_is_found(
        self,
        deploy: Deploy,
        long: Contract,
        in_memory: Path,
        hide: Callable[[dict[str, Any]], bool],
        codes: set[str],
    ) -> None:
        """A record without the late merchant contradicts itself, or somebody's ledger."""
        deployment = deploy(long, count=4, present={0, 1, 2}, late=3)
        deployment.fault = self.come(deployment)
        outcome = deployment.process()
        path = deployment.federation.server / "runs" / RUN / "run.jsonl"
        kept = [json.dumps(line, sort_keys=True) for line in deployment.lines if not hide(line)]
        path.write_text("".join(line + "\n" for line in kept))
        assert codes <= deployment.findings(outcome, in_memory / "out")

    @pytest.mark.slow
    def test_naming_it_as_there_from_the_start_is_no_way(
        self, deploy: Deploy, long: Contract, in_memory: Path
    ) -> None:
        """It was asked for nothing before it came, whatever the record's start says."""
        deployment = deploy(long, count=4, present={0, 1, 2}, late=3)
        deployment.fault = self.come(deployment)
        outcome = deployment.process()
        path = deployment.federation.server / "runs" / RUN / "run.jsonl"
        lines = deployment.lines
        late = next(line for line in lines if line["kind"] == "late")
        first = next(line for line in lines if line["kind"] == "sum")
        first["merchants"] += late["merchants"]
        first["asked"] += late["merchants"]
        first["fewest"] += 1
        path.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
        found = deployment.findings(outcome, in_memory / "out")
        assert {"release-without-event", "survivors-overstated"} <= found
