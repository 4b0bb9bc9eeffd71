"""Tests of the witness: real ledgers whose heads it sees, in order, out of order and forged."""

import sqlite3
import tempfile
import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.chain import NO_LINK, Countersignature, Head, extended, signed_head
from common.errors import RunError, WitnessRefusal
from common.identity import Identity
from server.witness import Witness
from tests.ledgers import COORDINATOR, MODEL, Shop, charge, occasion

FORK = "does not extend entry"


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """Give a merchant with a run that is reserved and witnessed: entries 1 and 2."""
    shop = Shop(tmp_path / "shop")
    shop.reserve()
    return shop


def signed(identity: Identity, seq: int, link: bytes, since: int, digests: list[bytes]) -> Head:
    """Return a head that its merchant signed, true or not."""
    signature = identity.sign(signed_head(identity.public, seq, link))
    return Head(seq, link, signature, since, tuple(digests))


def release(shop: Shop, number: int, countersigned: bytes | None = None) -> Head:
    """Write a release down that the witness does not see yet."""
    known = shop.latest if countersigned is None else countersigned
    return shop.ledger.release(occasion(number), charge(), MODEL, "", known)


class TestCountersign:
    """Witness.countersign."""

    def test_extension(self, shop: Shop) -> None:
        """What extends the last head is countersigned, with the time of the witness's clock."""
        shop.witness_clock.now += 60
        head = release(shop, 1)
        assert shop.refusal(head) == ""
        seen = Countersignature.from_bytes(shop.latest).opened(COORDINATOR.public, shop.key)
        assert (seen.seq, seen.link, seen.at) == (3, head.link, shop.witness_clock.now)

    def test_several_entries_at_once(self, shop: Shop) -> None:
        """Heads that were lost are no matter: the next one extends what was seen."""
        lost = [release(shop, number) for number in range(5)]
        assert len(lost[-1].digests) == 5
        assert shop.refusal(lost[-1]) == ""

    def test_the_same_head_again(self, shop: Shop) -> None:
        """A head that comes twice is neither refused nor written twice."""
        head = release(shop, 1)
        assert [shop.refusal(head), shop.refusal(head)] == ["", ""]
        assert [line["seq"] for line in shop.witness.log()] == [2, 3]

    def test_older_head(self, shop: Shop) -> None:
        """A head before the last one is what a backup that was put back sends."""
        first, second = release(shop, 1), release(shop, 2)
        assert shop.refusal(second) == ""
        assert f"{FORK} 4" in shop.refusal(first)
        assert f"{FORK} 4" in shop.refusal(replace(first, since=first.seq, digests=()))

    def test_fork(self, shop: Shop) -> None:
        """Of two ledgers that were one, the second to come is refused, however it is told."""
        copy = shop.opened(shop.copy("copy.sqlite"))
        before = shop.latest
        release(shop, 1)
        assert shop.refusal(release(shop, 2)) == ""
        for number in range(3):  # the other one shorter, as long, longer
            head = copy.release(occasion(number), charge(), MODEL, "", before)
            assert FORK in shop.refusal(head)
            assert FORK in shop.refusal(replace(head, since=head.seq, digests=()))

    def test_new_ledger(self, shop: Shop) -> None:
        """A ledger that was deleted and begun anew does not extend anything."""
        shop.ledger.close()
        shop.path.unlink()
        for run in range(3):
            head = shop.opened().reserve(occasion(run=f"{run}"), [charge(50.0)], ("x", 1))
            assert FORK in shop.refusal(head)

    def test_another_key(self, shop: Shop) -> None:
        """A head that another merchant signed says nothing of this one's ledger."""
        head, other = release(shop, 1), Identity.generate("other")
        forged = replace(head, signature=other.sign(signed_head(shop.key, head.seq, head.link)))
        assert "not signed with this merchant's key" in shop.refusal(forged)
        assert shop.refusal(head) == ""

    def test_lies_about_what_is_between(self, shop: Shop) -> None:
        """Hashes must lead from what the witness knows to the head, over what it saw last."""
        head = release(shop, 1)
        odd = bytes(32)
        for digests in ([odd], [*head.digests, odd], []):
            forged = signed(shop.identity, 2 + len(digests), head.link, 2, digests)
            assert FORK in shop.refusal(forged)
        unknown = signed(shop.identity, 9, extended(b"", [odd] * 8), 1, [odd] * 8)
        assert FORK in shop.refusal(unknown)
        from_nothing = signed(shop.identity, 9, extended(NO_LINK, [odd] * 9), 0, [odd] * 9)
        assert FORK in shop.refusal(from_nothing)
        later = signed(shop.identity, 9, odd, 9, [])
        assert FORK in shop.refusal(later)

    def test_one_bad_head_in_a_batch(self, shop: Shop, tmp_path: Path) -> None:
        """The others' heads are countersigned; who is refused is named."""
        others = [Identity.generate(name) for name in ("a", "z")]
        heads = {one.merchant: (one.public, signed(one, 5, bytes(32), 5, [])) for one in others} | {
            "m": (shop.key, signed(shop.identity, 9, bytes(32), 9, []))
        }
        refused = shop.witness.countersign(heads)
        assert list(refused) == ["m"]
        assert [line["merchant"] for line in shop.witness.log()] == ["shop", "a", "z"]
        assert all(shop.witness.latest(one.public) for one in others)

    def test_two_runs_at_once(self, shop: Shop) -> None:
        """What a merchant was told last may be older than what was seen: both runs go on."""
        known = shop.latest
        for number in range(4):
            head = release(shop, number, known)  # the second run heard of entry 2 only
            assert head.since == 2
            assert shop.refusal(head) == ""
        assert [line["seq"] for line in shop.witness.log()] == [2, 3, 4, 5, 6]

    def test_two_processes(self, shop: Shop) -> None:
        """Two coordinators with one record remember as one: a copy gets on with neither."""
        other, before = shop.opened_witness(), shop.latest
        copy = shop.opened(shop.copy("copy.sqlite"))
        assert shop.refusal(release(shop, 1)) == ""
        for number in (1, 2, 3):  # `other` does not know of entry 3 by itself
            head = copy.release(occasion(number), charge(), MODEL, "", before)
            assert FORK in other.countersign({"shop": (shop.key, head)})["shop"]
        head = release(shop, 2)
        assert other.countersign({"shop": (shop.key, head)}) == {}
        assert shop.refusal(head) == ""
        assert other.latest(shop.key) == shop.latest

    def test_survives_a_restart(self, shop: Shop) -> None:
        """A coordinator that starts again remembers every ledger."""
        copy = shop.opened(shop.copy("copy.sqlite"))
        assert shop.refusal(release(shop, 1)) == ""
        before, shop.witness = shop.latest, shop.opened_witness()
        assert shop.latest == before
        fork = copy.release(occasion(2), charge(), MODEL, "", b"")
        assert FORK in shop.refusal(fork)
        assert shop.refusal(release(shop, 2)) == ""

    def test_its_own_record_was_put_back(self, shop: Shop) -> None:
        """A witness that forgot its last heads goes on with ledgers that remember them."""
        old = shop.folder / "old.sqlite"
        old.write_bytes((shop.folder / "witness.sqlite").read_bytes())
        for number in range(3):
            shop.release(number)
        old.replace(shop.folder / "witness.sqlite")
        shop.witness = shop.opened_witness()
        assert shop.refusal(release(shop, 4)) == ""
        shop.release(5)

    def test_its_own_record_was_put_back_in_use(self, shop: Shop) -> None:
        """A process that remembers more than its record holds countersigns nothing more."""
        copy = shop.opened(shop.copy("copy.sqlite"))
        before, path = shop.latest, shop.folder / "witness.sqlite"
        old = path.read_bytes()
        for number in range(3):
            shop.release(number)
        path.write_bytes(old)
        fork = copy.release(occasion(7), charge(), MODEL, "", before)
        other = shop.opened_witness()
        assert other.countersign({"shop": (shop.key, fork)}) == {}  # all that it can know
        known = shop.latest
        with pytest.raises(RunError, match="put back or replaced while it was in use"):
            shop.refusal(copy.release(occasion(8), charge(), MODEL, "", other.latest(shop.key)))
        assert shop.latest == known

    def test_threads(self, shop: Shop) -> None:
        """Whoever countersigns last is who is remembered last."""
        heads = [release(shop, number, shop.latest) for number in range(5)]
        seen = []

        def countersign(head: Head) -> None:
            shop.witness.countersign({"shop": (shop.key, head)})  # refused where it comes late
            seen.append(Countersignature.from_bytes(shop.latest))

        threads = [threading.Thread(target=countersign, args=(head,)) for head in heads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 5
        latest = shop.witness.log()[-1]
        held = Countersignature.from_bytes(shop.latest).opened(COORDINATOR.public, shop.key)
        assert (held.seq, held.link.hex()) == (latest["seq"], latest["link"])

    @settings(max_examples=12)
    @given(st.lists(st.tuples(st.sampled_from("rslc"), st.integers(0, 3)), max_size=12))
    def test_only_one_history(self, steps: list[tuple[str, int]]) -> None:
        """However copies, losses and restarts follow each other: one chain is countersigned."""
        with tempfile.TemporaryDirectory() as folder:
            shop = Shop(Path(folder))
            shop.reserve(charges=[charge(60.0, 100)])
            ledgers, known = [shop.ledger], [shop.latest]
            for number, (what, which) in enumerate(steps):
                ledger = ledgers[which % len(ledgers)]
                if what == "c":
                    shop.ledger.close()
                    ledgers.append(shop.opened(shop.copy(f"{number}.sqlite")))
                elif what == "s":
                    shop.witness = shop.opened_witness()
                else:
                    told = known[which % len(known)]
                    try:
                        head = ledger.release(occasion(number), charge(60.0), MODEL, "", told)
                    except WitnessRefusal:
                        continue
                    if what == "r" and shop.refusal(head) == "":
                        known.append(shop.latest)
            for ledger in ledgers:
                ledger.close()
            self._check_log(shop)

    @staticmethod
    def _check_log(shop: Shop) -> None:
        """One of the files holds every link that was countersigned."""
        told = {(line["seq"], line["link"]) for line in shop.witness.log()}
        files = [path for path in shop.folder.glob("*.sqlite") if path.name != "witness.sqlite"]
        held = []
        for path in files:
            with closing(sqlite3.connect(path)) as file:
                rows = file.execute("SELECT seq, hex(link) FROM entry").fetchall()
            held.append({(seq, link.lower()) for seq, link in rows})
        assert any(told <= one for one in held)


class TestRecord:
    """What is kept."""

    def test_log(self, shop: Shop) -> None:
        """The log holds everything that proves what was countersigned."""
        head = release(shop, 1)
        shop.refusal(head)
        line = shop.witness.log()[-1]
        assert (line["merchant"], line["seq"], line["link"]) == ("shop", 3, head.link.hex())
        assert line["signature"] == head.signature.hex()
        raw = bytes.fromhex(line["countersignature"]) + line["body"].encode()
        assert raw == shop.latest

    def test_unknown_merchant(self, shop: Shop) -> None:
        """Of a ledger that was never seen there is nothing to tell."""
        assert shop.witness.latest(bytes(32)) == b""
        assert shop.witness.renewed(bytes(32)) == b""

    def test_renewed(self, shop: Shop) -> None:
        """The last head with a newer time; nothing is written for it."""
        shop.witness_clock.now += 100
        seen = Countersignature.from_bytes(shop.witness.renewed(shop.key)).opened(
            COORDINATOR.public, shop.key
        )
        assert (seen.seq, seen.at) == (2, shop.witness_clock.now)
        assert len(shop.witness.log()) == 1

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE head SET seq = 1",
            "UPDATE OR REPLACE head SET link = zeroblob(32)",
            "DELETE FROM head",
            "REPLACE INTO head SELECT number, merchant, key, 9, link, signature, body, "
            "countersignature FROM head",
            "INSERT INTO head SELECT number + 1, merchant, key, seq, link, signature, body, "
            "countersignature FROM head",
            "INSERT INTO head SELECT number + 2, merchant, key, 9, link, signature, body, "
            "countersignature FROM head",
        ],
    )
    def test_stays(self, shop: Shop, statement: str) -> None:
        """What was witnessed is neither changed nor deleted, and numbers only rise."""
        with closing(sqlite3.connect(shop.folder / "witness.sqlite")) as file:
            with pytest.raises(sqlite3.IntegrityError, match="stays"):
                file.execute(statement)
            file.commit()
        assert [line["seq"] for line in shop.witness.log()] == [2]

    def test_cannot_be_written(self, shop: Shop) -> None:
        """Where a head cannot be remembered, nothing is countersigned."""
        head, before = release(shop, 1), shop.latest
        with closing(sqlite3.connect(shop.folder / "witness.sqlite")) as file:
            file.execute(
                "CREATE TRIGGER full BEFORE INSERT ON head BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        with pytest.raises(RunError, match=r"cannot be written \(full\)"):
            shop.refusal(head)
        assert shop.latest == before

    @pytest.mark.parametrize("content", [b"no database", b""])
    def test_no_record(self, tmp_path: Path, content: bytes) -> None:
        """A file that is no record is an error; an empty one is a new record."""
        path = tmp_path / "witness.sqlite"
        path.write_bytes(content)
        if content:
            with pytest.raises(RunError, match=r"witness\.sqlite"):
                Witness(path, COORDINATOR)
        else:
            assert Witness(path, COORDINATOR).log() == []

    def test_no_folder(self, tmp_path: Path) -> None:
        """A folder that is not there is an error."""
        with pytest.raises(RunError):
            Witness(tmp_path / "nowhere" / "witness.sqlite", COORDINATOR)


@pytest.mark.parametrize("durable", [True, False])
def test_it_remembers_whether_or_not_it_waits_for_the_disk(shop: Shop, durable: bool) -> None:
    """What it saw is there when it is opened again; a fork of the ledger is refused."""
    path = shop.folder / "witness.sqlite"
    shop.witness = Witness(path, COORDINATOR, shop.witness_clock, durable=durable)
    copy = shop.copy("copy.sqlite")
    assert shop.refusal(release(shop, 1)) == ""
    again = Witness(path, COORDINATOR, shop.witness_clock)
    assert again.log() == shop.witness.log()
    assert again.latest(shop.key) == shop.latest
    fork = shop.opened(copy).release(occasion(3), charge(), MODEL)
    assert FORK in shop.refusal(fork)
