"""Tests of a ledger that is handed over to another key: nothing that was spent is forgotten."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.budget import Budget
from common.chain import is_signed, rekey_proof, signed_head
from common.errors import BudgetRefusal, LedgerError, ReplayRefusal, WireError
from common.identity import Identity
from common.ledger import Ledger, whole_run
from common.ledger_entries import read_ledger
from common.rotation import WITNESS, sign_rotation
from server.witness import Witness
from tests.ledgers import (
    BUDGET,
    CONTRACT,
    COORDINATOR,
    DAY,
    DELTA,
    MODEL,
    Shop,
    behind_its_back,
    charge,
    occasion,
)

GIVEN_UP = "was handed over from this key"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Give a merchant with a run that is under way."""
    shop = Shop(tmp_path / "shop")
    shop.reserve("run", [charge(20.0, 5)])
    shop.release(1)
    return shop


def rotate(shop: Shop, new: Identity | None = None) -> Identity:
    """Hand the ledger over, and tell the witness; return the old identity."""
    old, new = shop.identity, new or Identity.generate("shop")
    shop.ledger.rekey(new)
    shop.witness.rotate(sign_rotation("shop", old, new, 1))
    shop.identity, shop.key = new, new.public
    return old


class TestEntry:
    """The entry `rekey`."""

    def test_both_keys_sign(self, shop: Shop) -> None:
        """The old key signs the entry; the new one signs the head before it, and what follows."""
        before = shop.ledger.entries()[-1]
        old = rotate(shop)
        entry = shop.ledger.entries()[-1]
        document = entry.document
        assert (document["kind"], document["key"]) == ("rekey", shop.key.hex())
        head = signed_head(old.public, entry.seq, entry.link)
        assert is_signed(old.public, head, entry.signature)
        message = rekey_proof(old.public, shop.key, before.seq, before.link)
        assert is_signed(shop.key, message, bytes.fromhex(document["proof"]))
        shop.release(2)
        entry = shop.ledger.entries()[-1]
        assert is_signed(shop.key, signed_head(shop.key, entry.seq, entry.link), entry.signature)

    def test_it_tells_nothing_else(self, shop: Shop) -> None:
        """A witness that guesses cannot guess the rest of the entry."""
        rotate(shop)
        document = shop.ledger.entries()[-1].document
        assert document.keys() == {"kind", "key", "proof", "at", "salt"}

    def test_the_account_is_the_same(self, shop: Shop) -> None:
        """An entry of the ledger as a whole: no run is charged or closed by it."""
        before = shop.ledger.account()
        rotate(shop)
        assert shop.ledger.account() == before

    def test_another_merchants_key(self, shop: Shop) -> None:
        """A ledger stays its merchant's."""
        with pytest.raises(LedgerError, match="to a new key of 'shop' only"):
            shop.ledger.rekey(Identity.generate("other"))
        assert "rekey" not in shop.kinds()

    def test_a_key_comes_back_never(self, shop: Shop) -> None:
        """Neither the one of today nor one that was given up."""
        first = shop.identity
        rotate(shop)
        rotate(shop)
        for known in (first, shop.identity):
            with pytest.raises(LedgerError, match="a new key"):
                shop.ledger.rekey(known)
        assert shop.kinds().count("rekey") == 2

    def test_it_cannot_be_written(self, shop: Shop) -> None:
        """Where the entry does not reach the file, the old key goes on."""
        shop.ledger.close()
        with behind_its_back(shop.path) as file:
            file.execute(
                "CREATE TRIGGER full BEFORE INSERT ON entry WHEN instr(NEW.body, 'rekey') "
                "BEGIN SELECT RAISE(ABORT, 'the disk is full'); END"
            )
        with pytest.raises(LedgerError, match="the disk is full"):
            shop.ledger.rekey(Identity.generate("shop"))
        assert shop.ledger.identity is shop.identity
        shop.release(2)
        assert shop.opened().entries() == shop.ledger.entries()


class TestOpening:
    """Who may open the ledger afterwards."""

    def test_the_new_key(self, shop: Shop) -> None:
        """It reads and writes all there is."""
        old = rotate(shop)
        opened = shop.opened()
        assert opened.entries() == shop.ledger.entries()
        assert opened.identity is shop.identity
        stored = read_ledger(shop.path, BUDGET, shop.key)
        assert stored.account == shop.ledger.account()
        assert stored.keys == (old.public, shop.key)

    @pytest.mark.parametrize("later", [0, 2])
    def test_the_old_key(self, shop: Shop, later: int) -> None:
        """It is refused in words, right after the entry and later on."""
        old = rotate(shop)
        for number in range(later):
            shop.release(number + 2)
        for use in (
            lambda: Ledger(shop.path, BUDGET, old, COORDINATOR.public),
            lambda: read_ledger(shop.path, BUDGET, old.public),
        ):
            with pytest.raises(LedgerError, match=f"{GIVEN_UP} to {shop.key.hex()[:16]}"):
                use()

    def test_a_strangers_key(self, shop: Shop) -> None:
        """It is told what it always was told."""
        rotate(shop)
        stranger = Identity.generate("shop")
        with pytest.raises(LedgerError, match="another merchant's"):
            Ledger(shop.path, BUDGET, stranger, COORDINATOR.public)
        with pytest.raises(LedgerError, match="another merchant's"):
            read_ledger(shop.path, BUDGET, stranger.public)

    def test_several_keys(self, shop: Shop) -> None:
        """Each of the earlier ones is refused, the last one opens."""
        old = []
        for number in range(3):
            old.append(rotate(shop))
            shop.release(2 + number)
        assert read_ledger(shop.path, BUDGET, shop.key).keys == (
            *(one.public for one in old),
            shop.key,
        )
        for one in old:
            with pytest.raises(LedgerError, match=GIVEN_UP):
                read_ledger(shop.path, BUDGET, one.public)

    def test_a_process_that_has_the_old_key(self, shop: Shop) -> None:
        """It writes nothing more, however it is asked."""
        other = shop.opened()
        rotate(shop)
        before = shop.ledger.entries()
        uses: list[Callable[[], object]] = [
            lambda: other.reserve(whole_run("new", CONTRACT), [charge(60.0)], ("x", 1)),
            lambda: other.release(occasion(2), charge(), MODEL),
            lambda: other.settle("run"),
            lambda: other.rekey(Identity.generate("shop")),
            other.entries,
        ]
        for use in [*uses, *uses]:
            with pytest.raises(LedgerError, match=GIVEN_UP):
                use()
        assert shop.ledger.entries() == before

    def test_threads_of_one_process(self, shop: Shop) -> None:
        """While one thread hands the ledger over, no other signs with the old key."""
        failed: list[Exception] = []

        def reserve(name: str) -> None:
            try:
                for number in range(5):
                    what = whole_run(f"{name}{number}", CONTRACT)
                    shop.ledger.reserve(what, [charge(300.0)], ("x", 1))
            except LedgerError as error:
                failed.append(error)

        threads = [threading.Thread(target=reserve, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        rotate(shop)
        for thread in threads:
            thread.join()
        assert failed == []
        assert shop.opened().entries() == shop.ledger.entries()


class TestBudget:
    """What was spent before."""

    def test_the_cap_still_holds(self, shop: Shop) -> None:
        """A new key has no new budget."""
        with pytest.raises(BudgetRefusal):
            shop.ledger.reserve(whole_run("big", CONTRACT), [charge(5.0, 2)], ("x", 1))
        rotate(shop)
        for ledger in (shop.ledger, shop.opened()):
            with pytest.raises(BudgetRefusal, match="its cap is 1 "):
                ledger.reserve(whole_run("large", CONTRACT), [charge(5.0, 2)], ("x", 1))

    def test_nothing_is_released_twice(self, shop: Shop) -> None:
        """An occasion that the old key released is gone for the new one."""
        rotate(shop)
        with pytest.raises(ReplayRefusal):
            shop.opened().release(occasion(1), charge(), MODEL, "", shop.latest)

    def test_a_run_goes_on(self, shop: Shop) -> None:
        """The old key's reservation, and its countersignature, count for the new key."""
        rotate(shop)
        ledger = shop.opened()
        ledger.release(occasion(2), charge(), MODEL)
        ledger.settle("run")
        assert shop.kinds(ledger)[-2:] == ["release", "settle"]

    def test_expiry(self, tmp_path: Path) -> None:
        """A run expires by what the witness said of the old key's entries."""
        shop = Shop(tmp_path / "shop", replace(BUDGET, refresh_days=30.0))
        shop.reserve("old", [charge(5.0)])
        rotate(shop)
        for _ in range(2):
            shop.clock.now += 16 * DAY
            shop.witness_clock.now += 16 * DAY
            shop.ledger.accept(shop.witness.renewed(shop.key))
        shop.reserve("new", [charge(5.0)])
        assert shop.kinds().count("expire") == 1


class TestCountersignatures:
    """What a ledger takes from the witness."""

    def test_of_the_old_and_the_new_key(self, shop: Shop) -> None:
        """The ledger is one: what the witness said of either key's heads is of it."""
        before = shop.latest
        rotate(shop)
        assert shop.latest == before
        shop.ledger.accept(before)
        shop.ledger.accept(shop.witness.renewed(shop.key))
        shop.release(2)
        assert shop.opened().countersignatures() == shop.ledger.countersignatures()

    def test_of_a_stranger(self, shop: Shop) -> None:
        """Another ledger's are refused as before."""
        other = Shop(shop.folder / "other")
        other.reserve()
        rotate(shop)
        with pytest.raises(WireError, match="another merchant's ledger"):
            shop.ledger.accept(other.latest)

    def test_the_head_is_the_new_keys(self, shop: Shop) -> None:
        """Right after the entry, which the old key signed, the head is signed by the new one."""
        rotate(shop)
        head = shop.ledger.reserve(whole_run("run", CONTRACT), [charge()], ("x", 1), shop.latest)
        assert shop.kinds()[-1] == "rekey"
        assert head.is_of(shop.key)
        assert shop.refusal(head) == ""


class TestWitness:
    """The witness's own key changes."""

    def rotated(self, shop: Shop) -> tuple[Identity, Witness]:
        """Return a witness with a new key and the same record."""
        new = Identity.generate("coordinator")
        shop.witness.rotate(sign_rotation(WITNESS, COORDINATOR, new, 1))
        return new, Witness(shop.folder / "witness.sqlite", new, shop.witness_clock)

    def test_what_the_old_key_countersigned_stays_good(self, shop: Shop) -> None:
        """The run goes on by the countersignature that is kept, and by new ones."""
        new, witness = self.rotated(shop)
        shop.ledger.close()
        ledger = Ledger(shop.path, BUDGET, shop.identity, new.public, previous=[COORDINATOR.public])
        ledger.release(occasion(2), charge(), MODEL)
        head = ledger.release(occasion(3), charge(), MODEL, "", witness.latest(shop.key))
        assert witness.countersign({"shop": (shop.key, head)}) == {}
        ledger.accept(witness.latest(shop.key))
        assert len(ledger.countersignatures()) == 3

    def test_nothing_new_of_the_old_key(self, shop: Shop) -> None:
        """Whoever stole it countersigns nothing."""
        stolen = shop.witness.renewed(shop.key)
        new, _ = self.rotated(shop)
        ledger = Ledger(shop.path, BUDGET, shop.identity, new.public, previous=[COORDINATOR.public])
        with pytest.raises(WireError, match="pinned witness"):
            ledger.accept(stolen)

    def test_without_the_old_key(self, shop: Shop) -> None:
        """A merchant that does not know of the rotation opens nothing."""
        new, _ = self.rotated(shop)
        with pytest.raises(LedgerError, match="not of the pinned witness"):
            Ledger(shop.path, Budget(1.0, DELTA), shop.identity, new.public)
