"""Tests of the witness where keys are rotated: one ledger, one chain, whatever key signs."""

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from common.chain import Countersignature, Head, signed_head
from common.errors import ArchiveError, IdentityError
from common.identity import Identity
from common.rotation import WITNESS, sign_rotation
from server.witness import Witness
from tests.ledgers import COORDINATOR, MODEL, Shop, charge, occasion

FORK = "does not extend entry"
GIVEN_UP = "a key that the merchant gave up"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Give a merchant with a run that is reserved and witnessed: entries 1 and 2."""
    shop = Shop(tmp_path / "shop")
    shop.reserve()
    return shop


def release(shop: Shop, number: int, known: bytes | None = None) -> Head:
    """Write a release down that the witness does not see yet."""
    return shop.ledger.release(
        occasion(number), charge(), MODEL, "", shop.latest if known is None else known
    )


def rekey(shop: Shop) -> Identity:
    """Hand the ledger over; the witness does not know; return the old identity."""
    old, new = shop.identity, Identity.generate("shop")
    shop.ledger.rekey(new)
    shop.identity, shop.key = new, new.public
    return old


class TestMerchant:
    """A merchant's key."""

    def test_the_new_key_goes_on(self, shop: Shop) -> None:
        """Its first head extends what was seen of the old key, over the entry `rekey`."""
        known = shop.latest
        old = rekey(shop)
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        head = release(shop, 1, known)
        assert (head.since, head.seq) == (2, 4)
        assert shop.refusal(head) == ""
        seen = Countersignature.from_bytes(shop.latest).opened(COORDINATOR.public, shop.key)
        assert (seen.seq, seen.link) == (4, head.link)
        assert shop.refusal(release(shop, 2)) == ""

    def test_the_old_key_signs_no_more(self, shop: Shop) -> None:
        """Its heads are refused, also those that extend all that was seen."""
        other, known = shop.opened(), shop.latest
        old, key = shop.identity, shop.key
        head = other.release(occasion(1), charge(), MODEL, "", known)
        shop.witness.rotate(sign_rotation("shop", old, Identity.generate("shop"), 1))
        assert GIVEN_UP in shop.witness.countersign({"shop": (key, head)})["shop"]
        assert shop.witness.latest(key) == known

    def test_without_a_rotation(self, shop: Shop) -> None:
        """A key that no statement names is a stranger's: it is told before a run begins."""
        assert shop.witness.exchanged({"shop": shop.key, "new": bytes(32)}) == []
        old = rekey(shop)
        assert shop.witness.exchanged({"shop": shop.key}) == ["shop"]
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        assert shop.witness.exchanged({"shop": shop.key}) == []

    def test_another_head_of_the_new_key(self, shop: Shop) -> None:
        """What does not extend the old key's head is refused, however it is told."""
        before, copy = shop.latest, shop.copy("copy.sqlite")
        shop.release(1)
        old = rekey(shop)
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        other = replace(shop, folder=shop.folder / "other", identity=old).opened(copy)
        other.rekey(shop.identity)
        for number in range(3):
            head = other.release(occasion(number), charge(), MODEL, "", before)
            assert FORK in shop.refusal(head)
            assert FORK in shop.refusal(replace(head, since=head.seq, digests=()))
        assert shop.refusal(release(shop, 2)) == ""

    def test_the_rekey_entry_itself(self, shop: Shop) -> None:
        """A head may end there; it is the new key's."""
        known = shop.latest
        old = rekey(shop)
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        head = shop.ledger.reserve(occasion(), [charge()], ("update", 99), known)
        assert head.seq == 3
        forged = old.sign(signed_head(old.public, head.seq, head.link))
        assert "not signed" in shop.refusal(replace(head, signature=forged))
        assert shop.refusal(head) == ""

    def test_an_unseen_key(self, shop: Shop) -> None:
        """A merchant may change its key before any run."""
        first, second = Identity.generate("new"), Identity.generate("new")
        shop.witness.rotate(sign_rotation("new", first, second, 1))
        new = Shop(shop.folder / "new", identity=second)
        head = new.ledger.reserve(occasion(), [charge()], ("update", 99))
        assert shop.witness.countersign({"new": (second.public, head)}) == {}

    def test_several_rotations(self, shop: Shop) -> None:
        """The chain of keys is followed to its end, also where nothing came in between."""
        known = shop.latest
        for _ in range(3):
            old = rekey(shop)
            shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        assert shop.latest == known
        assert shop.refusal(release(shop, 1, known)) == ""
        late = release(shop, 2, known)  # tells how it extends what the first key's head was
        assert late.since == 2
        assert shop.refusal(late) == ""
        renewed = Countersignature.from_bytes(shop.witness.renewed(shop.key))
        assert renewed.opened(COORDINATOR.public, shop.key).seq == late.seq

    def test_after_a_restart(self, shop: Shop) -> None:
        """A witness that starts again, and another process, know all of it."""
        other = shop.opened_witness()
        old = rekey(shop)
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        head = release(shop, 1, b"")
        forged = Head(3, head.link, old.sign(signed_head(old.public, 3, head.link)), 3, ())
        for witness in (other, shop.opened_witness()):
            assert GIVEN_UP in witness.countersign({"shop": (old.public, forged)})["shop"]
        shop.witness = shop.opened_witness()
        assert [one.new for one in shop.witness.rotations()] == [shop.key]
        assert FORK in shop.refusal(head)  # it does not tell how it extends entry 2
        assert shop.refusal(release(shop, 2)) == ""

    def test_once_more(self, shop: Shop) -> None:
        """A statement that comes twice changes nothing."""
        one = sign_rotation("shop", shop.identity, Identity.generate("shop"), 1)
        shop.witness.rotate(one)
        shop.witness.rotate(one)
        assert shop.witness.rotations() == (one,)


class TestRefusals:
    """Statements that are not taken in."""

    def test_forged(self, shop: Shop) -> None:
        """Both signatures are checked."""
        one = sign_rotation("shop", shop.identity, Identity.generate("shop"), 1)
        for forged in (replace(one, by_old=one.by_new), replace(one, at=2)):
            with pytest.raises(IdentityError, match="not signed"):
                shop.witness.rotate(forged)
        assert shop.refusal(release(shop, 1)) == ""

    def test_the_old_key_twice(self, shop: Shop) -> None:
        """Whoever stole it comes too late."""
        old = shop.identity
        shop.witness.rotate(sign_rotation("shop", old, Identity.generate("shop"), 1))
        with pytest.raises(IdentityError, match="given up before"):
            shop.witness.rotate(sign_rotation("shop", old, Identity.generate("shop"), 2))

    def test_a_key_with_a_ledger(self, shop: Shop) -> None:
        """Two ledgers do not become one: what the first one holds would be forgotten."""
        other = Shop(shop.folder / "other", identity=Identity.generate("other"))
        head = other.ledger.reserve(occasion(), [charge()], ("update", 99))
        shop.witness.countersign({"other": (other.key, head)})
        for merchant in ("shop", "other"):
            with pytest.raises(IdentityError, match="seen before"):
                shop.witness.rotate(sign_rotation(merchant, shop.identity, other.identity, 1))

    def test_a_key_that_was_given_up(self, shop: Shop) -> None:
        """It takes over from nobody."""
        old, new = shop.identity, Identity.generate("shop")
        shop.witness.rotate(sign_rotation("shop", old, new, 1))
        for one, other in (
            (new, old),
            (Identity.generate("b"), old),
            (Identity.generate("b"), new),
        ):
            with pytest.raises(IdentityError, match="seen before"):
                shop.witness.rotate(sign_rotation("b", one, other, 2))

    def test_in_another_merchants_name(self, shop: Shop) -> None:
        """A ledger that was seen is its merchant's."""
        with pytest.raises(IdentityError, match="another merchant's"):
            shop.witness.rotate(sign_rotation("b", shop.identity, Identity.generate("b"), 1))

    def test_its_record_cannot_be_changed(self, shop: Shop) -> None:
        """Neither what was rotated, nor that the old key signs no more."""
        shop.witness.rotate(sign_rotation("shop", shop.identity, Identity.generate("shop"), 1))
        with closing(sqlite3.connect(shop.folder / "witness.sqlite")) as file:
            for statement in (
                "DELETE FROM rotation",
                "UPDATE rotation SET new = old",
                "INSERT INTO head SELECT number + 1, merchant, key, seq + 1, link, signature, "
                "body, countersignature FROM head",
            ):
                with pytest.raises(sqlite3.IntegrityError, match=r"stays|signs no more"):
                    file.execute(statement)

    def test_a_record_of_an_earlier_version(self, shop: Shop) -> None:
        """It is taken up as it is."""
        with closing(sqlite3.connect(shop.folder / "witness.sqlite")) as file:
            file.execute("DROP TRIGGER head_not_of_old_key")
            file.execute("DROP TABLE rotation")
            file.commit()
        shop.witness = shop.opened_witness()
        assert shop.refusal(release(shop, 1)) == ""
        old = rekey(shop)
        shop.witness.rotate(sign_rotation("shop", old, shop.identity, 1))
        assert shop.refusal(release(shop, 2)) == ""


class TestOwnKey:
    """The witness's own key."""

    def rotated(self, shop: Shop) -> tuple[Identity, Witness]:
        """Return the new key, and a witness that has it."""
        new = Identity.generate("coordinator")
        shop.witness.rotate(sign_rotation(WITNESS, COORDINATOR, new, 1))
        return new, Witness(shop.folder / "witness.sqlite", new, shop.witness_clock)

    def test_what_was_seen_is_countersigned_anew(self, shop: Shop) -> None:
        """Merchants take nothing new of the old key."""
        new, witness = self.rotated(shop)
        shop.witness_clock.now += 60
        found = Countersignature.from_bytes(witness.latest(shop.key))
        seen = found.opened(new.public, shop.key)
        assert (seen.seq, seen.at) == (2, shop.witness_clock.now)

    def test_a_process_with_the_old_key(self, shop: Shop) -> None:
        """It countersigns nothing more, and says why."""
        head = release(shop, 1)
        _, witness = self.rotated(shop)
        for use in (lambda: shop.refusal(head), lambda: shop.witness.renewed(shop.key)):
            with pytest.raises(ArchiveError, match="start it again"):
                use()
        assert len(witness.log()) == 1

    def test_it_goes_on(self, shop: Shop) -> None:
        """New heads are countersigned with the new key only."""
        new, witness = self.rotated(shop)
        head = shop.ledger.release(occasion(1), charge(), MODEL, "", shop.latest)
        assert witness.countersign({"shop": (shop.key, head)}) == {}
        seen = Countersignature.from_bytes(witness.latest(shop.key))
        assert seen.opened(new.public, shop.key).seq == 3
