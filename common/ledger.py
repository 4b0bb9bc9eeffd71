"""A merchant's ledger: what was released, charged before it is computed.

One SQLite file a merchant. Its entries are chained by hashes and signed with the merchant's
identity (`common.chain`); rows are never changed or deleted (triggers refuse it). `rekey` hands
a ledger over to another key of its merchant; nothing that was charged is lost. A run goes

    reserve -> countersigned by the witness -> release, release, ... -> settle

`reserve` charges all that a run may ask for; nothing is computed for a run before the pinned
witness, which the coordinator runs, has countersigned that reservation. Each release is an entry
of its own before it is computed, once for (run, stage, round, attempt), and only if the
reservation covers it. What the entries add up to is worked out in `common.budget`.

Every check and its entry are one transaction under SQLite's write lock, on entries read under
that lock: several processes may use one file, one of them writes. A copy, an older backup or a
shortened file holds no entry that the witness countersigned last: both sides find that out.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from common import statements
from common.budget import DAY_S, WHOLE_RUN, Account, Budget, Charge, Occasion, RunAccount
from common.chain import (
    NO_LINK,
    REKEY,
    Countersignature,
    Entry,
    Head,
    Seen,
    body_bytes,
    link_after,
    named_key,
    rekey_proof,
    signed_head,
)
from common.errors import (
    BudgetRefusal,
    LedgerError,
    ReplayRefusal,
    WireError,
    WitnessRefusal,
)
from common.identity import Identity
from common.ledger_entries import checked_entries, fold, keys_after
from common.sqlite_file import BROKEN, SqliteFile
from common.versions import code_sha256, hansa_version

_ACCOUNTANT = (
    "closed form for sums over all customers; for sampled ones an upper bound by RDP or, where "
    "that says no, the larger of Opacus PRV and dp-accounting PLD"
)

_LAST = (  # each takes one number, this one for nothing
    "SELECT body, signature, seq, at FROM countersignature WHERE seq >= ? "
    "ORDER BY number DESC LIMIT 1"
)
_FIRST = _LAST.replace("DESC", "ASC")

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entry (
    seq INTEGER PRIMARY KEY,
    body BLOB NOT NULL,
    link BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS countersignature (
    number INTEGER PRIMARY KEY,
    seq INTEGER NOT NULL,
    at REAL NOT NULL,
    body BLOB NOT NULL,
    signature BLOB NOT NULL
) STRICT;
"""
_APPEND_ONLY = """
CREATE TRIGGER IF NOT EXISTS TABLE_no_update BEFORE UPDATE ON TABLE
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS TABLE_no_delete BEFORE DELETE ON TABLE
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS TABLE_in_order BEFORE INSERT ON TABLE
    WHEN NEW.KEY IS NOT (SELECT coalesce(max(KEY), 0) + 1 FROM TABLE)
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
for _table, _key in (("entry", "seq"), ("countersignature", "number")):
    _SCHEMA += (
        _APPEND_ONLY.replace("ON TABLE", f"ON {_table}")
        .replace("FROM TABLE", f"FROM {_table}")
        .replace("TABLE_", f"{_table}_")
        .replace("KEY", _key)
    )


class Ledger:
    """The ledger in one file.

    Args:
        path: The SQLite file; made when it is not there.
        budget: The caps that no charge may pass.
        identity: Signs the entries; the one that the ledger was handed over to last.
        witness: Public key of the witness, pinned; empty where there is none, then nothing can
            be released.
        now: The merchant's clock, seconds since 1970.
        previous: Public keys that the witness had before, by its own signed rotations. What they
            countersigned stays good; nothing new of them is accepted.
        durable: Every charge is on the disk before it is acted upon. False where a simulation
            made the merchant: then a loss of power may lose what lost nothing.

    Raises:
        LedgerError: The file cannot be opened, is no ledger of this merchant, or was changed.
    """

    def __init__(  # noqa: PLR0913  # some of them by name
        self,
        path: Path,
        budget: Budget,
        identity: Identity,
        witness: bytes,
        now: Callable[[], float] = time.time,
        *,
        previous: Sequence[bytes] = (),
        durable: bool = True,
    ) -> None:
        self.path = path
        self._durable = durable
        self.budget = budget
        self._identity = identity
        self._witness = witness
        self._previous = tuple(previous)
        self._now = now
        self._file = SqliteFile(
            path, lambda what: LedgerError(f"{path}: the ledger cannot be {what}"), log=True
        )
        self._opened: tuple[Countersignature, Seen] | None = None  # by the witness's key of today
        self._forget()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file.open(_SCHEMA)
        except (OSError, *BROKEN) as error:
            raise LedgerError(f"{path}: cannot be opened as a ledger ({error})") from None
        with self._transaction() as connection:
            if not self._seq:
                self._append(connection, self._opening())

    @property
    def identity(self) -> Identity:
        """Return whose ledger this is; its key signs evidence too."""
        return self._identity

    def _opening(self) -> dict[str, Any]:
        return {
            "kind": "open",
            "v": 1,
            "ledger": os.urandom(16).hex(),
            "merchant": self._identity.merchant,
            "key": self._identity.public.hex(),
            "unit": statements.UNIT,
            "relation": statements.RELATION,
            **_running(),
        }

    def rekey(self, new: Identity) -> None:
        """Hand the ledger over to another key of the same merchant, for ever.

        All that was charged stays charged. From now on the new key signs; a process that has the
        old one is refused.

        Raises:
            LedgerError: It is another merchant's key, it signed this ledger before, or the file
                cannot be written.
        """
        with self._file.lock:  # until the key is exchanged: no other thread signs with the old one
            with self._transaction() as connection:
                old = self._identity
                if new.merchant != old.merchant or new.public in self._keys:
                    raise LedgerError(
                        f"{self.path}: is handed over to a new key of '{old.merchant}' only"
                    )
                proof = new.sign(rekey_proof(old.public, new.public, self._seq, self._link))
                self._append(
                    connection, {"kind": REKEY, "key": new.public.hex(), "proof": proof.hex()}
                )
            self._identity = new

    def accept(self, countersigned: bytes) -> None:
        """Keep what the witness countersigned, if it is newer than what is kept.

        Raises:
            WitnessRefusal: The witness saw an entry that is not in this ledger.
            WireError: The pinned witness did not sign it, or it is of another ledger.
            LedgerError: The file cannot be used.
        """
        with self._transaction() as connection:
            self._accept(connection, countersigned)

    def _accept(self, connection: sqlite3.Connection, countersigned: bytes) -> int | None:
        """Return the number of the entry that the sender saw last; None if it saw none."""
        if not countersigned:
            return None
        found = Countersignature.from_bytes(countersigned)
        seen = self._known(found)
        if seen is None:
            seen = found.opened_by([self._witness], self._keys)
            self._opened = found, seen
        self._check_held(connection, seen)
        row = connection.execute(
            "SELECT number, seq, at FROM countersignature ORDER BY number DESC LIMIT 1"
        ).fetchone()
        number, *latest = row or (0, 0, 0.0)
        if [seen.seq, seen.at] > latest:
            connection.execute(
                "INSERT INTO countersignature VALUES (?, ?, ?, ?, ?)",
                (number + 1, seen.seq, seen.at, found.body, found.signature),
            )
        return seen.seq

    def _known(self, found: Countersignature) -> Seen | None:
        """Return what a countersignature says if it is the very one that was verified last."""
        return self._opened[1] if self._opened and self._opened[0] == found else None

    def _kept(self, connection: sqlite3.Connection, since: int = 0) -> Seen | None:
        """Return the last countersignature that is kept, or the first that covers an entry."""
        row = connection.execute(_FIRST if since else _LAST, (since,)).fetchone()
        if row is None:
            return None
        try:
            found = Countersignature(*row[:2])
            seen = self._known(found) or found.opened_by(
                [self._witness, *self._previous], self._keys
            )
        except (WireError, TypeError):
            seen = None
        if seen is None or (seen.seq, seen.at) != row[2:]:
            raise LedgerError(
                f"{self.path}: holds a countersignature that was changed, or that is not of the "
                "pinned witness"
            )
        return seen

    def _check_held(self, connection: sqlite3.Connection, seen: Seen) -> None:
        row = connection.execute("SELECT link FROM entry WHERE seq = ?", (seen.seq,)).fetchone()
        if row is None or row[0] != seen.link:
            raise WitnessRefusal(
                f"the witness saw an entry {seen.seq} that this merchant's ledger does not hold; "
                "the ledger was put back from a copy, or is one of two"
            )

    def reserve(
        self,
        occasion: Occasion,
        charges: Sequence[Charge],
        last: tuple[str, int],
        countersigned: bytes = b"",
    ) -> Head:
        """Charge all that a run may release; once a run, later calls change nothing.

        Args:
            occasion: Run and contract.
            charges: Everything the run may release, counts included.
            last: Stage and round of the run's last sum.
            countersigned: What the witness saw last, if anything.

        Returns:
            The ledger's last entry, as an extension of what the witness saw.

        Raises:
            BudgetRefusal: A cap of the merchant would be passed; the refusal is written down.
            LedgerError: The file cannot be used.
        """
        with self._transaction() as connection:
            since = self._accept(connection, countersigned)
            account = self._account.runs.get(occasion.run)
            if account is None:
                self._settle_finished(connection)
                self._expire_old(connection)
                reason = self._account.refusal_of(charges)
                if reason:
                    self._refuse(connection, occasion, reason)
                else:
                    self._append(connection, self._reservation(occasion, charges, last))
            elif account.contract != occasion.contract:
                raise BudgetRefusal("the run was reserved for under another contract")
            else:
                reason = ""
            head = self._head(since)
        if reason:
            raise BudgetRefusal(f"the run {reason}")
        return head

    def _reservation(
        self, occasion: Occasion, charges: Sequence[Charge], last: tuple[str, int]
    ) -> dict[str, Any]:
        account = self._account
        return {
            "kind": "reserve",
            "run": occasion.run,
            "contract": occasion.contract,
            "releases": [charge.document for charge in charges],
            "last": list(last),
            "policy": self.budget.document,
            "before": account.spent(),
            "after": account.spent(charges),
            "lifetime": account.spent(charges, lifetime=True),
            "accountant": _ACCOUNTANT,
            **_running(),
        }

    def _settle_finished(self, connection: sqlite3.Connection) -> None:
        """Settle runs whose last sum was asked for."""
        for name, account in list(self._account.runs.items()):
            if account.finished and not account.settled:
                self._append(connection, {"kind": "settle", "run": name})

    def _expire_old(self, connection: sqlite3.Connection) -> None:
        """Let runs expire that are older than the refresh period, by both clocks.

        The earlier clock tells the time and the later one when a run was charged: neither the
        witness nor this machine can hurry the period alone.
        """
        seen = self._kept(connection)
        if seen is not None:
            today = min(self._now(), seen.at)
            for name in sorted(self._old(today, partial(self._charged_at, connection))):
                self._append(connection, {"kind": "expire", "run": name})

    def _old(self, today: float, charged_at: Callable[[RunAccount], float]) -> set[str]:
        """Return the runs that are older than the refresh period and did not expire yet."""
        period, runs = self.budget.refresh_days, self._account.runs.items()
        if period is None:
            return set()
        return {
            name
            for name, run in runs
            if not run.expired and today - charged_at(run) >= period * DAY_S
        }

    def _charged_at(self, connection: sqlite3.Connection, run: RunAccount) -> float:
        """Return when a run was charged last: the later of two clocks, never if no witness saw."""
        seen = self._kept(connection, run.latest)
        return float("inf") if seen is None else max(run.at, seen.at)

    def check_affordable(self, occasion: Occasion, charges: Sequence[Charge]) -> None:
        """Raise a `BudgetRefusal`, written down, if a run would pass a cap.

        Of a run that is reserved already nothing more is asked. Whether older runs expired is
        taken from this machine's clock alone: the witness's is asked when the run is reserved.
        """
        with self._transaction() as connection:
            if occasion.run in self._account.runs:
                return
            self._settle_finished(connection)
            old = self._old(self._now(), lambda run: run.at)
            reason = self._account.refusal_of(charges, old)
            if reason:
                self._refuse(connection, occasion, reason)
        if reason:
            raise BudgetRefusal(f"the run {reason}")

    def join(
        self, run: str, session: int, roster: str, members: int, countersigned: bytes = b""
    ) -> Head:
        """Write down that a session of secure sums is joined.

        Args:
            run: The run.
            session: Number of the session.
            roster: Hash of its roster.
            members: In the roster.
            countersigned: What the witness saw last, if anything.

        Raises:
            ReplayRefusal: It was joined before.
            LedgerError: Nothing is reserved for the run, or the file cannot be used.
        """
        with self._transaction() as connection:
            since = self._accept(connection, countersigned)
            self._check_witnessed(connection, run)
            self._check_step(f"{roster}/0")
            self._append(
                connection,
                {
                    "kind": "join",
                    "run": run,
                    "session": session,
                    "roster": roster,
                    "members": members,
                },
            )
            return self._head(since)

    def release(
        self,
        occasion: Occasion,
        charge: Charge,
        parameters: str,
        step: str = "",
        countersigned: bytes = b"",
    ) -> Head:
        """Write down one release, before it is computed.

        Args:
            occasion: What the release is for.
            charge: The release.
            parameters: SHA-256 of the model that was shown.
            step: Names the step of a secure sum that the release is masked in; never taken
                twice, so that a session's file put back from a copy masks nothing again.
            countersigned: What the witness saw last, if anything.

        Returns:
            The ledger's last entry, as an extension of what the witness saw.

        Raises:
            BudgetRefusal: The run's reservation does not cover it; the refusal is written down.
            ReplayRefusal: The occasion or the step was released before; written down too.
            WitnessRefusal: No countersignature covers the reservation.
            LedgerError: The file cannot be used.
        """
        with self._transaction() as connection:
            since = self._accept(connection, countersigned)
            refusal = self._refusal_of_release(occasion, charge, step)
            if refusal is None:
                self._check_witnessed(connection, occasion.run)
                self._append(
                    connection,
                    {
                        "kind": "release",
                        **_named(occasion),
                        **charge.document,
                        "parameters": parameters,
                        "step": step,
                    },
                )
                return self._head(since)
            self._refuse(connection, occasion, str(refusal))
        raise refusal

    def _refusal_of_release(
        self, occasion: Occasion, charge: Charge, step: str
    ) -> BudgetRefusal | ReplayRefusal | None:
        where = f"{occasion.stage} of round {occasion.round}"
        account = self._account.runs.get(occasion.run)
        what = (occasion.stage, occasion.round, occasion.attempt)
        if account is not None and what in account.released:
            return ReplayRefusal(
                f"{where}, attempt {occasion.attempt}, was released before in this run; a second "
                "release needs an attempt of its own"
            )
        reason = self._account.refusal_of_release(occasion, charge)
        if reason:
            return BudgetRefusal(f"{where} {reason}")
        try:
            self._check_step(step)
        except ReplayRefusal as refusal:
            return refusal
        return None

    def _check_step(self, step: str) -> None:
        if step and step in self._account.steps:
            raise ReplayRefusal(
                "this step of the secure sum was taken before; was the session's file put back?"
            )

    def _check_witnessed(self, connection: sqlite3.Connection, run: str) -> None:
        account = self._account.runs.get(run)
        if account is None:
            raise BudgetRefusal("nothing is reserved for this run in the merchant's ledger")
        seen = self._kept(connection)
        if seen is None or seen.seq < account.seq:
            raise WitnessRefusal(
                "the witness did not countersign what this merchant reserved for the run; nothing "
                "is computed without"
            )

    def note_sum(self, run: str, stage: str, number: int, attempt: int, survivors: int) -> None:
        """Write down how many merchants' noise is in a secure sum that this one helped unmask.

        What was charged stays charged: the charge counts on the fewest survivors. The number
        tells what noise was achieved. A second note for the same sum is ignored. The note
        reaches the disk with the next entry; a power cut before may lose it, never a charge.

        Raises:
            LedgerError: The file cannot be written.
        """
        with self._transaction("NORMAL") as connection:
            account = self._account.runs.get(run)
            if account is None or (stage, number, attempt) in account.survivors:
                return
            what = {"stage": stage, "round": number, "attempt": attempt}
            entry = {"kind": "sum", "run": run, **what, "survivors": survivors}
            self._append(connection, entry)

    def settle(self, run: str) -> None:
        """Give back what a run reserved and did not release; it releases nothing more.

        Every release is an entry before it is computed, so the ledger knows what may have left.

        Raises:
            LedgerError: Nothing is reserved for the run, or the file cannot be written.
        """
        with self._transaction() as connection:
            account = self._account.runs.get(run)
            if account is None:
                raise LedgerError(f"{self.path}: nothing is reserved for a run '{run[:64]}'")
            if not account.settled:
                self._append(connection, {"kind": "settle", "run": run})

    def account(self) -> Account:
        """Return what the entries add up to, as a copy of its own."""
        with self._transaction():
            entries = list(self._stored)
        account = Account(self.budget)
        for entry in entries:
            fold(account, entry, self.path)
        return account

    def entries(self) -> list[Entry]:
        """Return all entries, in order."""
        with self._transaction():
            return list(self._stored)

    def countersignatures(self) -> list[Countersignature]:
        """Return what the witness countersigned, oldest first."""
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT body, signature FROM countersignature ORDER BY number"
            ).fetchall()
        return [Countersignature(body, signature) for body, signature in rows]

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        self._file.close()

    def _forget(self) -> None:
        self._stored: list[Entry] = []
        self._opened = None
        self._seq, self._link = 0, NO_LINK
        self._keys: tuple[bytes, ...] = ()  # that signed, oldest first; the last one signs
        self._account = Account(self.budget)

    def _refuse(self, connection: sqlite3.Connection, occasion: Occasion, reason: str) -> None:
        if self._account.worth_noting(occasion):
            self._append(
                connection, {"kind": "refuse", **_named(occasion), "reason": reason[:1000]}
            )

    def _append(self, connection: sqlite3.Connection, entry: dict[str, Any]) -> None:
        if self._keys and self._keys[-1] != self._identity.public:
            raise LedgerError(f"{self.path}: was handed over to another key")
        # the salt keeps who sees a head alone from guessing what its entries say
        document = {**entry, "at": self._now(), "salt": os.urandom(16).hex()}
        body = body_bytes(document)
        seq, link = self._seq + 1, link_after(self._link, body)
        signature = self._identity.sign(signed_head(self._identity.public, seq, link))
        connection.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", (seq, body, link, signature))
        self._take(Entry(seq, body, link, signature), document)

    def _take(self, entry: Entry, document: Mapping[str, Any] | None = None) -> None:
        """Take the next entry into account; `document` says what its body does, if known."""
        fold(self._account, entry, self.path, document)
        self._stored.append(entry)
        self._keys = keys_after(self._keys, entry, self._identity.public)
        self._seq, self._link = entry.seq, entry.link

    def _read_new(self, connection: sqlite3.Connection) -> None:
        """Take in what any process wrote since the last look, if it continues the chain."""
        rows = connection.execute(
            "SELECT seq, body, link, signature FROM entry WHERE seq >= ? ORDER BY seq",
            (self._seq,),
        ).fetchall()
        if self._seq:
            held, rows = rows[:1], rows[1:]
            if [(seq, link) for seq, _, link, _ in held] != [(self._seq, self._link)]:
                raise LedgerError(
                    f"{self.path}: was replaced while it was in use, or entries are missing; end "
                    "all processes that use it and find out what happened"
                )
        if not rows:
            return
        for entry in checked_entries(
            rows, self._identity.public, str(self.path), (self._seq, self._link), self._keys
        ):
            self._take(entry)
        self._check_latest(connection)

    def _check_latest(self, connection: sqlite3.Connection) -> None:
        """Raise if the witness saw more than the file holds."""
        seen = self._kept(connection) if self._witness else None
        if seen is not None:
            self._check_held(connection, seen)

    def _head(self, since: int | None) -> Head:
        """Return the last entry, and how it extends the entry that the receiver knows."""
        entry = self._stored[-1]
        known = entry.seq if since is None else min(since, entry.seq)
        digests = [hashlib.sha256(later.body).digest() for later in self._stored[known:]]
        signature = entry.signature
        if entry.seq > 1 and named_key(entry) is not None:  # a `rekey`, which the old key signed
            message = signed_head(self._identity.public, entry.seq, entry.link)
            signature = self._identity.sign(message)
        return Head(entry.seq, entry.link, signature, known, tuple(digests))

    @contextmanager
    def _transaction(self, synchronous: str = "FULL") -> Iterator[sqlite3.Connection]:
        """Hold the write lock, with all entries read; commit at the end, undo on any exception."""
        with self._file.lock:
            before, written = self._seq, False
            try:
                kept = synchronous if self._durable else "OFF"
                with self._file.transaction(kept) as connection:
                    self._read_new(connection)
                    before = self._seq
                    yield connection
                written = True
            finally:
                if not written and self._seq != before:
                    self._forget()  # what was not written; the next transaction reads anew


def _named(occasion: Occasion) -> dict[str, Any]:
    return {
        "run": occasion.run,
        "stage": occasion.stage,
        "round": occasion.round,
        "attempt": occasion.attempt,
        "contract": occasion.contract,
    }


def _running() -> dict[str, str]:
    return {"hansa": hansa_version(), "code": code_sha256()}


def whole_run(run: str, contract: str) -> Occasion:
    """Return the occasion of a whole run's reservation."""
    return Occasion(run, WHOLE_RUN, 0, 0, contract)
