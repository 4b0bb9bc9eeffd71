"""A coordinator that asks again, mixes sessions and waits for crashes.

What answered a question answers it again, byte for byte. These tests look for a way to get a
second answer out of that: two vectors under one mask, two kinds of shares, two texts under one
key, or a charge that nobody counts.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from clients.secure_party import SecureParty
from clients.secure_sum import Phase, State
from clients.session_store import FileStore
from clients.worker import Worker
from common.errors import SecureSumError
from common.ledger import Ledger
from common.session import to_bitmap
from common.wire import Advertise, Advertised, Confirm, Reveal, Share, SumAnswer, SumRequest
from tests.adversary.secure_world import Shops, shops, worker_of
from tests.witnessed import charges_of, entries_of

VICTIM, COUNT = 0, 3
LAST = {"stage": "profile", "round": 10}  # the run's last sum
Message = Advertise | Share | SumRequest | Confirm | Reveal
METHODS = ("advertise", "share", "answer", "confirm", "reveal")


class Crash(BaseException):
    """The merchant's process is dead: nothing in it may handle this."""


class Deadly:
    """Ends the process before or after the n-th change that reaches a disk."""

    def __init__(self, at: int) -> None:
        self.at, self.changes = at, 0

    def tick(self) -> None:
        """Die here if it is time."""
        self.changes += 1
        if self.changes - 1 == self.at:
            raise Crash


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Deadly]]:
    """Give the function that arms every session file and every ledger of this process."""
    save, commit = FileStore.save, Ledger._transaction

    def arm(at: int) -> Deadly:
        deadline = Deadly(at)

        def saving(store: FileStore, state: State) -> None:
            deadline.tick()
            save(store, state)
            deadline.tick()

        def writing(ledger: Ledger, *args: Any) -> Any:
            before = ledger._seq

            class Watched:
                def __enter__(self) -> Any:
                    self.context = commit(ledger, *args)
                    return self.context.__enter__()

                def __exit__(self, *about: Any) -> Any:
                    found = self.context.__exit__(*about)
                    if ledger._seq != before:
                        deadline.tick()
                    return found

            return Watched()

        monkeypatch.setattr(FileStore, "save", saving)
        monkeypatch.setattr(Ledger, "_transaction", writing)
        return deadline

    yield arm
    monkeypatch.undo()


def restarted(found: Shops, folder: Path) -> Worker:
    """Open the victim anew, from nothing but its files."""
    identity = found.identities[VICTIM]
    found.workers[VICTIM].ledger.close()
    found.stores[VICTIM] = FileStore(folder / f"{identity.merchant}.sealed", identity)
    found.workers[VICTIM] = worker_of(found, VICTIM, folder)
    return found.workers[VICTIM]


def led_to(found: Shops, method: str) -> Message:
    """Lead everybody to a message to the victim; the step is the run's last one."""
    if method == "advertise":
        return Advertise("run", found.contract.sha256, 1, found.countersigned(VICTIM))
    found.advertise()
    if method == "share":
        return found.share_message(VICTIM)
    found.share()
    if method == "answer":
        return found.request(VICTIM, 1, **LAST)
    for position in range(COUNT):
        assert not found.ask(position, 1, **LAST).refusal
    if method == "confirm":
        return Confirm(1, 1, to_bitmap(range(COUNT), COUNT))
    return found.reveal_message(VICTIM, 1, found.confirm(1))


def asked(worker: Worker, method: str, message: Message) -> Any:
    """Send a message; return the answer, or the refusal as text."""
    try:
        answer = getattr(worker, method)(message)
    except SecureSumError as refusal:
        return str(refusal)
    return answer.refusal or answer if isinstance(answer, SumAnswer) else answer


def alike(one: Any, other: Any) -> bool:
    """Tell whether two answers are equal, byte for byte."""
    return vars(one).keys() == vars(other).keys() and all(
        np.array_equal(value, vars(other)[name]) for name, value in vars(one).items()
    )


def papers(found: Shops) -> list[tuple[str, Any]]:
    """Return kind and occasion of the victim's entries."""
    entries = [entry.document for entry in found.workers[VICTIM].ledger.entries()]
    return [(e["kind"], (e.get("stage"), e.get("session"))) for e in entries]


# after which changes the same question is refused: the entry is there, the answer is not
LOST: dict[str, set[int]] = {"share": {0, 1}, "answer": {0, 1}}
CHANGES = {"advertise": 3, "share": 3, "answer": 3, "confirm": 2, "reveal": 6}


class TestCrashes:
    """The victim dies at every change of its disk, and is asked again."""

    @pytest.mark.parametrize("method", METHODS)
    def test_at_every_change(
        self, tmp_path: Path, deadly: Callable[[int], Deadly], method: str
    ) -> None:
        """One entry each, one answer each; what was lost with its entry stays lost."""
        for moment in range(CHANGES[method]):
            folder = tmp_path / str(moment)
            folder.mkdir()
            found = shops(folder, COUNT, files=True)
            message = led_to(found, method)
            deadline = deadly(moment)
            with pytest.raises(Crash):
                getattr(found.workers[VICTIM], method)(message)
            deadline.at = -1
            worker = restarted(found, folder)
            again = asked(worker, method, message)
            lost = moment in LOST.get(method, set())
            assert isinstance(again, str) == lost, (method, moment, again)
            if lost:
                assert "before" in again
            third = asked(worker, method, message)
            assert third == again if lost else alike(third, again)
            kinds = papers(found)
            assert len({*kinds}) == len(kinds), "an entry was written twice"

    @pytest.mark.parametrize("method", METHODS)
    def test_there_are_no_more_changes(
        self, tmp_path: Path, deadly: Callable[[int], Deadly], method: str
    ) -> None:
        """The test above dies at all of them."""
        found = shops(tmp_path, COUNT, files=True)
        message = led_to(found, method)
        deadline = deadly(99)
        getattr(found.workers[VICTIM], method)(message)
        assert deadline.changes == CHANGES[method]

    @pytest.mark.parametrize("moment", range(6))
    def test_the_last_reveal_is_finished(
        self, tmp_path: Path, deadly: Callable[[int], Deadly], moment: int
    ) -> None:
        """Noted, settled and forgotten once, whatever was done before the crash."""
        found = shops(tmp_path, COUNT, files=True)
        message = led_to(found, "reveal")
        deadline = deadly(moment)
        with pytest.raises(Crash):
            found.workers[VICTIM].reveal(message)
        deadline.at = -1
        worker = restarted(found, tmp_path)
        assert worker.reveal(message).shares
        assert [one["survivors"] for one in entries_of(worker.ledger, "sum")] == [COUNT]
        assert len(entries_of(worker.ledger, "settle")) == 1
        left = found.stores[VICTIM].load()
        assert (left.phase, left.pairs, left.next_keys) == (Phase.OVER, {}, b"")


class TestRestoredFiles:
    """Every older file of the session, put back, and every message that was ever sent."""

    @pytest.fixture
    def story(self, tmp_path: Path) -> tuple[Shops, list[bytes], list[tuple[str, Message, Any]]]:
        """Play a session of two steps; keep the victim's file after each message."""
        found = shops(tmp_path, COUNT, files=True)
        path = tmp_path / "m000.sealed"
        files: list[bytes] = []
        told: list[tuple[str, Message, Any]] = []

        def send(method: str, message: Message) -> Any:
            answer = getattr(found.workers[VICTIM], method)(message)
            files.append(path.read_bytes())
            told.append((method, message, answer))
            return answer

        begin = Advertise("run", found.contract.sha256, 1, b"")
        send("advertise", begin)
        found.advertise()  # the same advert again
        assert found.rosters[1][VICTIM] == told[0][2].advert
        send("share", found.share_message(VICTIM))
        found.share()
        for step in (1, 2):
            for position in range(COUNT):
                changed = {"attempt": step}
                if position == VICTIM:
                    send("answer", found.request(VICTIM, step, **changed))
                assert not found.ask(position, step, **changed).refusal
            send("confirm", Confirm(1, step, to_bitmap(range(COUNT), COUNT)))
            send("reveal", found.reveal_message(VICTIM, step, found.confirm(step)))
        return found, files, told

    def test_no_second_answer_to_anything(
        self,
        story: tuple[Shops, list[bytes], list[tuple[str, Message, Any]]],
        tmp_path: Path,
    ) -> None:
        """From whatever file: each old question gets its old answer, or none.

        Only an advert may be new, of a new session with keys of its own.
        """
        found, files, told = story
        before = papers(found)
        for raw in files:
            for first, message, answer in told:
                (tmp_path / "m000.sealed").write_bytes(raw)
                worker = restarted(found, tmp_path)
                for _ in range(2):  # a refusal must not open the door for the next try
                    again = asked(worker, first, message)
                    if first == "advertise" or isinstance(again, str):
                        continue
                    assert alike(again, answer), first
        assert [one for one in papers(found) if one[0] != "refuse"] == before

    def test_no_other_question_either(
        self,
        story: tuple[Shops, list[bytes], list[tuple[str, Message, Any]]],
        tmp_path: Path,
    ) -> None:
        """Nothing more is released, joined or dealt for a step that was taken."""
        found, files, told = story
        before = charges_of(found.workers[VICTIM].ledger)
        others: list[tuple[str, Message]] = [
            ("share", replace(told[1][1], roster=told[1][1].roster[:2])),  # type: ignore[union-attr]
        ]
        for _, message, _ in told:
            if isinstance(message, SumRequest):
                others += [
                    ("answer", replace(message, attempt=7)),
                    ("answer", replace(message, parameters=message.parameters + 1)),
                    ("answer", replace(message, stage="census", round=0)),
                ]
        for raw in files[1:]:  # with a roster
            for method, message in others:
                (tmp_path / "m000.sealed").write_bytes(raw)
                worker = restarted(found, tmp_path)
                for _ in range(2):
                    assert isinstance(asked(worker, method, message), str)
        assert charges_of(found.workers[VICTIM].ledger) == before


class TestMixedSessions:
    """Messages of one session in another one of the same number."""

    def test_answers_do_not_outlive_their_step(self, tmp_path: Path) -> None:
        """When the next vector has left, nothing of the step before is answered."""
        found = shops(tmp_path, COUNT, files=True)
        found.set_up()
        for position in range(COUNT):
            found.ask(position, 1)
        confirm = Confirm(1, 1, to_bitmap(range(COUNT), COUNT))
        reveal = found.reveal_message(VICTIM, 1, found.confirm(1))
        for worker, position in zip(found.workers, range(COUNT), strict=True):
            worker.reveal(found.reveal_message(position, 1, found.confirm(1)))
        old = found.request(VICTIM, 1)
        assert not found.ask(VICTIM, 2, attempt=1).refusal
        assert {*found.stores[VICTIM].load().replies} == {"update"}
        for method, message in (("confirm", confirm), ("reveal", reveal)):
            said = asked(found.workers[VICTIM], method, message)
            assert said == "field 'step': step 1 is not under way"
        assert "never taken up again" in asked(found.workers[VICTIM], "answer", old)

    @pytest.mark.parametrize("moment", METHODS[1:])
    def test_an_old_advertise_starts_anew(self, tmp_path: Path, moment: str) -> None:
        """Fresh keys; of the session before nothing is answered any more, and nothing is paid."""
        found = shops(tmp_path, COUNT, files=True)
        message = led_to(found, moment)
        getattr(found.workers[VICTIM], moment)(message)
        keys = deepcopy(found.stores[VICTIM].load().own_advert)
        paid = charges_of(found.workers[VICTIM].ledger)
        begin = Advertise("run", found.contract.sha256, 1, found.countersigned(VICTIM))
        fresh = found.workers[VICTIM].advertise(begin)
        assert fresh.advert != keys
        assert alike(found.workers[VICTIM].advertise(begin), fresh)  # and the same from now on
        for _ in range(2):
            assert isinstance(asked(found.workers[VICTIM], moment, message), str)
        state = found.stores[VICTIM].load()
        assert (state.phase, state.step) == (Phase.ADVERTISED, None)
        assert charges_of(found.workers[VICTIM].ledger) == paid

    def test_answers_do_not_outlive_their_session(self, tmp_path: Path) -> None:
        """Session 1 again, step 1 again: what was confirmed and revealed in the first is gone."""
        found = shops(tmp_path, COUNT, files=True)
        reveal = led_to(found, "reveal")
        confirm = Confirm(1, 1, to_bitmap(range(COUNT), COUNT))
        first = found.workers[VICTIM].confirm(confirm).confirmations
        found.set_up()  # the same number; nobody revealed
        for method, message in (("confirm", confirm), ("reveal", reveal)):
            said = asked(found.workers[VICTIM], method, message)
            assert said == "field 'step': step 1 is not under way"
        for position in range(COUNT):
            assert not found.ask(position, 1, attempt=1).refusal
        assert found.workers[VICTIM].confirm(confirm).confirmations != first
        assert "did not confirm" in asked(found.workers[VICTIM], "reveal", reveal)

    def test_a_run_that_is_over_does_not_wipe_the_next(self, tmp_path: Path) -> None:
        """The last reveal of an old run, asked again late, finds another session there."""
        found = shops(tmp_path, COUNT, files=True)
        reveal = led_to(found, "reveal")
        party, contract = found.workers[VICTIM]._party, found.contract.sha256
        found.workers[VICTIM].reveal(reveal)
        found.set_up(1, "next")
        before = found.stores[VICTIM].load()
        party.forget("run", 1, contract)
        assert found.stores[VICTIM].load() == before
        assert isinstance(asked(found.workers[VICTIM], "reveal", reveal), str)
        assert found.stores[VICTIM].load() == before

    def test_shares_do_not_depend_on_who_asks(self, tmp_path: Path) -> None:
        """Whatever confirmations come with a second question, the shares are those of the first."""
        found = shops(tmp_path, 4, files=True)
        found.set_up()
        for position in range(4):
            found.ask(position, 1)
        codes = found.confirm(1)
        honest = found.reveal_message(VICTIM, 1, codes)
        shares = found.workers[VICTIM].reveal(honest).shares
        for confirmed, raw in (
            (honest.confirmed, b"\0" * len(honest.confirmations)),
            (to_bitmap((0, 1), 4), b""),
            (to_bitmap((1, 2, 3), 4), honest.confirmations),
            (b"", b""),
        ):
            again = found.workers[VICTIM].reveal(Reveal(1, 1, confirmed, raw))
            assert again.shares == shares
        for step in (0, 2):
            with pytest.raises(SecureSumError, match=f"step {step} is not under way"):
                found.workers[VICTIM].reveal(replace(honest, step=step))
        with pytest.raises(SecureSumError, match="is in session 1, not 2"):
            found.workers[VICTIM].reveal(replace(honest, session=2))


class TestAtOnce:
    """The same question twice at the same time, to two processes of one merchant."""

    def test_two_adverts(self, tmp_path: Path) -> None:
        """There is one pair of keys, and both are told of it."""
        found = shops(tmp_path, COUNT, files=True)
        identity, answers = found.identities[VICTIM], list[Advertised]()
        message = Advertise("run", found.contract.sha256, 1, b"")
        other = worker_of(found, VICTIM, tmp_path)

        class Slow(FileStore):
            """Saves after the second process had time to come as far."""

            def save(self, state: State) -> None:
                process.start()
                process.join(0.1)
                super().save(state)

        process = Thread(target=lambda: answers.append(other.advertise(message)))
        slow = Slow(tmp_path / "m000.sealed", identity)
        party = SecureParty(identity, found.members, 2, slow)
        found.workers[VICTIM]._secure = party
        first = found.workers[VICTIM].advertise(message)
        process.join(10)
        assert alike(first, answers[0])
        # one that had looked for an answer before there was any
        assert party.advertise(message, bytes(32), b"later") == (first.advert, first.head)
        assert found.stores[VICTIM].load().own_advert == first.advert

    def test_two_rosters(self, tmp_path: Path) -> None:
        """A merchant whose roster is being joined joins no other."""
        found = shops(tmp_path, 4, files=True)
        found.advertise()
        message, outcomes = found.share_message(VICTIM), list[Any]()
        fewer = replace(message, roster=message.roster[:3])
        other = worker_of(found, VICTIM, tmp_path)

        class Slow(FileStore):
            """Saves after the second process had time to come as far."""

            def save(self, state: State) -> None:
                process.start()
                process.join(0.1)
                super().save(state)

        process = Thread(target=lambda: outcomes.append(asked(other, "share", fewer)))
        identity = found.identities[VICTIM]
        slow = Slow(tmp_path / "m000.sealed", identity)
        found.workers[VICTIM]._secure = SecureParty(identity, found.members, 2, slow)
        assert found.workers[VICTIM].share(message).escrow
        process.join(10)
        assert outcomes == ["field 'roster': this session has its roster already"]
        assert len(entries_of(found.workers[VICTIM].ledger, "join")) == 1
