"""Who takes part: pinned lists that do not fit together, strangers, refusals, late comers."""

import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.contract import Contract
from common.errors import RunError
from common.identity import Identity, Members
from common.wire import Attested, pack
from server import attendance
from server.attendance import Attendance, Enrolled, acquainted
from server.cohort import Cohort
from server.stages import Patience
from simulations.grid import FIRST_NODE, InProcessGrid
from tests.witnessed import witness

NAMES = [f"m{number}" for number in range(7)]


class Hall(InProcessGrid):
    """Nodes of which some are there; `come` lets more of them in, look by look."""

    looks = 0
    come: Callable[[int], int] = staticmethod(lambda _look: 99)  # look -> nodes that are there

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that are there."""
        self.looks += 1
        return [node for node in self.contexts if node - FIRST_NODE < self.come(self.looks)]


@dataclass
class World:
    """Merchants that say what the test has them say."""

    contract: Contract
    answers: list[Attested]
    enrolled: Enrolled = field(default_factory=Enrolled)
    silent: set[int] = field(default_factory=set)
    asked: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        app = ClientApp()

        @app.query("attest")
        def attest(message: Message, context: Context) -> Message:
            number = int(context.node_config["partition-id"])
            return Message(pack(self.answers[number]), reply_to=message)

        def fate(message: Message) -> str | None:
            number = message.metadata.dst_node_id - FIRST_NODE
            self.asked.append(number)
            return "silent" if number in self.silent else None

        self.grid = Hall(app, len(self.answers), {}, fate)
        keys = {name: Identity.generate(name).public for name in NAMES}
        members = Members(keys, witness().public)
        self.cohort = Cohort(self.grid, Patience(0.01), witness(), members)
        self.attendance = Attendance(self.cohort, self.contract, "run", self.enrolled)

    @property
    def there(self) -> list[str]:
        """Return who takes part."""
        return sorted(self.cohort.members.values())

    def gather(self, wait_s: float = 0.0) -> list[str]:
        """Gather, and return who takes part."""
        self.attendance.gather(wait_s, self.messages.append)
        return self.there


def says(name: str, pinned: int = 0, refusal: str = "") -> Attested:
    """Return a merchant's answer."""
    return Attested(name, refusal, False, pinned)


@pytest.fixture
def world(secure: Contract) -> Callable[..., World]:
    """Give the function that makes merchants under a contract that needs three of five."""

    def make(answers: list[Attested], **options: Any) -> World:
        return World(secure, answers, **options)

    return make


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for merchants without a pause."""
    monkeypatch.setattr(attendance, "_PAUSE_S", 0.001)


def all_know_all(group: Iterable[str], pinned: Mapping[str, int], added: Mapping[str, int]) -> bool:
    """Tell whether everybody in a group pinned everybody in it, written down anew."""
    names = list(group)
    return all(added.get(other, 0) <= pinned[one] for one in names for other in names)


class TestAcquainted:
    """The most merchants of which everybody pinned everybody."""

    def test_against_every_group_there_is(self) -> None:
        """It is a group that knows itself, and no larger one does."""
        generator = random.Random(5)  # noqa: S311
        for _ in range(400):
            names = NAMES[: generator.randrange(1, 7)]
            pinned = {name: generator.randrange(5) for name in names}
            added = {name: generator.randrange(5) for name in names if generator.random() < 0.9}
            found = acquainted(pinned, added)
            assert all_know_all(found, pinned, added)
            largest = max(
                size
                for size in range(len(names) + 1)
                for group in combinations(names, size)
                if all_know_all(group, pinned, added)
            )
            assert len(found) == largest

    def test_nobody(self) -> None:
        """Of nobody, nobody."""
        assert acquainted({}, {"m0": 1}) == set()

    def test_a_merchant_that_claims_an_old_list_harms_nobody_but_itself(self) -> None:
        """The many that know each other stay together."""
        pinned = dict.fromkeys(NAMES, 7) | {"m0": 1}
        added = {name: number for number, name in enumerate(NAMES, start=1)}
        assert acquainted(pinned, added) == {*NAMES[1:]}


class TestGather:
    """The start of a run."""

    def test_strangers_to_each_other(self, world: Callable[..., World]) -> None:
        """Who pinned a list without the others is left out, and told what to do."""
        answers = [says("m0", 4), says("m1", 5), says("m2", 5), says("m3", 5)]
        added = {"m0": 1, "m1": 2, "m2": 3, "m3": 5}
        found = world(answers, enrolled=Enrolled(added))
        assert found.gather() == ["m1", "m2", "m3"]
        assert "hansa merchant members --accept" in found.cohort.failures["m0"]
        assert found.attendance.states()["m0"] == ("is out", found.cohort.failures["m0"])

    def test_too_few_know_each_other(self, world: Callable[..., World]) -> None:
        """The run does not begin; the reason names who was left out."""
        answers = [says(name, number) for number, name in enumerate(NAMES[:4], start=1)]
        added = {name: number for number, name in enumerate(NAMES, start=1)}
        with pytest.raises(RunError, match=r"of 4 merchants take part.*not all merchants pinned"):
            world(answers, enrolled=Enrolled(added)).gather()

    def test_where_lists_have_no_version(self, world: Callable[..., World]) -> None:
        """In a simulation everybody knows everybody."""
        assert world([says(name) for name in NAMES[:5]]).gather() == NAMES[:5]

    def test_a_node_of_another_merchant(self, world: Callable[..., World]) -> None:
        """A name counts from the node that its merchant registered, refusals too."""
        answers = [says("m0"), says("m1"), says("m2"), says("m0"), says("m1", refusal="no")]
        nodes = {FIRST_NODE + number: name for number, name in enumerate(NAMES)}
        found = world(answers, enrolled=Enrolled({}, nodes))
        assert found.gather() == ["m0", "m1", "m2"]
        assert found.cohort.refusals == {}
        states = found.attendance.states()
        assert states["m1"] == ("takes part", "")
        assert states["m3"][0] == "is out"
        assert "called itself 'm0', which did not register" in states["m3"][1]

    def test_a_second_node(self, world: Callable[..., World]) -> None:
        """The first one keeps the name."""
        found = world([says("m0"), says("m1"), says("m2"), says("m0")])
        assert found.gather() == ["m0", "m1", "m2"]
        assert "a second node called itself 'm0'" in found.cohort.failures["node 5"]

    def test_a_ledger_of_another_key(self, world: Callable[..., World]) -> None:
        """Who was enrolled anew under its old name does not leave behind what it spent."""
        found = world([says(name) for name in NAMES[:4]])
        found.attendance.exchanged = frozenset({"m2"})
        assert found.gather() == ["m0", "m1", "m3"]
        assert "would be forgotten" in found.cohort.failures[f"node {FIRST_NODE + 2}"]

    def test_waits_for_those_that_are_missing(self, world: Callable[..., World]) -> None:
        """It says for how many, asks nobody twice, and begins when all have spoken."""
        found = world([*(says(name) for name in NAMES[:4]), says("m4", refusal="no budget")])
        found.grid.come = lambda look: look + 1
        assert found.gather(60.0) == NAMES[:4]
        assert [message[:43] for message in found.messages] == [
            "waits for 3 more merchants (2 of 5 are here",
            "waits for 2 more merchants (3 of 5 are here",
            "waits for 1 more merchant (4 of 5 are here;",
        ]
        assert found.asked == [0, 1, 2, 3, 4]
        assert found.attendance.states()["m4"] == ("refused", "no budget")

    def test_asks_silent_nodes_again(self, world: Callable[..., World]) -> None:
        """Silence is no answer; when it ends, what was said about it goes."""
        found = world([says(name) for name in NAMES[:5]], silent={3})

        def waits(_message: str) -> None:
            found.silent.clear()

        found.attendance.gather(60.0, waits)
        assert found.there == NAMES[:5]
        assert found.asked == [0, 1, 2, 3, 4, 3]
        assert found.cohort.failures == {}

    def test_begins_with_those_that_are_there(self, world: Callable[..., World]) -> None:
        """When the time is up, three suffice."""
        found = world([says(name) for name in NAMES[:3]])
        assert found.gather(0.01) == NAMES[:3]

    def test_who_refused_elsewhere_may_come_itself(self, world: Callable[..., World]) -> None:
        """A refusal in the name of one that takes part is its node's own."""
        found = world([says("m2", refusal="no"), says("m0"), says("m1"), says("m2")])
        assert found.gather() == ["m0", "m1", "m2"]
        assert "refused in the name of 'm2'" in found.cohort.failures["node 2"]


class TestLate:
    """Merchants that come later."""

    def test_who_knows_all_is_taken(self, world: Callable[..., World]) -> None:
        """Once; nobody else is asked again."""
        answers = [says(name, 4) for name in NAMES[:4]]
        added = {name: number for number, name in enumerate(NAMES, start=1)}
        found = world(answers, enrolled=Enrolled(added))
        found.grid.come = lambda _look: 3
        assert found.gather() == NAMES[:3]
        assert found.attendance.late() == []
        found.grid.come = lambda _look: 4
        assert found.attendance.late() == ["m3"]
        assert found.attendance.late() == []
        assert found.asked == [0, 1, 2, 3]

    def test_who_is_not_known_is_not(self, world: Callable[..., World]) -> None:
        """Those of the run pinned no list that names it."""
        answers = [says(name, 3) for name in NAMES[:3]] + [says("m3", 4)]
        added = {name: number for number, name in enumerate(NAMES, start=1)}
        found = world(answers, enrolled=Enrolled(added))
        found.grid.come = lambda _look: 3
        found.gather()
        found.grid.come = lambda _look: 4
        assert found.attendance.late() == []
        assert found.there == NAMES[:3]
        assert "is left out of this run" in found.cohort.failures["m3"]

    def test_two_that_do_not_know_each_other(self, world: Callable[..., World]) -> None:
        """One of them is taken: a roster with both is joined by neither."""
        answers = [says(name, 9) for name in NAMES[:3]] + [says("m3", 4), says("m4", 9)]
        added = {name: number for number, name in enumerate(NAMES, start=1)}
        found = world(answers, enrolled=Enrolled(added))
        found.grid.come = lambda _look: 3
        found.gather()
        found.grid.come = lambda _look: 5
        assert found.attendance.late() == ["m3"]
        pinned = {name: found.attendance.pinned[name] for name in found.there}
        assert all_know_all(found.there, pinned, added)

    def test_seeded_noise_is_remembered(self, world: Callable[..., World]) -> None:
        """Of a late merchant as of any other: the bundle must say so."""
        answers = [says(name) for name in NAMES[:3]] + [Attested("m3", "", True, 0)]
        found = world(answers)
        found.grid.come = lambda _look: 3
        found.gather()
        assert not found.attendance.repeatable
        found.grid.come = lambda _look: 4
        found.attendance.late()
        assert found.attendance.repeatable
