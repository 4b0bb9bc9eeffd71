"""Tests of the ledger: real SQLite files, second processes, a real witness, clocks that jump."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.accounting import epsilon
from common.budget import WHOLE_RUN, Budget, Occasion
from common.chain import Countersignature, Head, is_signed, signed_head
from common.errors import (
    AccountingError,
    BudgetRefusal,
    LedgerError,
    ReplayRefusal,
    WireError,
    WitnessRefusal,
)
from common.events import GaussianSum
from common.identity import Identity
from common.ledger import Ledger, whole_run
from common.ledger_entries import read_ledger
from tests.ledgers import (
    BUDGET,
    CONTRACT,
    COORDINATOR,
    DAY,
    DELTA,
    MODEL,
    OTHER_CONTRACT,
    Shop,
    charge,
    charge_of,
    occasion,
)

LARGE = charge(5.0)  # epsilon 0.72: one fits the cap, two do not
ROSTER = "a" * 64


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Give a merchant with an empty ledger and a cap of epsilon 1."""
    return Shop(tmp_path / "shop")


def last_entry(shop: Shop) -> dict[str, Any]:
    """Return what the last entry says."""
    return shop.ledger.entries()[-1].document


def countersigned(shop: Shop, seq: int, at: float | None = None) -> bytes:
    """Return what the witness would say of an entry, whether or not it saw it."""
    link = shop.ledger.entries()[seq - 1].link
    body = Countersignature.statement(shop.key, seq, link, at or shop.witness_clock.now)
    return COORDINATOR.sign(Countersignature.signed(body)) + body


def reserve(shop: Shop, run: str, *charges: Any, ledger: Ledger | None = None) -> Head:
    """Reserve without the witness."""
    ledger = ledger or shop.ledger
    return ledger.reserve(whole_run(run, CONTRACT), charges or [LARGE], ("profile", 9), shop.latest)


class TestOpening:
    """Ledger.__init__."""

    def test_first_entry(self, shop: Shop) -> None:
        """A new ledger says whose it is, what one unit is, and which code keeps it."""
        (entry,) = shop.ledger.entries()
        document = entry.document
        assert (document["kind"], document["v"], document["merchant"]) == ("open", 1, "shop")
        assert document["key"] == shop.key.hex()
        assert {"ledger", "unit", "relation", "hansa", "code", "at"} <= document.keys()

    def test_every_ledger_is_another(self, tmp_path: Path) -> None:
        """Two ledgers of one merchant differ from the first entry on."""
        one = Shop(tmp_path / "one")
        other = Shop(tmp_path / "other", identity=one.identity)
        assert one.ledger.entries()[0].link != other.ledger.entries()[0].link

    def test_again(self, shop: Shop) -> None:
        """Opening again adds nothing."""
        assert shop.opened().entries() == shop.ledger.entries()

    def test_another_merchants(self, shop: Shop) -> None:
        """A ledger is read with its own key only."""
        stranger = Identity.generate("shop")
        with pytest.raises(LedgerError, match="not signed with this merchant's key"):
            Ledger(shop.path, BUDGET, stranger, COORDINATOR.public)
        with pytest.raises(LedgerError, match="another merchant's"):
            read_ledger(shop.path, BUDGET, stranger.public)

    def test_no_database(self, tmp_path: Path) -> None:
        """A file or a folder that is no database is an error that names it."""
        for path in (tmp_path / "text", tmp_path):
            if path != tmp_path:
                path.write_text("no database " * 100)
            with pytest.raises(LedgerError, match=path.name):
                Ledger(path, BUDGET, Identity.generate("shop"), b"")
            with pytest.raises(LedgerError, match=path.name):
                read_ledger(path, BUDGET, bytes(32))

    def test_a_ledger_of_the_first_version(self, tmp_path: Path) -> None:
        """A table of another shape is refused, not mistaken for an empty ledger."""
        path = tmp_path / "ledger.sqlite"
        with closing(sqlite3.connect(path)) as file:
            file.execute("CREATE TABLE entry (id INTEGER PRIMARY KEY, kind TEXT)")
            file.commit()
        with pytest.raises(LedgerError):
            Ledger(path, BUDGET, Identity.generate("shop"), b"")

    def test_entries_of_a_newer_version(self, shop: Shop) -> None:
        """A signed entry that this version cannot read is an error, not an entry less."""
        odd = {"kind": "reserve", "run": "x", "contract": CONTRACT, "last": ["x"], "releases": []}
        for entry in (odd, {**odd, "releases": ["x"], "last": ["x", 1]}):
            with (
                pytest.raises(LedgerError, match="cannot be read"),
                shop.ledger._transaction() as c,
            ):
                shop.ledger._append(c, entry)
            assert shop.kinds() == ["open"]

    def test_read_only(self, shop: Shop) -> None:
        """Reading writes nothing, needs no private key and gives the same account."""
        shop.reserve()
        shop.release()
        shop.ledger.close()
        before = shop.path.read_bytes()
        stored = read_ledger(shop.path, BUDGET, shop.key)
        assert shop.path.read_bytes() == before
        assert stored.entries == shop.ledger.entries()
        assert stored.account == shop.ledger.account()
        assert stored.countersignatures == shop.ledger.countersignatures()

    def test_every_entry_is_signed(self, shop: Shop) -> None:
        """Not the last entry alone: each was signed when it was made."""
        shop.reserve()
        shop.release()
        for entry in shop.ledger.entries():
            assert is_signed(
                shop.key, signed_head(shop.key, entry.seq, entry.link), entry.signature
            )


class TestReserve:
    """Ledger.reserve."""

    def test_entry(self, shop: Shop) -> None:
        """A reservation says what it is for, what it costs, and what that comes to."""
        shop.reserve("first", [charge(20.0)])
        shop.reserve("run", [charge(20.0, 4), charge(30.0, stage="census")], ("update", 4))
        entry = last_entry(shop)
        both = [charge(20.0, 5).event, charge(30.0).event]
        assert (entry["kind"], entry["run"], entry["contract"]) == ("reserve", "run", CONTRACT)
        assert entry["releases"][1]["stage"] == "census"
        assert entry["last"] == ["update", 4]
        assert entry["policy"] == BUDGET.document
        assert entry["before"] == pytest.approx(epsilon([charge(20.0).event], DELTA))
        assert entry["after"] == entry["lifetime"] == pytest.approx(epsilon(both, DELTA))

    def test_once_a_run(self, shop: Shop) -> None:
        """Asking again changes nothing, whatever is asked for."""
        first = reserve(shop, "run")
        assert reserve(shop, "run") == first
        assert reserve(shop, "run", charge(0.01)) == first
        assert shop.kinds() == ["open", "reserve"]

    def test_another_contract(self, shop: Shop) -> None:
        """A run has one contract."""
        reserve(shop, "run")
        with pytest.raises(BudgetRefusal, match="under another contract"):
            shop.ledger.reserve(whole_run("run", OTHER_CONTRACT), [LARGE], ("x", 1))
        assert shop.kinds() == ["open", "reserve"]

    def test_over_the_cap(self, shop: Shop) -> None:
        """What would pass the cap is refused, written down once, and costs nothing."""
        reserve(shop, "a")
        for _ in range(3):
            with pytest.raises(BudgetRefusal, match=r"the run would bring .* its cap is 1 "):
                reserve(shop, "b")
        assert shop.kinds() == ["open", "reserve", "refuse"]
        entry = last_entry(shop)
        assert (entry["run"], entry["stage"], "cap is 1" in entry["reason"]) == (
            "b",
            WHOLE_RUN,
            True,
        )
        reserve(shop, "c", charge(20.0))

    def test_reserved_and_never_released(self, shop: Shop) -> None:
        """A run that came to nothing stays charged, over restarts, until it is settled."""
        shop.reserve("a", [LARGE])
        for ledger in (shop.ledger, shop.opened()):
            with pytest.raises(BudgetRefusal):
                reserve(shop, "b", ledger=ledger)
        shop.ledger.settle("a")
        reserve(shop, "b")

    def test_finished_runs_are_settled(self, shop: Shop) -> None:
        """A run whose last sum was asked for gives back what it did not release."""
        shop.reserve("a", [LARGE], ("update", 7))
        shop.release(1, "a", cost=charge(50.0))
        with pytest.raises(BudgetRefusal):
            reserve(shop, "b")
        shop.release(7, "a", cost=charge(50.0))
        reserve(shop, "b")
        assert shop.kinds()[-2:] == ["settle", "reserve"]
        with pytest.raises(BudgetRefusal, match="comes too late"):
            shop.release(7, "a", attempt=1, cost=charge(50.0))

    def test_several_handles(self, shop: Shop) -> None:
        """Two processes share one budget."""
        other = shop.opened()
        reserve(shop, "a")
        with pytest.raises(BudgetRefusal):
            reserve(shop, "b", ledger=other)

    def test_head_extends_what_was_seen(self, shop: Shop) -> None:
        """The head leads from the entry that the witness saw to the last one."""
        shop.reserve("a", [charge(50.0)])
        head = reserve(shop, "b", charge(50.0))
        assert (head.since, head.seq, len(head.digests)) == (2, 3, 1)
        assert shop.refusal(head) == ""

    def test_what_the_accountants_refuse(self, shop: Shop) -> None:
        """An event without meaning is refused and reserves nothing."""
        odd = charge_of(GaussianSum(float("inf"), 1.0), GaussianSum(1.0, 1.0))
        with pytest.raises(BudgetRefusal, match="cannot be accounted for"):
            reserve(shop, "run", odd)
        assert "reserve" not in shop.kinds()

    def test_purposes(self, tmp_path: Path) -> None:
        """A cap on a purpose ends a run that the whole would pay for."""
        shop = Shop(tmp_path, Budget(1.0, DELTA, None, None, (("update", 0.5),)))
        with pytest.raises(BudgetRefusal, match="for 'update' alone, to epsilon"):
            reserve(shop, "run")
        reserve(shop, "run", charge(20.0), charge(6.0, stage="census"))

    def test_towards_server(self, tmp_path: Path) -> None:
        """A cap towards the server ends a run that sums would pay for."""
        shop = Shop(tmp_path, Budget(1.0, DELTA, 3.0))
        loud = charge_of(GaussianSum(20.0, 1.0), GaussianSum(1.7, 1.0))
        reserve(shop, "a", loud)
        with pytest.raises(BudgetRefusal, match="towards the server"):
            reserve(shop, "b", loud)

    def test_long_names(self, shop: Shop) -> None:
        """A run's name may be long, odd, or empty; it is a name all the same."""
        for run in ("x" * 65_536, "", "\ud800", 'a"b\\', "\x00"):
            shop.reserve(run, [charge(60.0)])
            shop.release(1, run, cost=charge(60.0))
            with pytest.raises(ReplayRefusal):
                shop.opened().release(occasion(1, run), charge(60.0), MODEL)


class TestRelease:
    """Ledger.release."""

    def test_entry(self, shop: Shop) -> None:
        """A release says everything that it was for."""
        shop.reserve()
        head = shop.release(3, attempt=2, step="r/7")
        entry = last_entry(shop)
        what = ("release", "run", "update", 3, 2, CONTRACT, MODEL, "r/7")
        names = ("kind", "run", "stage", "round", "attempt", "contract", "parameters", "step")
        assert tuple(entry[name] for name in names) == what
        assert entry["event"]["noise_multiplier"] == 20.0
        assert (head.seq, head.link) == (3, shop.ledger.entries()[-1].link)

    def test_without_a_reservation(self, shop: Shop) -> None:
        """Nothing is released for a run that reserved nothing; asking is written down."""
        with pytest.raises(BudgetRefusal, match="needs a reservation"):
            shop.ledger.release(occasion(), charge(), MODEL)
        assert shop.kinds() == ["open", "refuse"]

    def test_without_the_witness(self, shop: Shop) -> None:
        """A reservation that no witness countersigned releases nothing."""
        head = reserve(shop, "run")
        with pytest.raises(WitnessRefusal, match="did not countersign"):
            shop.ledger.release(occasion(), LARGE, MODEL)
        assert shop.kinds() == ["open", "reserve"]
        assert shop.refusal(head) == ""
        shop.ledger.release(occasion(), LARGE, MODEL, "", shop.latest)

    def test_witnessed_before_the_reservation(self, shop: Shop) -> None:
        """What the witness saw before the reservation is not enough."""
        shop.reserve("a", [charge(20.0)])
        reserve(shop, "b", charge(20.0))
        with pytest.raises(WitnessRefusal, match="did not countersign"):
            shop.ledger.release(occasion(run="b"), charge(), MODEL, "", shop.latest)

    def test_no_witness_pinned(self, tmp_path: Path) -> None:
        """Where no witness is pinned, nothing is ever released."""
        shop = Shop(tmp_path)
        ledger = Ledger(shop.path, BUDGET, shop.identity, b"")
        ledger.reserve(whole_run("run", CONTRACT), [LARGE], ("x", 1))
        with pytest.raises(WitnessRefusal):
            ledger.release(occasion(), LARGE, MODEL)
        with pytest.raises(WireError):
            ledger.release(occasion(), LARGE, MODEL, "", countersigned(shop, 2))

    def test_twice(self, shop: Shop) -> None:
        """An occasion is released once; asking again is written down once."""
        shop.reserve()
        shop.release()
        for ledger in (shop.ledger, shop.ledger, shop.opened()):
            with pytest.raises(ReplayRefusal, match="attempt 0, was released before"):
                ledger.release(occasion(), charge(), MODEL)
        assert shop.kinds() == ["open", "reserve", "release", "refuse"]

    @pytest.mark.parametrize("contract", [CONTRACT, OTHER_CONTRACT])
    def test_twice_under_any_contract(self, shop: Shop, contract: str) -> None:
        """Neither another contract nor another run's name gives a second release."""
        shop.reserve()
        shop.release()
        with pytest.raises(LedgerError):
            shop.ledger.release(occasion(contract=contract), charge(), MODEL)
        with pytest.raises(BudgetRefusal):
            shop.ledger.release(occasion(run="other", contract=contract), charge(), MODEL)

    def test_more_than_was_reserved(self, shop: Shop) -> None:
        """A run ends where its reservation ends, though the cap has room."""
        shop.reserve(charges=[charge(20.0, 2)])
        shop.release(1)
        shop.release(1, attempt=1)
        with pytest.raises(BudgetRefusal, match="round 1 would pass what this run reserved"):
            shop.release(1, attempt=2)
        assert shop.kinds()[-1] == "refuse"

    def test_attempts_without_end(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """All attempts beyond the plan are refused; not all of them are written down."""
        monkeypatch.setattr("common.budget._MOST_REFUSALS", 20)
        shop.reserve(charges=[charge(20.0)])
        shop.release(1)
        for attempt in range(1, 60):
            with pytest.raises(BudgetRefusal):
                shop.ledger.release(occasion(1, attempt=attempt), charge(), MODEL)
        assert shop.kinds().count("refuse") == 20
        with pytest.raises(BudgetRefusal):
            shop.ledger.release(occasion(2**31, attempt=10**30), charge(), MODEL)

    def test_runs_without_end(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nor does a coordinator that invents a run for every question fill the disk."""
        monkeypatch.setattr("common.budget._MOST_REFUSALS", 20)
        for run in range(60):
            with pytest.raises(BudgetRefusal):
                shop.ledger.release(occasion(run=f"run {run}"), charge(), MODEL)
        assert shop.kinds().count("refuse") == 20

    def test_settled(self, shop: Shop) -> None:
        """A run that was settled releases nothing more, also not in another process."""
        shop.reserve()
        shop.release(1)
        other = shop.opened()
        shop.ledger.settle("run")
        with pytest.raises(BudgetRefusal, match="comes too late"):
            other.release(occasion(2), charge(), MODEL, "", shop.latest)

    def test_steps(self, shop: Shop) -> None:
        """A step of a secure sum is masked once, in any run and after any restart."""
        shop.reserve()
        shop.reserve("other")
        shop.release(1, step=f"{ROSTER}/1")
        again = shop.opened()
        for what in (occasion(2), occasion(1, attempt=1), occasion(1, "other")):
            with pytest.raises(ReplayRefusal, match="was the session's file put back"):
                again.release(what, charge(), MODEL, f"{ROSTER}/1")
        again.release(occasion(2), charge(), MODEL, f"{ROSTER}/2")
        assert shop.kinds().count("release") == 2

    def test_plain_sums_have_no_steps(self, shop: Shop) -> None:
        """Any number of releases take no step."""
        shop.reserve()
        for number in range(3):
            shop.release(number)
        assert shop.kinds().count("release") == 3

    def test_nonsense(self, shop: Shop) -> None:
        """An event without meaning is an error, and others can write at once."""
        shop.reserve()
        with pytest.raises(AccountingError):
            shop.ledger.release(occasion(), charge(-1.0), MODEL)
        shop.opened().release(occasion(), charge(), MODEL)
        assert shop.kinds() == ["open", "reserve", "release"]


class TestAccept:
    """Ledger.accept, and what the other methods accept."""

    def test_kept_once(self, shop: Shop) -> None:
        """A countersignature is kept; the same or an older one again is not."""
        shop.reserve()
        old = shop.latest
        shop.release()
        shop.ledger.accept(shop.latest)
        for known in (shop.latest, old, b""):
            shop.ledger.accept(known)
        assert len(shop.ledger.countersignatures()) == 2

    def test_newer_time(self, shop: Shop) -> None:
        """The same entry seen again later is news; seen earlier it is none."""
        shop.reserve()
        for at in (10.0, -10.0):
            shop.ledger.accept(countersigned(shop, 2, shop.witness_clock.now + at))
        assert len(shop.ledger.countersignatures()) == 2

    def test_backup(self, shop: Shop) -> None:
        """A ledger that was put back does not hold what the witness saw: nothing is released."""
        shop.reserve()
        old = shop.copy("old.sqlite")
        shop.release(1)
        shop.ledger.close()
        shop.put_back(old)
        ledger = shop.opened()
        for ask in (
            lambda: ledger.accept(shop.latest),
            lambda: ledger.release(occasion(1), charge(), MODEL, "", shop.latest),
            lambda: ledger.join("run", 1, ROSTER, 3, shop.latest),
            lambda: reserve(shop, "other", charge(), ledger=ledger),
        ):
            with pytest.raises(WitnessRefusal, match="put back from a copy, or is one of two"):
                ask()
        assert shop.kinds(ledger) == ["open", "reserve"]

    def test_another_entry_with_the_same_number(self, shop: Shop) -> None:
        """Of two ledgers that were one, the one that the witness did not follow ends."""
        shop.reserve()
        copy = shop.opened(shop.copy("copy.sqlite"))
        shop.release(1)
        copy.release(occasion(1), charge(), MODEL)
        with pytest.raises(WitnessRefusal, match="an entry 3 that"):
            copy.release(occasion(2), charge(), MODEL, "", shop.latest)

    @pytest.mark.parametrize("raw", [b"x", bytes(64), bytes(200)])
    def test_forged(self, shop: Shop, raw: bytes) -> None:
        """What the pinned witness did not sign is refused by all methods and changes nothing."""
        shop.reserve()
        before = shop.ledger.entries()
        for ask in (
            lambda: shop.ledger.accept(raw),
            lambda: shop.ledger.release(occasion(), charge(), MODEL, "", raw),
            lambda: shop.ledger.join("run", 1, ROSTER, 3, raw),
            lambda: shop.ledger.reserve(whole_run("b", CONTRACT), [charge()], ("x", 1), raw),
        ):
            with pytest.raises(WireError, match="pinned witness"):
                ask()
        assert shop.ledger.entries() == before

    @pytest.mark.parametrize("seq", [0, 2**63, 2**70])
    def test_monstrous_numbers(self, shop: Shop, seq: int) -> None:
        """The true witness may count as it likes; that is a bad message and no crash."""
        body = Countersignature.statement(shop.key, seq, bytes(32), 5.0)
        with pytest.raises(WireError):
            shop.ledger.accept(COORDINATOR.sign(Countersignature.signed(body)) + body)

    def test_another_ledger_of_the_same_key(self, shop: Shop, tmp_path: Path) -> None:
        """What was seen of one ledger does not count for another one with the same key."""
        other = Shop(tmp_path / "other", identity=shop.identity)
        other.reserve()
        reserve(shop, "run")
        with pytest.raises(WitnessRefusal):
            shop.ledger.accept(other.latest)

    def test_changed_witness(self, shop: Shop) -> None:
        """With another witness pinned the ledger's own record of the old one is an error."""
        shop.reserve()
        with pytest.raises(LedgerError, match="not of the pinned witness"):
            Ledger(shop.path, BUDGET, shop.identity, Identity.generate("new").public)


class TestCheckAffordable:
    """Ledger.check_affordable."""

    def test_yes(self, shop: Shop) -> None:
        """What the caps pay for is not refused, and nothing is written."""
        shop.ledger.check_affordable(whole_run("run", CONTRACT), [LARGE])
        assert shop.kinds() == ["open"]

    def test_no(self, shop: Shop) -> None:
        """What they do not is refused; that is written down once."""
        reserve(shop, "a")
        for _ in range(2):
            with pytest.raises(BudgetRefusal, match="the run would bring"):
                shop.ledger.check_affordable(whole_run("b", CONTRACT), [LARGE])
        assert shop.kinds() == ["open", "reserve", "refuse"]

    def test_reserved_already(self, shop: Shop) -> None:
        """Of a run that is reserved nothing more is asked."""
        reserve(shop, "a")
        shop.ledger.check_affordable(whole_run("a", CONTRACT), [LARGE])

    def test_settles_finished_runs(self, shop: Shop) -> None:
        """What a finished run did not release is free."""
        shop.reserve("a", [LARGE], ("update", 1))
        shop.release(1, "a", cost=charge(50.0))
        shop.ledger.check_affordable(whole_run("b", CONTRACT), [LARGE])
        assert shop.kinds()[-1] == "settle"


class TestJoin:
    """Ledger.join."""

    def test_entry(self, shop: Shop) -> None:
        """A session is written down with its roster."""
        shop.reserve()
        head = shop.ledger.join("run", 4, ROSTER, 3, shop.latest)
        entry = last_entry(shop)
        assert (entry["kind"], entry["session"], entry["roster"], entry["members"]) == (
            "join",
            4,
            ROSTER,
            3,
        )
        assert shop.refusal(head) == ""

    def test_once(self, shop: Shop) -> None:
        """A roster is joined once, in any run."""
        shop.reserve()
        shop.ledger.join("run", 4, ROSTER, 3)
        with pytest.raises(ReplayRefusal):
            shop.opened().join("run", 5, ROSTER, 3)

    def test_needs_a_witnessed_reservation(self, shop: Shop) -> None:
        """Nothing is joined for a run without one."""
        with pytest.raises(BudgetRefusal, match="nothing is reserved"):
            shop.ledger.join("run", 1, ROSTER, 3)
        reserve(shop, "run")
        with pytest.raises(WitnessRefusal):
            shop.ledger.join("run", 1, ROSTER, 3)
        assert shop.kinds() == ["open", "reserve"]


class TestNoteSum:
    """Ledger.note_sum."""

    def test_first_note_stands(self, shop: Shop) -> None:
        """A sum is opened once; nothing said later changes who was in it."""
        shop.reserve()
        for survivors in (5, 50):
            shop.ledger.note_sum("run", "update", 1, 0, survivors)
        shop.ledger.note_sum("run", "update", 1, 1, 7)
        assert shop.opened().account().runs["run"].survivors == {
            ("update", 1, 0): 5,
            ("update", 1, 1): 7,
        }

    def test_costs_nothing_and_frees_nothing(self, shop: Shop) -> None:
        """A note changes no charge."""
        reserve(shop, "run")
        before = shop.ledger.account().spent()
        shop.ledger.note_sum("run", "update", 1, 0, 5)
        assert shop.ledger.account().spent() == before

    def test_unknown_run(self, shop: Shop) -> None:
        """Of a run without a reservation nothing is noted."""
        shop.ledger.note_sum("run", "update", 1, 0, 5)
        assert shop.kinds() == ["open"]

    def test_charges_after_it_are_safe(self, shop: Shop) -> None:
        """A note need not reach the disk at once; the next charge does again."""
        reserve(shop, "run")
        shop.ledger.note_sum("run", "update", 1, 0, 5)
        with shop.ledger._transaction() as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


class TestSettle:
    """Ledger.settle."""

    def test_gives_back(self, shop: Shop) -> None:
        """What was not released is free, what was released is not."""
        shop.reserve("a", [LARGE])
        shop.release(1, "a", cost=charge(20.0))
        shop.ledger.settle("a")
        shop.ledger.settle("a")
        assert shop.kinds().count("settle") == 1
        assert shop.ledger.account().spent() == pytest.approx(epsilon([charge(20.0).event], DELTA))

    def test_unknown_run(self, shop: Shop) -> None:
        """There is nothing to settle of a run without a reservation."""
        with pytest.raises(LedgerError, match="nothing is reserved for a run 'x"):
            shop.ledger.settle("x" * 1000)


class TestRefresh:
    """Runs that no longer count, by the merchant's clock and the witness's."""

    BUDGET = Budget(1.0, DELTA, None, 30.0)

    @pytest.fixture
    def shop(self, tmp_path: Path) -> Shop:
        """Give a merchant whose runs count for 30 days, with one of them today."""
        shop = Shop(tmp_path, self.BUDGET)
        shop.reserve("a", [LARGE])
        return shop

    def later(self, shop: Shop, own: float, witness: float | None) -> Callable[[], Head]:
        """Move the clocks by days; the witness's time is told, or not."""
        shop.clock.now += own * DAY
        if witness is not None:
            shop.witness_clock.now += witness * DAY
            shop.ledger.accept(shop.witness.renewed(shop.key))
        return lambda: reserve(shop, "b")

    def test_after_the_period(self, shop: Shop) -> None:
        """By both clocks over: it counts in the lifetime alone, and releases nothing more."""
        self.later(shop, 30, 30)()
        assert shop.kinds() == ["open", "reserve", "expire", "reserve"]
        entry = last_entry(shop)
        assert entry["before"] == 0.0
        assert entry["lifetime"] == pytest.approx(epsilon([LARGE.event] * 2, DELTA))
        with pytest.raises(BudgetRefusal, match="comes too late"):
            shop.release(1, "a", cost=LARGE)

    @pytest.mark.parametrize(
        ("own", "witness"),
        [(29.9, 29.9), (30, 29), (29, 30), (1e5, 0), (0, 1e5), (1e5, None), (-1e5, 1e5), (30, -30)],
    )
    def test_before_the_period_by_one_clock(
        self, shop: Shop, own: float, witness: float | None
    ) -> None:
        """While one clock says that the period is not over, it is not."""
        with pytest.raises(BudgetRefusal):
            self.later(shop, own, witness)()

    def test_without_a_period(self, tmp_path: Path) -> None:
        """By default a run counts for ever."""
        shop = Shop(tmp_path)
        shop.reserve("a", [LARGE])
        with pytest.raises(BudgetRefusal):
            self.later(shop, 1e5, 1e5)()

    def test_last_release_counts(self, shop: Shop) -> None:
        """A run is as old as its latest entry."""
        self.later(shop, 29, 29)
        shop.release(1, "a", cost=charge(50.0))
        shop.ledger.accept(shop.latest)
        with pytest.raises(BudgetRefusal):
            self.later(shop, 29, 29)()
        self.later(shop, 1, 1)()

    def test_entry_that_nobody_saw(self, shop: Shop) -> None:
        """A run whose last entry no witness saw does not grow old."""
        shop.ledger.release(occasion(1, "a"), charge(50.0), MODEL)
        with pytest.raises(BudgetRefusal):
            self.later(shop, 31, 31)()

    def test_a_wrong_clock_that_was_put_right(self, shop: Shop) -> None:
        """A future that the witness once told does not hurry what comes after."""
        shop.ledger.accept(countersigned(shop, 2, shop.witness_clock.now + 1e3 * DAY))
        shop.release(1, "a", cost=charge(50.0))
        shop.ledger.accept(shop.latest)
        with pytest.raises(BudgetRefusal):  # the witness is right again, the merchant is not
            self.later(shop, 31, 1)()

    def test_a_past_that_was_told_later(self, shop: Shop) -> None:
        """Nor does a past that it tells later make older what was charged."""
        shop.clock.now -= 1e3 * DAY  # the merchant's clock was wrong when it charged
        shop.reserve("c", [charge(50.0)])
        shop.ledger.settle("a")
        head = shop.ledger.release(occasion(1, "c"), charge(50.0), MODEL, "", shop.latest)
        assert shop.refusal(head) == ""
        shop.ledger.accept(shop.latest)
        shop.witness_clock.now -= 1e3 * DAY
        shop.ledger.note_sum("a", "update", 1, 0, 3)
        shop.ledger.accept(countersigned(shop, len(shop.ledger.entries())))
        shop.clock.now += 1e3 * DAY + 1 * DAY
        shop.witness_clock.now += 1e3 * DAY + 31 * DAY
        shop.ledger.accept(countersigned(shop, len(shop.ledger.entries())))
        reserve(shop, "e", charge(50.0))
        assert "expire" not in shop.kinds()

    def test_attests_after_a_run_that_came_to_its_end(self, shop: Shop) -> None:
        """What was noted after the last release, and never seen, keeps no run from growing old."""
        shop.release(1, "a", cost=LARGE)
        shop.ledger.note_sum("a", "update", 1, 0, 3)
        shop.ledger.settle("a")
        self.later(shop, 60, None)
        shop.ledger.check_affordable(whole_run("b", CONTRACT), [LARGE])
        shop.ledger.accept(shop.latest)  # when the last release was seen
        self.later(shop, 1, 61)()
        assert shop.kinds()[-2:] == ["expire", "reserve"]

    def test_check_affordable(self, shop: Shop) -> None:
        """Attesting looks at the merchant's clock alone and lets nothing expire."""
        self.later(shop, 31, None)
        shop.ledger.check_affordable(whole_run("b", CONTRACT), [LARGE])
        assert shop.kinds() == ["open", "reserve"]


class TestAppendOnly:
    """What SQL can do to the file."""

    @pytest.mark.parametrize("table", ["entry", "countersignature"])
    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE {t} SET body = x'00'",
            "UPDATE OR REPLACE {t} SET {k} = {k} + 1",
            "DELETE FROM {t}",
            "REPLACE INTO {t} SELECT * FROM {t} WHERE {k} = 1",
            "INSERT OR REPLACE INTO {t} SELECT * FROM {t}",
            "INSERT INTO {t} ({k}, body, link, signature) "
            "SELECT 99, body, link, signature FROM {t}",
        ],
    )
    def test_rows_stay(self, shop: Shop, table: str, statement: str) -> None:
        """Rows are neither changed, nor deleted, nor replaced, nor put out of order."""
        shop.reserve()
        before = shop.ledger.entries(), shop.ledger.countersignatures()
        shop.ledger.close()
        text = statement.format(t=table, k="seq" if table == "entry" else "number")
        if table == "countersignature":
            text = text.replace("link", "at").replace("(number, body", "(number, seq, body")
            text = text.replace("SELECT 99, body", "SELECT 99, seq, body")
        with closing(sqlite3.connect(shop.path)) as file:
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                file.execute(text)
            file.commit()
        assert (shop.ledger.entries(), shop.ledger.countersignatures()) == before


class TestTrouble:
    """Disks that are full, files that go away, threads."""

    def test_full_disk(self, shop: Shop) -> None:
        """What could not be written is not remembered either; with room again all goes on."""
        shop.reserve()
        with shop.ledger._transaction() as connection:
            (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"):  # noqa: PT012  # refusals are entries too
            for number in range(200):
                with suppress(BudgetRefusal):
                    shop.ledger.release(occasion(number, "x" * 3000), charge(), MODEL)
        connection.execute("PRAGMA max_page_count = 1000000")
        shop.release(1)
        assert read_ledger(shop.path, BUDGET, shop.key).entries == shop.ledger.entries()

    def test_commit_that_fails(self, shop: Shop) -> None:
        """Where SQLite undoes a transaction by itself, nothing of it is remembered."""
        shop.reserve()
        with (  # noqa: PT012
            pytest.raises(LedgerError, match="cannot be written"),
            shop.ledger._transaction() as connection,
        ):
            shop.ledger._append(connection, {"kind": "settle", "run": "run"})
            connection.execute("ROLLBACK")  # as a full disk may
        shop.release(1)
        assert shop.kinds() == ["open", "reserve", "release"]

    def test_any_exception_undoes(self, shop: Shop) -> None:
        """Whatever ends a transaction, half of it is never there."""
        shop.reserve()
        with (  # noqa: PT012
            pytest.raises(KeyboardInterrupt),
            shop.ledger._transaction() as connection,
        ):
            shop.ledger._append(connection, {"kind": "settle", "run": "run"})
            raise KeyboardInterrupt
        shop.opened().release(occasion(), charge(), MODEL)
        assert shop.kinds() == ["open", "reserve", "release"]

    def test_deleted_while_in_use(self, shop: Shop) -> None:
        """A file that goes away is an error; a running process makes no new one."""
        shop.reserve()
        shop.path.unlink()
        for ask in (shop.ledger.entries, lambda: shop.ledger.settle("run")):
            with pytest.raises(LedgerError, match="cannot be used"):
                ask()
        assert not shop.path.exists()

    def test_replaced_while_in_use(self, shop: Shop) -> None:
        """Another file in its place is found at the next use, older or altogether another."""
        old = shop.copy("old.sqlite")
        shop.reserve()
        shop.put_back(old)
        with pytest.raises(LedgerError, match="replaced while it was in use"):
            shop.ledger.entries()

    def test_replaced_by_a_copy_of_itself(self, shop: Shop) -> None:
        """The same entries in another file are the same ledger."""
        shop.reserve()
        shop.put_back(shop.copy("copy.sqlite"))
        shop.release(1)

    def test_threads(self, shop: Shop) -> None:
        """Threads take turns; each release is there once."""
        shop.reserve(charges=[charge(90.0, 60)])
        known, failures = shop.latest, []

        def work(part: int) -> None:
            try:
                for number in range(10):
                    shop.ledger.release(
                        occasion(number, attempt=part), charge(90.0), MODEL, "", known
                    )
            except LedgerError as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(part,)) for part in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert shop.kinds().count("release") == 40


def script(shop: Shop, body: str) -> list[str]:
    """Return the command of a second process with `shop` at hand."""
    key = shop.identity.key.private_bytes_raw().hex()
    start = f"""
        import os, sys, time
        from pathlib import Path
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from common.errors import *
        from common.identity import Identity
        from common.ledger import *
        from tests.ledgers import *
        key = Ed25519PrivateKey.from_private_bytes(bytes.fromhex({key!r}))
        identity, path = Identity("shop", key), Path({str(shop.path)!r})
        witness = bytes.fromhex({COORDINATOR.public.hex()!r})
        def opened(): return Ledger(path, BUDGET, identity, witness)
        """
    return [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(body)]


def start(shop: Shop, body: str) -> subprocess.Popen[str]:
    """Start a second process; it says `ready` and waits for a line."""
    return subprocess.Popen(
        script(shop, 'print("ready", flush=True)\nsys.stdin.readline()\n' + textwrap.dedent(body)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def race(racers: list[subprocess.Popen[str]]) -> list[str]:
    """Let processes go at once; return what they print, sorted."""
    for racer in racers:
        assert racer.stdout
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin
        racer.stdin.write("go\n")
        racer.stdin.flush()
    return sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)


class TestProcesses:
    """Several processes, and the death of one."""

    def test_race_for_the_last_of_the_budget(self, shop: Shop) -> None:
        """Of two processes that want what is left, exactly one gets it."""
        body = """
            try:
                opened().reserve(whole_run(str(os.getpid()), CONTRACT), [charge(5.0)], ("x", 1))
                print("won")
            except BudgetRefusal:
                print("lost")
            """
        assert race([start(shop, body), start(shop, body)]) == ["lost", "won"]
        assert shop.kinds() == ["open", "reserve", "refuse"]

    def test_made_by_several_at_once(self, tmp_path: Path) -> None:
        """Processes that make the same new ledger wait for each other, and make one."""
        shop = Shop(tmp_path / "shop")
        shop.ledger.close()
        shop.path.unlink()
        body = "print(len(opened().entries()), opened().entries()[0].link.hex())"
        answers = race([start(shop, body) for _ in range(3)])
        assert len(set(answers)) == 1
        assert shop.opened().entries()[0].link.hex() == answers[0][2:]

    def test_kill_after_a_release(self, shop: Shop) -> None:
        """A process killed right after a release was written leaves it spent."""
        shop.reserve()
        body = """
            opened().release(occasion(1), charge(), MODEL)
            print("written", flush=True)
            time.sleep(60)
            """
        victim = start(shop, body)
        assert victim.stdin
        assert victim.stdout
        victim.stdout.readline()
        victim.stdin.write("go\n")
        victim.stdin.flush()
        assert victim.stdout.readline() == "written\n"
        os.kill(victim.pid, signal.SIGKILL)
        victim.communicate()
        with pytest.raises(ReplayRefusal, match="released before"):
            shop.ledger.release(occasion(1), charge(), MODEL)

    def test_busy_for_too_long(self, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where another process does not let go, there is an error and no wait for ever."""
        monkeypatch.setattr("common.sqlite_file._PATIENCE_S", 0.05)
        ledger = shop.opened()
        ledger.close()
        with closing(sqlite3.connect(shop.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(LedgerError, match="locked"):
                ledger.entries()


class TestWholeRun:
    """What is in an entry, as documents."""

    def test_occasion(self) -> None:
        """A whole run has a stage of its own."""
        assert whole_run("run", CONTRACT) == Occasion("run", "reserve", 0, 0, CONTRACT)

    def test_bodies_are_what_was_hashed(self, shop: Shop) -> None:
        """Entries are kept as the bytes that were hashed: ASCII JSON with sorted keys."""
        shop.reserve()
        for entry in shop.ledger.entries():
            text = json.dumps(entry.document, sort_keys=True, separators=(",", ":"))
            assert text.encode("ascii") == entry.body

    def test_equal_entries_look_different(self, shop: Shop) -> None:
        """Who sees hashes alone cannot guess what entries say: each has a salt."""
        salts = [entry.document["salt"] for entry in (*shop.ledger.entries(), *self._two(shop))]
        assert len(set(salts)) == len(salts)

    @staticmethod
    def _two(shop: Shop) -> list[Any]:
        shop.reserve("a", [charge(50.0)])
        shop.reserve("b", [charge(50.0)])
        return shop.ledger.entries()[1:]

    def test_account_is_a_copy(self, shop: Shop) -> None:
        """What a caller does to the account does nothing to the ledger."""
        reserve(shop, "run")
        shop.ledger.account().runs.clear()
        with pytest.raises(BudgetRefusal):
            reserve(shop, "other")

    def test_identity(self, shop: Shop) -> None:
        """Whose ledger it is can be asked."""
        assert shop.ledger.identity == shop.identity

    def test_budget_is_the_callers(self, shop: Shop) -> None:
        """A policy that was edited counts from the next opening on, for all that was charged."""
        reserve(shop, "a")
        shop.budget = replace(BUDGET, epsilon=0.5)
        with pytest.raises(BudgetRefusal, match=r"its cap is 0\.5"):
            reserve(shop, "b", charge(60.0), ledger=shop.opened())
        shop.budget = replace(BUDGET, epsilon=5.0)
        reserve(shop, "b", ledger=shop.opened())
