"""Sums over a cohort on the in-process grid: sessions, losses, renewal and groups."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.app import create_app
from clients.secure_party import SecureParty
from clients.secure_sum import MerchantSession
from clients.session_store import MemoryStore
from common.contract import Contract
from common.errors import SecureSumError
from common.fixed_point import Lattice
from common.identity import Identity, Members
from common.plan import CENSUS, UPDATE, lattice_of, plan_of
from common.session import accusation, session_context
from common.wire import (
    Advertise,
    Advertised,
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
from server.archive import open_archive
from server.asking import MESSAGE_TYPES, RENEWAL_STEPS, LatticeSum, Run
from server.cohort import Cohort
from server.plain_sums import PlainSums
from server.stages import Patience
from server.sums import SecureSums
from simulations.datasets import Dataset
from simulations.federation import assemble
from simulations.grid import FIRST_NODE, InProcessGrid
from simulations.members import Federation
from tests.witnessed import new_record, still_head, witness

LENGTH = 7
SILENCE_S = 0.001

Lost = Callable[[str, int], bool]  # (message type, node's number) -> is the message lost?
Error = Callable[[str, int], str | None]  # the same -> the error that it is answered with
Tamper = Callable[[Any, int], Any]  # (answer, node's number) -> the answer that is sent


def names_of(count: int) -> list[str]:
    """Return merchants' ids in order."""
    return [f"m{number:02d}" for number in range(count)]


def lattice(bits: int = 32) -> Lattice:
    """Return a lattice."""
    return Lattice(1.0, bits)


@dataclass
class Bench:
    """Merchants that mask vectors of the test's choice, and the coordinator's sums over them."""

    contract: Contract
    count: int
    bits: int = 32
    lost: Lost = lambda _kind, _number: False
    error: Error = lambda _kind, _number: None
    refusing: set[int] = field(default_factory=set)
    asked: list[tuple[str, int]] = field(default_factory=list)
    tamper: Tamper = lambda answer, _number: answer

    def __post_init__(self) -> None:
        identities = [Identity.generate(name) for name in names_of(self.count)]
        keys = {one.merchant: one.public for one in identities}
        self.members = Members(keys, witness().public)
        self.heads = [still_head(one) for one in identities]
        minimum = self.contract.min_survivors
        self.parties = [
            SecureParty(one, self.members, minimum, MemoryStore()) for one in identities
        ]
        generator = np.random.default_rng(self.count)
        dtype = lattice(self.bits).dtype
        most = np.iinfo(dtype).max
        self.vectors = generator.integers(0, most, (self.count, LENGTH), dtype=dtype, endpoint=True)
        grid = InProcessGrid(self.app(), self.count, {}, self.fate)
        nodes = {number + FIRST_NODE: name for number, name in enumerate(names_of(self.count))}
        self.cohort = Cohort(grid, Patience(SILENCE_S), witness(), self.members, nodes)
        self.sums = SecureSums(Run("run", self.contract, self.cohort), new_record())
        self.rounds = 0

    def fate(self, message: Message) -> str | None:
        """Lose what the test wants lost."""
        kind, number = message.metadata.message_type, message.metadata.dst_node_id - FIRST_NODE
        self.asked.append((kind, number))
        return "silent" if self.lost(kind, number) else self.error(kind, number)

    def app(self) -> ClientApp:
        """Return an app whose merchants hold one vector each; their ledgers never change."""
        app = ClientApp()

        def handler(kind: type[Any], answer: Callable[[int, Any], Any]) -> Any:
            def handle(message: Message, context: Context) -> Message:
                number = int(context.node_config["partition-id"])
                reply = answer(number, unpack(kind, message.content))
                return Message(pack(self.tamper(reply, number)), reply_to=message)

            return handle

        answers: list[tuple[str, type[Any], Callable[[int, Any], Any]]] = [
            ("advertise", Advertise, self.advertised),
            ("share", Share, self.shared),
            ("census", SumRequest, self.summed),
            ("confirm", Confirm, self.confirmed),
            ("reveal", Reveal, self.revealed),
        ]
        for action, kind, answer in answers:
            app.query(action)(handler(kind, answer))
        return app

    def name(self, number: int) -> str:
        """Return a merchant's id."""
        return names_of(self.count)[number]

    def advertised(self, number: int, message: Advertise) -> Advertised:
        """Show keys and head."""
        head = self.heads[number]
        advert, _ = self.parties[number].advertise(message, head.link, b"")
        return Advertised(self.name(number), advert, head.to_bytes())

    def shared(self, number: int, message: Share) -> Shared:
        """Deal the first step's shares."""
        escrow, _ = self.parties[number].share(message, lambda _roster: b"")
        return Shared(self.name(number), escrow, self.heads[number].to_bytes())

    def summed(self, number: int, request: SumRequest) -> SumAnswer:
        """Mask the vector, or refuse."""
        party, head = self.parties[number], self.heads[number].to_bytes()
        if number in self.refusing:
            nothing = self.vectors[number][:0]
            return SumAnswer(self.name(number), "no more", False, b"", b"", nothing)
        prepared = party.prepare(request)
        sent = party.mask(request, prepared, self.vectors[number], b"")
        masked, escrow = sent.vector, sent.escrow
        return SumAnswer(self.name(number), "", False, escrow, head, masked)

    def confirmed(self, number: int, message: Confirm) -> Confirmed:
        """Vouch for the survivors."""
        return Confirmed(self.name(number), self.parties[number].confirm(message))

    def revealed(self, number: int, message: Reveal) -> Revealed:
        """Help to unmask."""
        return Revealed(self.name(number), self.parties[number].reveal(message)[0])

    def ask(self) -> LatticeSum | None:
        """Ask for one sum."""
        self.rounds += 1
        self.asked.clear()
        request = SumRequest(
            "run",
            self.contract.sha256,
            CENSUS,
            self.rounds,
            0,
            0.0,
            0,
            0,
            b"",
            b"",
            b"",
            np.zeros(3),
        )
        return self.sums.ask(request, LENGTH, lattice(self.bits))

    def check(self, found: LatticeSum | None, numbers: list[int]) -> None:
        """Check that a sum is that of these merchants, exactly."""
        assert found is not None
        assert list(found.merchants) == [names_of(self.count)[number] for number in numbers]
        signed = lattice(self.bits).from_ring
        expected = signed(np.sum(self.vectors[numbers], axis=0, dtype=self.vectors.dtype))
        np.testing.assert_array_equal(found.total, expected)
        assert found.parts == {}

    @property
    def set_up_anew(self) -> bool:
        """Whether the last sum set up a session first."""
        return any(kind == "query.advertise" for kind, _ in self.asked)


class TestSums:
    """One sum over everybody that is there."""

    @pytest.mark.parametrize("bits", [32, 64])
    def test_the_total_is_the_plain_sum(self, secure: Contract, bits: int) -> None:
        """Over the whole ring, sum after sum, in one session."""
        bench = Bench(secure, 5, bits)
        for number in range(4):
            found = bench.ask()
            bench.check(found, [0, 1, 2, 3, 4])
            assert found is not None
            assert found.fewest == 5
            assert bench.set_up_anew == (number == 0)
        assert bench.cohort.failures == {}

    @pytest.mark.parametrize("stage", ["advertise", "share", "census"])
    def test_who_is_lost_before_the_sum_is_not_in_it(self, secure: Contract, stage: str) -> None:
        """And the reason is kept under its name."""
        bench = Bench(secure, 5, lost=lambda kind, n: kind == f"query.{stage}" and n == 3)
        bench.check(bench.ask(), [0, 1, 2, 4])
        assert bench.cohort.failures == {"m03": "no answer within 0.001 s"}

    @pytest.mark.parametrize("stage", ["confirm", "reveal"])
    def test_who_is_lost_after_it_is_in_the_sum(self, secure: Contract, stage: str) -> None:
        """Its vector had come."""
        bench = Bench(secure, 5, lost=lambda kind, n: kind == f"query.{stage}" and n == 3)
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert not bench.set_up_anew

    @pytest.mark.parametrize("stage", ["advertise", "share"])
    def test_too_few_in_a_session_are_asked_for_nothing(self, secure: Contract, stage: str) -> None:
        """So that nothing is spent; once everybody is back, there is a sum."""
        bench = Bench(secure, 5, lost=lambda kind, n: kind == f"query.{stage}" and n >= 2)
        with pytest.raises(SecureSumError, match="too few merchants are in a session; nobody was"):
            bench.ask()
        assert {kind for kind, _ in bench.asked} <= {"query.advertise", "query.share"}
        reasons = bench.cohort.reasons()
        assert "m03: no answer within 0.001 s" in reasons
        assert any(name.startswith(("secure sum", "session")) for name in bench.cohort.failures)
        bench.lost = lambda _kind, _number: False
        bench.check(bench.ask(), [0, 1, 2, 3, 4])

    @pytest.mark.parametrize("stage", ["census", "confirm", "reveal"])
    def test_too_many_losses_are_no_sum_with_a_reason(self, secure: Contract, stage: str) -> None:
        """Nothing is raised; once everybody is back, so is the sum."""
        bench = Bench(secure, 5, lost=lambda kind, n: kind == f"query.{stage}" and n >= 2)
        assert bench.ask() is None
        reasons = bench.cohort.reasons()
        assert "m03: no answer within 0.001 s" in reasons
        assert any(name.startswith(("secure sum", "session")) for name in bench.cohort.failures)
        bench.lost = lambda _kind, _number: False
        bench.check(bench.ask(), [0, 1, 2, 3, 4])

    def test_who_refuses_is_left_out_for_good(self, secure: Contract) -> None:
        """It is asked for nothing any more, also not in a session that is set up anew."""
        bench = Bench(secure, 5, refusing={1})
        bench.check(bench.ask(), [0, 2, 3, 4])
        assert bench.cohort.refusals == {"m01": "no more"}
        for _ in range(RENEWAL_STEPS + 2):
            bench.check(bench.ask(), [0, 2, 3, 4])
            assert all(number != 1 for _, number in bench.asked)

    @pytest.mark.parametrize("kind", [Advertised, Shared, SumAnswer, Confirmed, Revealed])
    def test_an_answer_in_anothers_name_is_not_counted(
        self, secure: Contract, kind: type[Any]
    ) -> None:
        """In no stage; the failure is noted under the node's own name."""

        def tamper(answer: Any, number: int) -> Any:
            if number == 2 and isinstance(answer, kind):
                return kind(**{**vars(answer), "merchant": "m00"})
            return answer

        bench = Bench(secure, 5, tamper=tamper)
        found = bench.ask()
        bench.check(found, [0, 1, 3, 4] if kind in {Advertised, Shared, SumAnswer} else [*range(5)])
        assert "field 'merchant'" in bench.cohort.failures["m02"]

    @pytest.mark.parametrize(
        ("kind", "name"),
        [
            (Advertised, "advert"),
            (Advertised, "head"),
            (Shared, "escrow"),
            (Shared, "head"),
            (SumAnswer, "escrow"),
            (SumAnswer, "head"),
            (Confirmed, "confirmations"),
            (Revealed, "shares"),
        ],
    )
    def test_a_malformed_answer_is_as_good_as_none(
        self, secure: Contract, kind: type[Any], name: str
    ) -> None:
        """The others' sum is right."""

        def tamper(answer: Any, number: int) -> Any:
            if number == 2 and isinstance(answer, kind):
                return kind(**{**vars(answer), name: getattr(answer, name)[:-1]})
            return answer

        bench = Bench(secure, 5, tamper=tamper)
        found = bench.ask()
        bench.check(found, [0, 1, 3, 4] if kind in {Advertised, Shared, SumAnswer} else [*range(5)])
        assert "field '" in bench.cohort.failures["m02"]

    @pytest.mark.parametrize("kind", [Advertised, Shared, SumAnswer])
    def test_an_answer_with_anothers_head_is_not_counted(
        self, secure: Contract, kind: type[Any]
    ) -> None:
        """The witness takes a head with its owner's signature only."""

        def tamper(answer: Any, number: int) -> Any:
            if number == 2 and isinstance(answer, kind):
                return replace(answer, head=bench.heads[1].to_bytes())
            return answer

        bench = Bench(secure, 5, tamper=tamper)
        bench.check(bench.ask(), [0, 1, 3, 4])
        reason = "field 'head': is not signed with this merchant's key"
        assert bench.cohort.failures == {"m02": reason}

    def test_an_advert_that_is_bound_to_another_head_is_not_taken(self, secure: Contract) -> None:
        """Keys and ledger belong together."""

        def tamper(answer: Any, number: int) -> Any:
            if number == 2 and isinstance(answer, Advertised):
                party, context = bench.parties[2], session_context("run", 1, secure.sha256)
                other = MerchantSession.advertise(party.identity, party.members, 3, context, 1)
                return replace(answer, advert=other.advert)
            return answer

        bench = Bench(secure, 5, tamper=tamper)
        bench.check(bench.ask(), [0, 1, 3, 4])
        assert "bound to another head" in bench.cohort.failures["m02"]

    def test_false_shares_are_told(self, secure: Contract) -> None:
        """The sum is right, and the notes say who may have lied."""

        def tamper(answer: Any, number: int) -> Any:
            if number == 2 and isinstance(answer, Revealed):
                return Revealed(answer.merchant, bytes(len(answer.shares)))
            return answer

        bench = Bench(secure, 5, tamper=tamper)
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert set(bench.cohort.failures) == {f"m02 or m0{number}" for number in range(5)}


class TestAccused:
    """Members whose boxes or confirmations others find to be wrong."""

    @staticmethod
    def lying(liar: int, kind: type[Any], name: str, start: int, stop: int) -> Tamper:
        """Return what makes zeros of some of the bytes that a merchant sends."""

        def tamper(answer: Any, number: int) -> Any:
            if number != liar or not isinstance(answer, kind):
                return answer
            raw = getattr(answer, name)
            changed = raw[:start] + bytes(len(raw[start:stop])) + raw[stop:]
            return kind(**{**vars(answer), name: changed})

        return tamper

    def test_a_wrong_confirmation_costs_no_sum(self, secure: Contract) -> None:
        """Who finds it wrong is asked again without it; all accuse the liar, which is put out."""
        bench = Bench(secure, 5, tamper=self.lying(2, Confirmed, "confirmations", 0, 10**6))
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        reveals = [number for kind, number in bench.asked if kind == "query.reveal"]
        assert sorted(reveals) == [0, 0, 1, 1, 2, 3, 3, 4, 4]
        assert bench.cohort.accusers == {"m02": {"m00", "m01", "m03", "m04"}}
        assert "'m02' did not confirm" in bench.cohort.failures["m00"]
        assert bench.sums._liars == {"m02"}
        for _ in range(RENEWAL_STEPS + 2):
            bench.check(bench.ask(), [0, 1, 3, 4])
            assert not bench.set_up_anew
            assert all(number != 2 for _, number in bench.asked)

    def test_who_was_put_out_is_left_out_of_later_sessions(self, secure: Contract) -> None:
        """Also where so many are lost that a session is set up anew."""
        bench = Bench(secure, 5, tamper=self.lying(2, Confirmed, "confirmations", 0, 10**6))
        bench.ask()
        bench.lost = lambda kind, number: kind == "query.census" and number == 0
        assert bench.ask() is None
        bench.lost = lambda _kind, _number: False
        bench.check(bench.ask(), [0, 1, 3, 4])
        assert bench.set_up_anew
        assert all(number != 2 for _, number in bench.asked)

    @pytest.mark.parametrize("receivers", [0, 1, 2])
    def test_more_than_a_third_must_accuse(self, secure: Contract, receivers: int) -> None:
        """Of five at least two: one alone, which may lie, puts nobody out."""
        bench = Bench(
            secure, 5, tamper=self.lying(2, Confirmed, "confirmations", 0, 16 * receivers)
        )
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert len(bench.cohort.accusers.get("m02", ())) == receivers
        assert bench.sums._liars == ({"m02"} if receivers == 2 else set())
        bench.check(bench.ask(), [0, 1, 3, 4] if receivers == 2 else [0, 1, 2, 3, 4])

    def test_one_accuser_is_one_however_often_it_accuses(self, secure: Contract) -> None:
        """It is the number of members that counts; its victim stays in all sums."""
        bench = Bench(secure, 5, tamper=self.lying(2, Confirmed, "confirmations", 0, 16))
        for _ in range(5):
            bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.cohort.accusers == {"m02": {"m00"}}
        assert bench.sums._liars == set()

    def test_accusers_of_different_sums_add_up(self, secure: Contract) -> None:
        """Who lies to one member at a time is put out when it has lied to too many."""
        bench = Bench(secure, 5)
        for number in (0, 1):
            bench.check(bench.ask(), [0, 1, 2, 3, 4])
            start = 16 * number
            bench.tamper = self.lying(2, Confirmed, "confirmations", start, start + 16)
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.cohort.accusers == {"m02": {"m00", "m01"}}
        bench.check(bench.ask(), [0, 1, 3, 4])

    def test_bad_boxes_for_all_cost_one_attempt(self, secure: Contract) -> None:
        """All refuse before they mask anything; the next session has everybody but the liar."""
        bench = Bench(secure, 5, tamper=self.lying(2, Shared, "escrow", 0, 80 * 5))
        assert bench.ask() is None
        assert "'m02' left a box for step 1 that is not authentic" in bench.cohort.failures["m00"]
        assert bench.sums._liars == {"m02"}
        bench.check(bench.ask(), [0, 1, 3, 4])
        assert bench.set_up_anew
        assert all(number != 2 for _, number in bench.asked)

    def test_bad_boxes_for_a_later_step_too(self, secure: Contract) -> None:
        """They come with the vector of the step before, which is summed."""
        bench = Bench(secure, 5, tamper=self.lying(2, SumAnswer, "escrow", 0, 80 * 5))
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.ask() is None
        assert "for step 2" in bench.cohort.failures["m00"]
        bench.check(bench.ask(), [0, 1, 3, 4])

    def test_a_bad_box_for_one_puts_nobody_out(self, secure: Contract) -> None:
        """It may be the receiver that lies; it is out of this session, its choice."""
        bench = Bench(secure, 5, tamper=self.lying(2, Shared, "escrow", 0, 80))
        bench.check(bench.ask(), [1, 2, 3, 4])
        assert bench.cohort.accusers == {"m02": {"m00"}}
        assert bench.sums._liars == set()

    def test_strangers_accuse_nobody(self, secure: Contract) -> None:
        """Only members of a group count towards a third of it."""
        bench = Bench(secure, 5)
        bench.cohort.accusers["m02"] = {"node 77", "m77", "m78", "m00"}
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.sums._liars == set()

    def test_who_always_accuses_somebody_else_is_asked_for_an_end(self, secure: Contract) -> None:
        """A member that accuses names of its own making must not keep the coordinator busy."""
        asked = 0

        def accuse(kind: str, number: int) -> str | None:
            nonlocal asked
            if (kind, number) != ("query.reveal", 2):
                return None
            asked += 1
            if asked > 50:  # enough to see that there is no end
                return "the node has left"
            return str(accusation("confirmations", f"x{asked}", "lied"))

        bench = Bench(secure, 5, error=accuse)
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert asked <= 5

    @pytest.mark.parametrize("kind", ["query.census", "query.reveal"])
    def test_a_false_accuser_harms_nobody_but_itself(self, secure: Contract, kind: str) -> None:
        """Whom it accuses stays in; the accuser is as good as silent."""

        def accuse(asked: str, number: int) -> str | None:
            return str(accusation("boxes", "m02", "lied")) if (asked, number) == (kind, 0) else None

        bench = Bench(secure, 5, error=accuse)
        there = [1, 2, 3, 4] if kind == "query.census" else [0, 1, 2, 3, 4]
        for _ in range(3):
            bench.check(bench.ask(), there)
        assert bench.cohort.accusers == {"m02": {"m00"}}
        assert bench.sums._liars == set()


class TestRenewal:
    """Merchants that fell out come back."""

    def test_who_fell_out_is_back_after_ten_sums(self, secure: Contract) -> None:
        """Until then the others go on without it, without a new session."""
        bench = Bench(secure, 5, lost=lambda kind, n: kind == "query.census" and n == 3)
        bench.check(bench.ask(), [0, 1, 2, 4])
        bench.lost = lambda _kind, _number: False
        for _ in range(RENEWAL_STEPS - 1):
            bench.check(bench.ask(), [0, 1, 2, 4])
            assert not bench.set_up_anew
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.set_up_anew
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert not bench.set_up_anew

    def test_a_whole_session_is_never_renewed(self, secure: Contract) -> None:
        """Nobody is missing, so nothing is gained."""
        bench = Bench(secure, 5)
        for number in range(RENEWAL_STEPS + 3):
            bench.ask()
            assert bench.set_up_anew == (number == 0)

    def test_a_session_that_is_too_small_is_renewed_at_once(self, secure: Contract) -> None:
        """Two losses in a row of five leave three, and four are needed."""
        gone = {3}
        bench = Bench(secure, 5, lost=lambda kind, n: kind == "query.census" and n in gone)
        bench.check(bench.ask(), [0, 1, 2, 4])
        gone.add(2)
        assert bench.ask() is None
        gone.clear()
        bench.check(bench.ask(), [0, 1, 2, 3, 4])
        assert bench.set_up_anew

    def test_a_merchant_that_lost_its_session_is_as_good_as_silent(self, secure: Contract) -> None:
        """It refuses the step, the others go on, and it is back after renewal."""
        bench = Bench(secure, 5)
        bench.ask()
        bench.parties[2].store.erase()
        bench.check(bench.ask(), [0, 1, 3, 4])
        assert "no session under way" in bench.cohort.failures["m02"]
        for _ in range(RENEWAL_STEPS - 2):
            bench.check(bench.ask(), [0, 1, 3, 4])
        bench.check(bench.ask(), [0, 1, 2, 3, 4])


@pytest.fixture
def at_most_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no secure sum have more than four merchants."""
    for module in ("common.contract", "common.session", "server.sums"):
        monkeypatch.setattr(f"{module}.MAX_COHORT", 4)


@pytest.mark.usefixtures("at_most_four")
class TestGroups:
    """More merchants than one secure sum can have."""

    def test_the_total_is_that_of_all_groups(self, secure: Contract) -> None:
        """Eight merchants are two groups of four."""
        bench = Bench(secure, 8)
        for _ in range(3):
            found = bench.ask()
            assert found is not None
            assert found.fewest == 4
            assert list(found.merchants) == names_of(8)
            signed = lattice().from_ring
            parts = [np.sum(bench.vectors[start::2], axis=0, dtype=np.uint32) for start in (0, 1)]
            np.testing.assert_array_equal(found.total, signed(parts[0]) + signed(parts[1]))
        assert [group.nodes for group in bench.sums._groups] == [[2, 4, 6, 8], [3, 5, 7, 9]]

    def test_a_merchant_that_is_left_over_is_told(self, secure: Contract) -> None:
        """Five do not divide into groups of three or four."""
        bench = Bench(secure, 5)
        found = bench.ask()
        assert found is not None
        assert list(found.merchants) == names_of(4)
        assert bench.cohort.failures == {"m04": "left over when merchants were divided into groups"}

    def test_who_is_left_over_makes_no_session_stale(self, secure: Contract) -> None:
        """There is no room for it in a new one either; who fell out is back all the same."""
        bench = Bench(secure, 5)
        for number in range(RENEWAL_STEPS + 3):
            found = bench.ask()
            assert found is not None
            assert list(found.merchants) == names_of(4)
            assert bench.set_up_anew == (number == 0)
        bench.lost = lambda kind, number: kind == "query.census" and number == 3
        bench.check(bench.ask(), [0, 1, 2])
        bench.lost = lambda _kind, _number: False
        bench.check(bench.ask(), [0, 1, 2, 3])
        assert bench.set_up_anew

    def test_losses_in_one_group_leave_the_other(self, secure: Contract) -> None:
        """The sum is that of the group that could be unmasked; the next one has both again."""
        gone = {0, 2}
        bench = Bench(secure, 8, lost=lambda kind, n: kind == "query.census" and n in gone)
        bench.check(bench.ask(), [1, 3, 5, 7])
        gone.clear()
        found = bench.ask()
        assert found is not None
        assert list(found.merchants) == names_of(8)

    def test_one_loss_in_each_group_is_survived(self, secure: Contract) -> None:
        """Three of four are enough in each."""
        bench = Bench(secure, 8, lost=lambda kind, n: kind == "query.census" and n in {4, 5})
        found = bench.ask()
        assert found is not None
        assert found.fewest == 3
        assert list(found.merchants) == [f"m0{number}" for number in (0, 1, 2, 3, 6, 7)]


class TestBothWays:
    """Masked and plain sums are the same, with real workers."""

    @staticmethod
    def asked(federation: Federation) -> list[LatticeSum | None]:
        """Ask a federation's workers for a census and two updates."""
        contract, members = federation.contract, federation.members
        app = create_app(lambda context: members[int(context.node_config["partition-id"])].worker)
        grid = InProcessGrid(app, len(members), {})
        nodes = {number + FIRST_NODE: one.merchant for number, one in enumerate(members)}
        archive, plan = open_archive(federation.server), plan_of(contract)
        cohort = Cohort(grid, Patience(SILENCE_S), archive.witness, federation.enrolled, nodes)
        run = Run("run", contract, cohort)
        ask = PlainSums(run).ask
        if contract.aggregation.secure:
            ask = SecureSums(run, archive.record("run")).ask
        found = []
        for stage, number, release in (
            (CENSUS, 0, plan.census),
            (UPDATE, 1, plan.update),
            (UPDATE, 2, plan.update),
        ):
            model = np.full(plan.update.length, 0.01 * number)
            request = SumRequest(
                "run", contract.sha256, stage, number, 0, 40.0, 0, 0, b"", b"", b"", model
            )
            found.append(ask(request, release.length, lattice_of(release, contract)))
        assert not cohort.failures
        assert not cohort.refusals
        return found

    @pytest.mark.parametrize("bits", [32, 64])
    def test_masks_change_no_bit_of_a_sum(
        self, dataset: Dataset, secure: Contract, plain: Contract, tmp_path: Path, bits: int
    ) -> None:
        """The same seed gives the same multiples of the lattice step, masked or not."""
        totals = []
        for contract in (secure, plain):
            agreed = contract.revised(aggregation={"ring_bits": bits})
            federation = assemble(dataset, agreed, tmp_path / str(len(totals)), 7)
            totals.append(self.asked(federation))
            for member in federation.members:
                member.worker.ledger.close()
        for masked, bare in zip(*totals, strict=True):
            assert masked is not None
            assert bare is not None
            assert masked.merchants == bare.merchants
            np.testing.assert_array_equal(masked.total, bare.total)
            assert len(bare.parts) == 5
            assert masked.parts == {}


def test_every_stage_has_its_message_type() -> None:
    """And no two have the same."""
    assert len(set(MESSAGE_TYPES.values())) == len(MESSAGE_TYPES) == 4
