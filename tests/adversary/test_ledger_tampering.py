"""What a careless merchant, a broken disk or a patient forger does to a ledger's file is found."""

# ruff: noqa: S311, S608  # chance that can be repeated; SQL is the attack

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from common.chain import NO_LINK, Entry, is_signed, link_after, signed_head
from common.errors import LedgerError, WitnessRefusal
from common.identity import Identity
from common.ledger import Ledger
from common.ledger_entries import checked_entries, read_ledger
from tests.ledgers import COORDINATOR, MODEL, Shop, behind_its_back, charge, occasion

ENTRIES = 50
CHANGED = "was changed, or is missing"
NOT_SIGNED = "is not signed with this merchant's key"
NOT_HELD = "put back from a copy, or is one of two"
FORK = "does not extend entry"
Row = tuple[int, bytes, bytes, bytes]


def filled(folder: Path, entries: int = ENTRIES) -> Shop:
    """Return a merchant with a ledger of so many entries, of every kind, all of them witnessed."""
    shop = Shop(folder)
    shop.reserve("first", [charge(60.0, 3)], ("update", 3))
    shop.ledger.join("first", 1, "a" * 64, 3, shop.latest)
    shop.release(3, "first", cost=charge(60.0), step="a/1")
    shop.ledger.note_sum("first", "update", 3, 0, 3)
    shop.reserve("second", [charge(60.0, 99)])
    with pytest.raises(LedgerError):
        shop.release(1, "second", cost=charge(1.0))
    for number in range(entries - len(shop.ledger.entries())):
        shop.release(number, "second", cost=charge(60.0))
    shop.ledger.accept(shop.latest)
    shop.ledger.close()
    with closing(sqlite3.connect(shop.path)) as file:
        file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return shop


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Give the merchant; no test changes its files."""
    shop = filled(tmp_path_factory.mktemp("original"))
    kinds = set(shop.kinds())
    shop.ledger.close()
    assert {"open", "reserve", "join", "release", "sum", "settle", "refuse"} <= kinds
    return shop


@pytest.fixture
def copy(original: Shop, tmp_path: Path) -> Path:
    """Give a copy of the ledger's file to be tampered with."""
    return Path(shutil.copy(original.path, tmp_path / "ledger.sqlite"))


def rows_of(path: Path) -> list[Row]:
    """Return all entries as they are stored."""
    with closing(sqlite3.connect(path)) as file:
        return file.execute("SELECT seq, body, link, signature FROM entry ORDER BY seq").fetchall()


def finding(shop: Shop, path: Path) -> str:
    """Return what opening finds; whoever only reads must find the same."""
    found = []
    for use in (
        lambda: read_ledger(path, shop.budget, shop.key),
        lambda: shop.opened(path).close(),
    ):
        try:
            use()
            found.append("")
        except LedgerError as error:
            found.append(str(error))
    read, opened = found
    assert opened or not read, "reading finds something that opening does not"
    return opened


def tampered(path: Path, *statements: str) -> None:
    """Change a file behind the triggers' back."""
    with behind_its_back(path) as file:
        for statement in statements:
            file.executescript(statement)


def flipped(raw: bytes, bit: int) -> bytes:
    """Return bytes with one bit flipped."""
    changed = bytearray(raw)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def bits_of(rows: list[Row]) -> Iterator[tuple[int, int, int]]:
    """Yield (row, column, bit) of everything that is stored of the entries."""
    for number, row in enumerate(rows):
        for column in (1, 2, 3):
            yield from ((number, column, bit) for bit in range(8 * len(row[column])))


def check_flip(shop: Shop, rows: list[Row], number: int, column: int, bit: int) -> None:
    """Flip a bit: reading finds the entry; of an older signature every signature's check does."""
    row = list(rows[number])
    row[column] = flipped(row[column], bit)  # type: ignore[arg-type]
    changed = (*row,)
    every = [*rows[:number], changed, *rows[number + 1 :]]
    if column == 3 and number < len(rows) - 1:
        seq, _, link, signature = changed
        assert not is_signed(shop.key, signed_head(shop.key, seq, link), signature)
        return
    # what comes later is not looked at: the first wrong entry is named
    part = every if column == 3 else every[: number + 1]
    with pytest.raises(LedgerError) as caught:
        checked_entries(part, shop.key, "ledger")
    assert f"entry {number + 1} " in str(caught.value)
    assert (NOT_SIGNED if column == 3 else CHANGED) in str(caught.value)


class TestBits:
    """One bit of what is stored."""

    def test_some_flips(self, original: Shop) -> None:
        """A sample of all bits of bodies, links and signatures: each flip is found."""
        rows = rows_of(original.path)
        for place in random.Random(1).sample(list(bits_of(rows)), 1500):
            check_flip(original, rows, *place)

    @pytest.mark.slow
    def test_every_flip(self, original: Shop) -> None:
        """Every single bit of fifty entries."""
        rows = rows_of(original.path)
        count = 0
        for place in bits_of(rows):
            check_flip(original, rows, *place)
            count += 1
        assert count > 8 * ENTRIES * (150 + 32 + 64)

    @pytest.mark.parametrize("column", ["body", "link", "signature"])
    @pytest.mark.parametrize("seq", [1, 25, ENTRIES])
    def test_in_the_file(self, original: Shop, copy: Path, column: str, seq: int) -> None:
        """The same through the file: found on opening, with the entry's number."""
        rows = rows_of(copy)
        value = flipped(rows[seq - 1][["body", "link", "signature"].index(column) + 1], 77)
        with behind_its_back(copy) as file:
            file.execute(f"UPDATE entry SET {column} = ? WHERE seq = ?", (value, seq))
        if column == "signature":
            expected = NOT_SIGNED if seq == ENTRIES else ""  # an older one vouches for nothing
        else:
            expected = f"entry {seq} {CHANGED}"
        assert expected in finding(original, copy)
        assert bool(expected) == bool(finding(original, copy))

    @pytest.mark.parametrize("column", ["body", "signature", "seq", "at"])
    def test_of_the_last_countersignature(self, original: Shop, copy: Path, column: str) -> None:
        """What is kept of the witness is checked before it is used."""
        with behind_its_back(copy) as file:
            (number,) = file.execute("SELECT max(number) FROM countersignature").fetchone()
            value = file.execute(
                f"SELECT {column} FROM countersignature WHERE number = ?", (number,)
            ).fetchone()[0]
            changed = flipped(value, 9) if isinstance(value, bytes) else value + 1
            file.execute(
                f"UPDATE countersignature SET {column} = ? WHERE number = ?", (changed, number)
            )
        with pytest.raises(LedgerError, match="countersignature that was changed"):
            original.opened(copy)

    @pytest.mark.parametrize("column", ["body", "link", "signature"])
    def test_of_another_type(self, original: Shop, copy: Path, column: str) -> None:
        """A flip may make a text of bytes; that is found, too, and no other error."""
        with behind_its_back(copy) as file:
            file.execute("CREATE TABLE loose AS SELECT * FROM entry")
            file.execute("DROP TABLE entry")
            file.execute(f"UPDATE loose SET {column} = CAST({column} AS TEXT)")
            file.execute("ALTER TABLE loose RENAME TO entry")
        assert finding(original, copy)

    @pytest.mark.parametrize("count", [120, pytest.param(6000, marks=pytest.mark.slow)])
    def test_of_the_raw_file(self, original: Shop, copy: Path, count: int) -> None:
        """Any bit of the file: it is refused, or says exactly what it said."""
        raw, rows = copy.read_bytes(), rows_of(copy)
        chosen = random.Random(count)
        for _ in range(count):
            copy.write_bytes(flipped(raw, chosen.randrange(8 * len(raw))))
            try:
                stored = read_ledger(copy, original.budget, original.key)
            except LedgerError:
                with suppress(LedgerError):  # and never another error
                    original.opened(copy).close()
                continue
            signatures = [entry.signature for entry in stored.entries]
            wrong = [one for one, row in zip(signatures, rows, strict=True) if one != row[3]]
            assert [(e.seq, e.body, e.link) for e in stored.entries] == [row[:3] for row in rows]
            assert len(wrong) <= 1  # an older signature, which nothing rests on


DELETED = "DELETE FROM entry WHERE seq = {0}"
SHIFTED = (
    "UPDATE entry SET seq = -seq WHERE seq > {0}; UPDATE entry SET seq = -seq - 1 WHERE seq < 0"
)
SWAPPED = (
    "UPDATE entry SET seq = -1 WHERE seq = {0}; UPDATE entry SET seq = {0} WHERE seq = {0} + 1;"
    "UPDATE entry SET seq = {0} + 1 WHERE seq = -1"
)
MAKE_ROOM = (
    "UPDATE entry SET seq = -seq WHERE seq > {0}; UPDATE entry SET seq = 1 - seq WHERE seq < 0;"
)
REPLAYED = MAKE_ROOM + (
    "INSERT INTO entry SELECT {0} + 1, body, link, signature FROM entry WHERE seq = {0}"
)


class TestRows:
    """Entries that are deleted, inserted, swapped or replayed."""

    @pytest.mark.parametrize("seq", [1, 2, 25, 49])
    @pytest.mark.parametrize("statement", [DELETED, DELETED + ";" + SHIFTED, SWAPPED, REPLAYED])
    def test_found(self, original: Shop, copy: Path, statement: str, seq: int) -> None:
        """Each is found where it begins, however the numbers are made to look."""
        tampered(copy, statement.format(seq))
        where = seq + 1 if statement == REPLAYED else seq
        assert f"entry {where} {CHANGED}" in finding(original, copy)

    def test_every_place(self, original: Shop) -> None:
        """The same at every place of the chain, without the file."""
        rows = rows_of(original.path)

        def renumbered(bare: list[Row]) -> list[Row]:
            return [(number, *row[1:]) for number, row in enumerate(bare, start=1)]

        for at in range(ENTRIES - 1):
            one, other = rows[at], rows[at + 1]
            for every in (
                [*rows[:at], *rows[at + 1 :]],
                [*rows[:at], other, one, *rows[at + 2 :]],
                [*rows[: at + 1], one, *rows[at + 1 :]],
                [*rows[:at], one, rows[(at + 7) % ENTRIES], *rows[at + 1 :]],
            ):
                with pytest.raises(LedgerError, match=CHANGED):
                    checked_entries(renumbered(every), original.key, "ledger")

    def test_replayed_at_the_end(self, original: Shop, copy: Path) -> None:
        """An old entry does not come a second time at the end."""
        tampered(
            copy, f"INSERT INTO entry SELECT {ENTRIES + 1}, body, link, signature FROM entry "
            "WHERE seq = 9"
        )  # fmt: skip
        assert f"entry {ENTRIES + 1} {CHANGED}" in finding(original, copy)

    def test_rewritten_by_a_stranger(self, original: Shop, copy: Path) -> None:
        """Whoever works out all links anew and has no key is told so."""
        stranger, link = Identity.generate("shop"), NO_LINK
        with behind_its_back(copy) as file:
            for seq, body, _, _ in rows_of(copy):
                link = link_after(link, body.replace(b"60.0", b"90.0"))
                signature = stranger.sign(signed_head(original.key, seq, link))
                file.execute(
                    "UPDATE entry SET body = ?, link = ?, signature = ? WHERE seq = ?",
                    (body.replace(b"60.0", b"90.0"), link, signature, seq),
                )
        assert NOT_SIGNED in finding(original, copy)

    def test_rewritten_by_the_merchant(self, original: Shop, copy: Path) -> None:
        """Who has the key can rewrite all, and does not fit what the witness countersigned."""
        link = NO_LINK
        rows = []
        for seq, body, _, _ in rows_of(copy):
            cheaper = body.replace(b'"noise_multiplier":60.0', b'"noise_multiplier":90.0')
            link = link_after(link, cheaper)
            rows.append(
                Entry(
                    seq, cheaper, link, original.identity.sign(signed_head(original.key, seq, link))
                )
            )
        with behind_its_back(copy) as file:
            file.execute("DELETE FROM entry")
            file.executemany(
                "INSERT INTO entry VALUES (?, ?, ?, ?)",
                [(one.seq, one.body, one.link, one.signature) for one in rows],
            )
        with pytest.raises(WitnessRefusal, match=NOT_HELD):
            original.opened(copy)
        tampered(copy, "DELETE FROM countersignature")  # its own record of it gone as well
        check_refused_by_both(original, original.opened(copy))

    def test_foreign(self, original: Shop, copy: Path) -> None:
        """Another merchant's ledger is not this one's."""
        stranger = Identity.generate("shop")
        with pytest.raises(LedgerError, match=NOT_SIGNED):
            Ledger(copy, original.budget, stranger, COORDINATOR.public)


def check_refused_by_both(shop: Shop, ledger: Ledger) -> None:
    """The merchant refuses what the witness says, and the witness what the merchant says."""
    for ask in (
        lambda: ledger.accept(shop.latest),
        lambda: ledger.reserve(occasion(run="new"), [charge(60.0)], ("x", 1), shop.latest),
        lambda: ledger.release(occasion(77, "second"), charge(60.0), MODEL, "", shop.latest),
    ):
        with pytest.raises(WitnessRefusal, match=NOT_HELD):
            ask()
    head = ledger.reserve(
        occasion(run="new"), [charge(60.0)], ("x", 1)
    )  # a server that says nothing
    assert FORK in shop.refusal(head)
    ledger.close()


class TestBackups:
    """Ledgers that are shorter than they were, and ledgers that there are two of."""

    @pytest.mark.parametrize("left", [1, 2, 30, ENTRIES - 1])
    def test_cut_short(self, original: Shop, copy: Path, left: int) -> None:
        """The countersignature beside them tells of the entries that are gone."""
        tampered(copy, f"DELETE FROM entry WHERE seq > {left}")
        with pytest.raises(WitnessRefusal, match=f"an entry {ENTRIES} that .* does not hold"):
            original.opened(copy)

    @pytest.mark.parametrize("left", [0, 1, 2, 30, ENTRIES - 1])
    def test_put_back(self, tmp_path: Path, left: int) -> None:
        """An old backup is whole by itself; neither witness nor merchant goes on with it."""
        shop = filled(tmp_path)
        tampered(
            shop.path,
            f"DELETE FROM entry WHERE seq > {left}",
            f"DELETE FROM countersignature WHERE seq > {left}",
        )
        check_refused_by_both(shop, shop.opened())

    def test_deleted(self, tmp_path: Path) -> None:
        """A ledger that is deleted and begun anew is found out by both."""
        shop = filled(tmp_path)
        shop.path.unlink()
        check_refused_by_both(shop, shop.opened())

    def test_two_hosts(self, tmp_path: Path) -> None:
        """Of a ledger and its copy one goes on: the one that the witness saw first."""
        shop = filled(tmp_path)
        copy = shop.opened(shop.copy("other host.sqlite"))
        known = shop.latest
        first = copy.release(occasion(77, "second"), charge(60.0), MODEL, "", known)
        assert shop.refusal(first) == ""
        second = shop.ledger.release(occasion(78, "second"), charge(60.0), MODEL, "", known)
        assert FORK in shop.refusal(second)
        with pytest.raises(WitnessRefusal, match=NOT_HELD):
            shop.ledger.release(occasion(79, "second"), charge(60.0), MODEL, "", shop.latest)
        copy.release(occasion(80, "second"), charge(60.0), MODEL, "", shop.latest)

    def test_the_write_ahead_log_is_lost(self, tmp_path: Path) -> None:
        """A copy of the main file alone is an older ledger, or none; the witness knows better."""
        shop = Shop(tmp_path / "shop")
        shop.reserve()
        shop.release(1)
        alone = Path(shutil.copy(shop.path, tmp_path / "alone.sqlite"))
        alone_bytes = alone.read_bytes()
        assert len(alone_bytes) < 20_000, "what was written last is still in the log"
        check_refused_by_both(shop, shop.opened(alone))

    def test_flips_in_the_write_ahead_log(self, tmp_path: Path) -> None:
        """A broken log ends where it is broken: what is left is a beginning of the ledger."""
        shop = Shop(tmp_path / "shop")
        shop.reserve()
        for number in range(3):
            shop.release(number)
        whole = [(entry.seq, entry.link) for entry in shop.ledger.entries()]
        log = shop.path.with_name("ledger.sqlite-wal")
        raw, main = log.read_bytes(), shop.path.read_bytes()
        chosen, lengths = random.Random(5), set()
        for number in range(30):
            path = tmp_path / f"{number}" / "ledger.sqlite"
            path.parent.mkdir()
            path.write_bytes(main)
            changed = flipped(raw, chosen.randrange(8 * len(raw)))
            path.with_name("ledger.sqlite-wal").write_bytes(changed)
            try:
                ledger = shop.opened(path)
            except LedgerError:
                continue
            held = [(entry.seq, entry.link) for entry in ledger.entries()]
            if len(held) > 1:  # else a new ledger was begun
                assert held == whole[: len(held)]
                lengths.add(len(held))
            if held != whole:
                with pytest.raises(WitnessRefusal):
                    ledger.accept(shop.latest)
            ledger.close()
        assert lengths

    @pytest.mark.parametrize("column", ["body", "signature"])
    def test_a_countersignature_changed_while_in_use(self, tmp_path: Path, column: str) -> None:
        """That the original was verified before vouches for nothing else at its place."""
        shop = Shop(tmp_path)
        shop.reserve()
        shop.release(1)
        shop.ledger.accept(shop.latest)  # verified, and kept
        with behind_its_back(shop.path) as file:
            (kept,) = file.execute(
                f"SELECT {column} FROM countersignature ORDER BY number DESC LIMIT 1"
            ).fetchone()
            changed = bytes([kept[0], kept[1] ^ 1, *kept[2:]])
            file.execute(f"UPDATE countersignature SET {column} = ?", (changed,))
        with pytest.raises(LedgerError, match="countersignature that was changed"):
            shop.ledger.release(occasion(2), charge(), MODEL)

    def test_replaced_while_in_use(self, tmp_path: Path) -> None:
        """A running process sees that the file is another one, and releases nothing."""
        shop = filled(tmp_path)
        old = shop.copy("old.sqlite")
        shop.release(77, "second", cost=charge(60.0))
        shop.put_back(old)
        uses: list[Callable[[], object]] = [
            shop.ledger.entries,
            lambda: shop.release(78, "second", cost=charge(60.0)),
            lambda: shop.ledger.settle("second"),
        ]
        for use in uses:
            with pytest.raises(LedgerError, match="replaced while it was in use"):
                use()
        check_refused_by_both(shop, shop.opened())
