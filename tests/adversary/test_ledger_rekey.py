"""Forged, missing, double and stolen handovers of a ledger, by whoever has which key."""

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from audit.ledger import check_chain
from common.chain import (
    NO_LINK,
    Entry,
    body_bytes,
    is_signed,
    link_after,
    rekey_proof,
    signed_head,
)
from common.errors import LedgerError, WireError, WitnessRefusal
from common.identity import Identity
from common.ledger import Ledger
from common.ledger_entries import checked_entries, read_ledger
from common.rotation import sign_rotation
from tests.ledgers import BUDGET, COORDINATOR, MODEL, Shop, behind_its_back, charge, occasion

FIRST, SECOND, THIRD, THIEF = (Identity.generate("shop") for _ in range(4))
FORK = "does not extend entry"


@dataclass
class Book:
    """A ledger as somebody writes it by hand, honest or not."""

    entries: list[Entry] = field(default_factory=list)

    @property
    def link(self) -> bytes:
        """Return the last link."""
        return self.entries[-1].link if self.entries else NO_LINK

    def add(self, signer: Identity, **document: Any) -> "Book":
        """Sign one more entry."""
        body = body_bytes({"at": 1.0, "salt": "5a" * 16, **document})
        seq, link = len(self.entries) + 1, link_after(self.link, body)
        signature = signer.sign(signed_head(signer.public, seq, link))
        self.entries.append(Entry(seq, body, link, signature))
        return self

    def proof(self, old: Identity, new: Identity) -> str:
        """Return what the new key signs to take over here."""
        message = rekey_proof(old.public, new.public, len(self.entries), self.link)
        return new.sign(message).hex()

    def rekey(self, old: Identity, new: Identity, **changes: Any) -> "Book":
        """Hand over, with fields changed."""
        fields = {"key": new.public.hex(), "proof": self.proof(old, new), **changes}
        return self.add(old, kind="rekey", **{k: v for k, v in fields.items() if v is not None})


def begun(owner: Identity = FIRST) -> Book:
    """Return a ledger of three entries."""
    book = Book().add(owner, kind="open", key=owner.public.hex(), merchant="shop")
    return book.add(owner, kind="settle", run="a").add(owner, kind="settle", run="b")


def handed_over() -> Book:
    """Return a ledger that was handed over once, honestly: entry 4 of 5."""
    return begun().rekey(FIRST, SECOND).add(SECOND, kind="settle", run="c")


def rows(book: Book) -> list[tuple[int, bytes, bytes, bytes]]:
    """Return the entries as a file stores them."""
    return [(one.seq, one.body, one.link, one.signature) for one in book.entries]


def found(book: Book, public: bytes) -> tuple[str, str]:
    """Return what the merchant's program finds, and what an auditor finds."""
    try:
        checked_entries(rows(book), public, "ledger")
        told = ""
    except LedgerError as error:
        told = str(error)
    broken = check_chain(book.entries, public)
    return told, "" if broken is None else f"{broken.code} {broken.seq}"


def test_an_honest_handover() -> None:
    """Nothing is found, with the key of today."""
    assert found(handed_over(), SECOND.public) == ("", "")
    twice = handed_over().rekey(SECOND, THIRD)
    assert found(twice, THIRD.public) == ("", "")
    assert found(twice.add(THIRD, kind="settle", run="d"), THIRD.public) == ("", "")


FORGED: dict[str, tuple[Callable[[], Book], Identity, str, str]] = {
    "somebody takes up a ledger that is not his": (
        lambda: begun().rekey(THIEF, THIEF).add(THIEF, kind="settle", run="c"),
        THIEF,
        "not signed with the key before",
        "entry-signature 4",
    ),
    "an entry of the thief's own without a handover": (
        lambda: begun().add(THIEF, kind="settle", run="c"),
        THIEF,
        "another merchant's",
        "entry-signature 1",
    ),
    "the opening rewritten for the thief's key": (
        lambda: (
            Book()
            .add(THIEF, kind="open", key=FIRST.public.hex())
            .rekey(FIRST, THIEF)
            .add(THIEF, kind="settle", run="c")
        ),
        THIEF,
        "",  # the links commit to it: found by the audit, and by the witness
        "entry-signature 1",
    ),
    "a spent ledger forced upon somebody": (
        lambda: begun().rekey(FIRST, SECOND, proof=begun().proof(FIRST, FIRST)),
        SECOND,
        "lacks the new key's signature over entry 3",
        "rekey-invalid 4",
    ),
    "no proof": (
        lambda: begun().rekey(FIRST, SECOND, proof=None),
        SECOND,
        "holds no proof",
        "rekey-invalid 4",
    ),
    "an empty proof": (
        lambda: begun().rekey(FIRST, SECOND, proof=""),
        SECOND,
        "holds no proof",
        "rekey-invalid 4",
    ),
    "a proof over another head": (
        lambda: begun().rekey(FIRST, SECOND, proof=Book(begun().entries[:2]).proof(FIRST, SECOND)),
        SECOND,
        "lacks the new key's signature",
        "rekey-invalid 4",
    ),
    "a proof for another ledger": (
        lambda: begun().rekey(FIRST, SECOND, proof=begun(THIRD).proof(THIRD, SECOND)),
        SECOND,
        "lacks the new key's signature",
        "rekey-invalid 4",
    ),
    "no key": (
        lambda: begun().rekey(FIRST, SECOND, key=None),
        SECOND,
        "names no key",
        "rekey-invalid 4",
    ),
    "a key in capitals": (
        lambda: begun().rekey(FIRST, SECOND, key=SECOND.public.hex().upper()),
        SECOND,
        "names no key",
        "rekey-invalid 4",
    ),
    "the same handover twice": (
        lambda: begun().rekey(FIRST, SECOND).rekey(FIRST, SECOND),
        SECOND,
        "not signed with the key before",
        "entry-signature 5",
    ),
    "the old key hands over once more": (
        lambda: begun().rekey(FIRST, SECOND).rekey(FIRST, THIEF),
        THIEF,
        "not signed with the key before",
        "entry-signature 5",
    ),
    "the old key goes on signing": (
        lambda: begun().rekey(FIRST, SECOND).add(FIRST, kind="settle", run="c"),
        SECOND,
        "not signed with this merchant's key",
        "entry-signature 5",
    ),
    "a handover to itself": (
        lambda: begun().rekey(FIRST, FIRST),
        FIRST,
        "given up before",
        "rekey-invalid 4",
    ),
    "back to a key that was given up": (
        lambda: begun().rekey(FIRST, SECOND).rekey(SECOND, FIRST),
        FIRST,
        "given up before",
        "rekey-invalid 5",
    ),
    "round to a key that was given up": (
        lambda: begun().rekey(FIRST, SECOND).rekey(SECOND, THIRD).rekey(THIRD, SECOND),
        SECOND,
        "given up before",
        "rekey-invalid 6",
    ),
    "out of order": (
        lambda: begun().rekey(SECOND, THIRD).rekey(FIRST, SECOND),
        THIRD,
        "not signed with the key before",
        "entry-signature 4",
    ),
    "shown with the key before": (
        handed_over,
        FIRST,
        "was handed over from this key",
        "rekey-invalid 4",
    ),
    "shown with a stranger's key": (
        handed_over,
        THIRD,
        "another merchant's",
        "rekey-invalid 4",
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_handovers(name: str) -> None:
    """Each is found by the merchant's own program, and by an auditor."""
    make, owner, told, code = FORGED[name]
    by_program, by_auditor = found(make(), owner.public)
    assert told in by_program
    assert bool(told) == bool(by_program)
    assert by_auditor == code


def test_a_handover_left_out() -> None:
    """Without its entry the later key's entries are somebody else's."""
    book = begun().add(SECOND, kind="settle", run="c")
    told, code = found(book, SECOND.public)
    assert "another merchant's" in told
    assert code


def test_a_handover_that_two_readers_could_read_apart() -> None:
    """JSON with a key twice: nobody takes it for a handover, an auditor takes it for nothing."""
    book = begun()
    head = len(book.entries) + 1
    body = b'{"kind":"rekey","key":"' + SECOND.public.hex().encode() + b'","kind":"settle"}'
    link = link_after(book.link, body)
    signature = FIRST.sign(signed_head(FIRST.public, head, link))
    book.entries.append(Entry(head, body, link, signature))
    assert found(book, FIRST.public) == ("", "")
    assert "another merchant's" in found(book, SECOND.public)[0]


@pytest.mark.parametrize("column", ["body", "link", "signature"])
def test_every_bit_of_a_handover(column: str) -> None:
    """Its own signature is checked, though later ones vouch for it."""
    book = handed_over()
    raw = getattr(book.entries[3], column)
    for bit in range(8 * len(raw)):
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << bit % 8
        other = Book(list(book.entries))
        other.entries[3] = replace(book.entries[3], **{column: bytes(changed)})
        told, code = found(other, SECOND.public)
        assert "entry 4" in told
        assert code.endswith(" 4")


class TestFiles:
    """Ledgers in files, with a witness that saw them."""

    @pytest.fixture
    def shop(self, tmp_path: Path) -> Shop:
        """Give a merchant that spent something."""
        shop = Shop(tmp_path / "shop")
        shop.reserve()
        shop.release(1)
        return shop

    def rotate(self, shop: Shop) -> Identity:
        """Hand over, as it should be; return the old identity."""
        old, new = shop.identity, Identity.generate("shop")
        shop.ledger.rekey(new)
        shop.witness.rotate(sign_rotation("shop", old, new, 1))
        shop.identity, shop.key = new, new.public
        return old

    def test_a_new_ledger_for_the_new_key(self, shop: Shop) -> None:
        """A key that takes over without the ledger is refused: the witness wants the old one."""
        new = Identity.generate("shop")
        shop.witness.rotate(sign_rotation("shop", shop.identity, new, 1))
        fresh = Ledger(shop.folder / "fresh.sqlite", BUDGET, new, COORDINATOR.public)
        for run in range(4):
            head = fresh.reserve(occasion(run=f"{run}"), [charge(50.0)], ("x", 1))
            assert FORK in shop.witness.countersign({"shop": (new.public, head)})["shop"]
        with pytest.raises((WitnessRefusal, WireError)):
            fresh.accept(shop.witness.latest(new.public))
        with pytest.raises(WitnessRefusal):
            fresh.accept(shop.witness.renewed(new.public))

    def test_a_copy_from_before(self, shop: Shop) -> None:
        """The old key with the old ledger, or the new key with it: both come too late."""
        copy = shop.copy("copy.sqlite")
        again = Path(shutil.copy(copy, shop.folder / "again.sqlite"))
        old = self.rotate(shop)
        shop.release(2)
        thief = Ledger(copy, BUDGET, old, COORDINATOR.public, shop.clock)
        head = thief.release(occasion(3), charge(), MODEL)
        assert "gave up" in shop.witness.countersign({"shop": (old.public, head)})["shop"]
        with pytest.raises((WireError, WitnessRefusal)):
            thief.accept(shop.latest)
        forked = Ledger(again, BUDGET, old, COORDINATOR.public, shop.clock)
        forked.rekey(shop.identity)
        assert FORK in shop.refusal(forked.release(occasion(3), charge(), MODEL))
        with pytest.raises(WitnessRefusal):
            forked.accept(shop.latest)

    def test_the_thief_of_the_old_key(self, shop: Shop) -> None:
        """After the rotation it hands over nothing, whatever copy it has."""
        copy = shop.copy("copy.sqlite")
        old = self.rotate(shop)
        stolen = Ledger(copy, BUDGET, old, COORDINATOR.public, shop.clock)
        stolen.rekey(THIEF)
        with pytest.raises(Exception, match="given up before"):
            shop.witness.rotate(sign_rotation("shop", old, THIEF, 2))
        head = stolen.release(occasion(3), charge(), MODEL)
        told = shop.witness.countersign({"shop": (THIEF.public, head)})
        assert told == {}  # a ledger of its own, under a key that nobody enrolled
        assert shop.witness.exchanged({"shop": THIEF.public}) == ["shop"]
        shop.release(2)

    def test_the_handover_is_cut_off(self, shop: Shop) -> None:
        """The witness's word beside the entries tells that some are gone."""
        old = self.rotate(shop)
        shop.release(2)
        shop.ledger.accept(shop.latest)
        shop.ledger.close()
        with behind_its_back(shop.path) as file:
            file.execute("DELETE FROM entry WHERE seq > 3")
        with pytest.raises(LedgerError, match=r"was changed|does not hold"):
            Ledger(shop.path, BUDGET, old, COORDINATOR.public)
        with pytest.raises(LedgerError, match="not signed with this merchant's key"):
            read_ledger(shop.path, BUDGET, shop.key)

    def test_a_handover_in_the_file_that_nobody_signed(self, shop: Shop) -> None:
        """Whoever can write the file, and has no key, hands nothing over."""
        shop.ledger.close()
        book = Book([Entry(*row) for row in self.stored(shop.path)])
        book.rekey(THIEF, THIEF)
        with behind_its_back(shop.path) as file:
            file.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", rows(book)[-1])
        for identity in (shop.identity, THIEF):
            with pytest.raises(LedgerError, match="not signed with the key before"):
                Ledger(shop.path, BUDGET, identity, COORDINATOR.public)

    def stored(self, path: Path) -> list[tuple[int, bytes, bytes, bytes]]:
        """Return the entries in a file."""
        with closing(sqlite3.connect(path)) as file:
            return file.execute(
                "SELECT seq, body, link, signature FROM entry ORDER BY seq"
            ).fetchall()


def test_the_proof_is_no_head() -> None:
    """Labels keep what a key signs apart: a proof is no signature of an entry, nor back."""
    book = begun()
    proof = bytes.fromhex(book.proof(FIRST, SECOND))
    assert not is_signed(SECOND.public, signed_head(SECOND.public, 3, book.link), proof)
    message = rekey_proof(FIRST.public, SECOND.public, 3, book.link)
    assert not is_signed(FIRST.public, message, book.entries[-1].signature)
