"""Tests of the ledger: real SQLite files, second processes, crashes, tampering."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.accounting import epsilon
from common.errors import AccountingError, BudgetRefusal, LedgerError, ReplayRefusal
from common.events import GaussianSum
from common.ledger import Budget, Ledger, Occasion

BUDGET = Budget(1.0, 1e-5)
EVENT = GaussianSum(12.0, 1.0)


def occasion(number: int = 1, run: str = "run", attempt: int = 0) -> Occasion:
    """Return the update of a round."""
    return Occasion(run, "update", number, attempt, "c" * 64)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give the place of a ledger whose folder is not there yet."""
    return tmp_path / "shop" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Ledger:
    """Give an empty ledger with a cap of epsilon 1."""
    return Ledger(path, BUDGET)


def script(path: Path, body: str) -> list[str]:
    """Return the command of a second process with `ledger` at hand."""
    start = f"""
        import os, sys, time
        from pathlib import Path
        from common.errors import *
        from common.events import GaussianSum
        from common.ledger import *
        ledger = Ledger(Path({str(path)!r}), Budget(1.0, 1e-5))
        def occasion(n, run="run"): return Occasion(run, "update", n, 0, "c" * 64)
        """
    return [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(body)]


class TestCharge:
    """Ledger.charge."""

    def test_is_written(self, ledger: Ledger) -> None:
        """A charge becomes a row with everything that it was for."""
        alone = GaussianSum(3.0, 1.0)
        ledger.charge(occasion(), EVENT, alone)
        (entry,) = ledger.entries()
        assert (entry.kind, entry.occasion, entry.reason) == ("charge", occasion(), "")
        assert (entry.event, entry.towards_server) == (EVENT, alone)

    def test_over_the_cap(self, ledger: Ledger) -> None:
        """A charge that would pass the cap is refused, recorded, and costs nothing."""
        with pytest.raises(BudgetRefusal, match=r"round 1 would bring .* epsilon .*cap is 1 "):
            ledger.charge(occasion(), GaussianSum(1.0, 1.0), EVENT)
        assert [entry.kind for entry in ledger.entries()] == ["refusal"]
        ledger.charge(occasion(), EVENT, EVENT)

    def test_exactly_the_cap(self, path: Path) -> None:
        """A cap that is exactly the plan's epsilon pays for the whole plan."""
        ledger = Ledger(path, Budget(epsilon([GaussianSum(12.0, 1.0, 5)], 1e-5), 1e-5))
        for number in range(5):
            ledger.charge(occasion(number), EVENT, EVENT)
        with pytest.raises(BudgetRefusal):
            ledger.charge(occasion(5), EVENT, EVENT)

    def test_twice(self, ledger: Ledger) -> None:
        """The same occasion is charged once; the second time nothing is written."""
        ledger.charge(occasion(), EVENT, EVENT)
        with pytest.raises(ReplayRefusal, match="released before"):
            ledger.charge(occasion(), EVENT, EVENT)
        assert len(ledger.entries()) == 1

    @pytest.mark.parametrize(
        "other", [occasion(2), occasion(1, "other run"), occasion(1, attempt=1)]
    )
    def test_another_occasion(self, ledger: Ledger, other: Occasion) -> None:
        """Another round, run or attempt is another release and charged as such."""
        ledger.charge(occasion(), EVENT, EVENT)
        ledger.charge(other, EVENT, EVENT)
        assert len(ledger.entries()) == 2

    def test_another_contract_is_the_same_occasion(self, ledger: Ledger) -> None:
        """A run cannot be charged twice by changing its contract's hash."""
        ledger.charge(occasion(), EVENT, EVENT)
        with pytest.raises(ReplayRefusal, match="released before"):
            ledger.charge(Occasion("run", "update", 1, 0, "d" * 64), EVENT, EVENT)

    def test_twice_after_reopening(self, ledger: Ledger, path: Path) -> None:
        """A restart forgets nothing."""
        ledger.charge(occasion(), EVENT, EVENT)
        ledger.close()
        for again in (ledger, Ledger(path, BUDGET)):
            with pytest.raises(ReplayRefusal, match="released before"):
                again.charge(occasion(), EVENT, EVENT)

    def test_twice_from_another_process(self, ledger: Ledger, path: Path) -> None:
        """What one process charged, another cannot charge again."""
        body = "ledger.charge(occasion(1), GaussianSum(12.0, 1.0), GaussianSum(12.0, 1.0))"
        subprocess.run(script(path, body), check=True)
        with pytest.raises(ReplayRefusal, match="released before"):
            ledger.charge(occasion(), EVENT, EVENT)

    def test_sees_what_others_spent(self, ledger: Ledger, path: Path) -> None:
        """Two open ledgers of one file share one budget."""
        other = Ledger(path, BUDGET)
        large = GaussianSum(5.0, 1.0)
        ledger.charge(occasion(1), large, large)
        with pytest.raises(BudgetRefusal):
            other.charge(occasion(2), large, large)

    def test_nonsense_event(self, ledger: Ledger) -> None:
        """An event without meaning is an error and no row."""
        with pytest.raises(AccountingError):
            ledger.charge(occasion(), GaussianSum(float("nan"), 1.0), EVENT)
        assert ledger.entries() == []

    def test_runs_and_contracts_share_the_cap(self, ledger: Ledger) -> None:
        """The cap composes over everything the merchant ever released."""
        half = GaussianSum(4.8, 1.0)
        ledger.charge(Occasion("a", "update", 1, 0, "c"), half, half)
        ledger.charge(Occasion("b", "profile", 9, 0, "d"), EVENT, EVENT)
        with pytest.raises(BudgetRefusal):
            ledger.charge(Occasion("c", "census", 0, 0, "e"), half, half)
        assert [e.occasion.run for e in ledger.entries("b")] == ["b"]

    @settings(
        max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    @given(st.lists(st.tuples(st.floats(2, 30), st.integers(1, 4)), max_size=12))
    def test_never_passes_the_cap(self, tmp_path: Path, wanted: list[tuple[float, int]]) -> None:
        """Whatever is asked for, spent epsilon rises and stays at or below the cap."""
        ledger = Ledger(tmp_path / f"{time.monotonic_ns()}.sqlite", BUDGET)
        spent = [0.0]
        for number, (sigma, count) in enumerate(wanted):
            event = GaussianSum(sigma, 1.0, count)
            try:
                ledger.charge(occasion(number), event, event)
            except BudgetRefusal:
                assert epsilon([*self._charged(ledger), event], 1e-5) > 1.0
            spent.append(epsilon(self._charged(ledger), 1e-5))
        ledger.close()
        assert spent == sorted(spent)
        assert spent[-1] <= 1.0 + 1e-9

    @staticmethod
    def _charged(ledger: Ledger) -> list[GaussianSum]:
        return [e.event for e in ledger.entries() if e.kind == "charge"]  # type: ignore[misc]


class TestRunLimit:
    """What a contract allows for one run."""

    def test_ends_the_run(self, path: Path) -> None:
        """Within the merchant's cap a run still ends at its contract's epsilon."""
        ledger = Ledger(path, Budget(5.0, 1e-5))
        large = GaussianSum(5.0, 1.0)
        ledger.charge(occasion(1), large, large, BUDGET)
        with pytest.raises(BudgetRefusal, match=r"would bring this run to .* allows 1"):
            ledger.charge(occasion(2), large, large, BUDGET)
        ledger.charge(occasion(2, "another run"), large, large, BUDGET)

    def test_survives_reopening(self, path: Path) -> None:
        """What a run spent is read from the file, not remembered."""
        large = GaussianSum(5.0, 1.0)
        Ledger(path, Budget(5.0, 1e-5)).charge(occasion(1), large, large, BUDGET)
        with pytest.raises(BudgetRefusal, match="this run"):
            Ledger(path, Budget(5.0, 1e-5)).charge(occasion(2), large, large, BUDGET)

    def test_has_a_delta_of_its_own(self, path: Path) -> None:
        """The run is held to the contract's delta, the merchant to its own."""
        ledger = Ledger(path, Budget(5.0, 1e-3))
        event = GaussianSum(4.0, 1.0)
        with pytest.raises(BudgetRefusal, match="delta 1e-12"):
            ledger.charge(occasion(1), event, event, Budget(1.0, 1e-12))
        ledger.charge(occasion(1), event, event, Budget(1.0, 1e-3))


class TestTowardsServer:
    """The cap towards whoever sees single messages."""

    def test_is_held(self, path: Path) -> None:
        """Single messages with little noise end at a cap of their own."""
        ledger = Ledger(path, Budget(1.0, 1e-5, 3.0))
        ledger.charge(occasion(1), EVENT, GaussianSum(1.7, 1.0))
        with pytest.raises(BudgetRefusal, match="towards the server, its cap is 3"):
            ledger.charge(occasion(2), EVENT, GaussianSum(1.7, 1.0))
        with pytest.raises(BudgetRefusal, match=r"the run would bring .* towards the server"):
            ledger.check_affordable([EVENT], [GaussianSum(1.7, 1.0)])

    def test_is_voluntary(self, ledger: Ledger) -> None:
        """Without such a cap only sums count."""
        ledger.charge(occasion(1), EVENT, GaussianSum(0.1, 1.0))
        ledger.check_affordable([EVENT], [GaussianSum(0.1, 1.0)])


class TestProcesses:
    """Several processes, and the death of one."""

    def test_race_for_the_last_bit(self, path: Path) -> None:
        """Of two processes that want what is left, exactly one gets it."""
        body = """
            print("ready", flush=True)
            sys.stdin.readline()
            try:
                event = GaussianSum(5.0, 1.0)
                ledger.charge(occasion(os.getpid()), event, event)
                print("won")
            except BudgetRefusal:
                print("lost")
            """
        racers = [
            subprocess.Popen(
                script(path, body), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for _ in range(2)
        ]
        for racer in racers:
            assert racer.stdout
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin
            racer.stdin.write("go\n")
            racer.stdin.flush()
        answers = sorted(racer.communicate(timeout=60)[0].strip() for racer in racers)
        assert answers == ["lost", "won"]

    def test_opened_by_many_at_once(self, path: Path) -> None:
        """Processes that make the same new ledger wait for each other; none is refused."""
        openers = [
            subprocess.Popen(
                script(path.with_name(f"{number // 4}.sqlite"), "print('open')"),
                stdout=subprocess.PIPE,
                text=True,
            )
            for number in range(12)
        ]
        assert [opener.communicate(timeout=60)[0] for opener in openers] == ["open\n"] * 12

    def test_kill_after_charge(self, path: Path) -> None:
        """A process killed right after a charge leaves it spent."""
        body = """
            event = GaussianSum(5.0, 1.0)
            ledger.charge(occasion(1), event, event)
            print("charged", flush=True)
            time.sleep(60)
            """
        victim = subprocess.Popen(script(path, body), stdout=subprocess.PIPE, text=True)
        assert victim.stdout
        assert victim.stdout.readline() == "charged\n"
        os.kill(victim.pid, signal.SIGKILL)
        victim.communicate()
        ledger = Ledger(path, BUDGET)
        with pytest.raises(ReplayRefusal, match="released before"):
            ledger.charge(occasion(1), EVENT, EVENT)
        with pytest.raises(BudgetRefusal):
            ledger.charge(occasion(2), GaussianSum(5.0, 1.0), EVENT)

    def test_a_failed_transaction_lets_go(self, ledger: Ledger, path: Path) -> None:
        """After an error in a charge others can write at once."""
        with pytest.raises(AccountingError):
            ledger.charge(occasion(), GaussianSum(-1.0, 1.0), EVENT)
        other = Ledger(path, BUDGET)
        other.charge(occasion(), EVENT, EVENT)


class TestAffordable:
    """Ledger.check_affordable."""

    def test_says_no_and_writes_nothing(self, ledger: Ledger) -> None:
        """A plan beyond the cap is refused without a row."""
        with pytest.raises(BudgetRefusal, match="the run would bring this merchant to"):
            ledger.check_affordable([GaussianSum(1.0, 1.0)])
        assert ledger.entries() == []

    def test_counts_what_is_spent(self, ledger: Ledger) -> None:
        """A plan that fits an empty ledger may not fit this one."""
        plan = [GaussianSum(5.0, 1.0)]
        ledger.check_affordable(plan)
        ledger.charge(occasion(), GaussianSum(4.5, 1.0), EVENT)
        with pytest.raises(BudgetRefusal):
            ledger.check_affordable(plan)


class TestSteps:
    """Ledger.charge with the step of a secure sum that it is for."""

    def test_is_charged_once_in_any_run(self, ledger: Ledger, path: Path) -> None:
        """A session's file that was put back masks nothing a second time, also after reopening."""
        ledger.charge(occasion(1), EVENT, EVENT, step="roster/1")
        ledger.close()
        again = Ledger(path, BUDGET)
        for other in (occasion(2), occasion(1, attempt=1), occasion(1, run="another")):
            with pytest.raises(ReplayRefusal, match="was the session's file put back"):
                again.charge(other, EVENT, EVENT, step="roster/1")
        assert [entry.occasion for entry in again.entries()] == [occasion(1)]

    def test_what_was_refused_is_as_good_as_never_asked(self, ledger: Ledger) -> None:
        """Neither the occasion nor the budget is spent, so another step may have them."""
        ledger.charge(occasion(1), GaussianSum(4.5, 1.0), EVENT, step="roster/1")
        with pytest.raises(ReplayRefusal):
            ledger.charge(occasion(2), EVENT, EVENT, step="roster/1")
        ledger.charge(occasion(2), EVENT, EVENT, step="roster/2")
        assert [entry.event for entry in ledger.entries()] == [GaussianSum(4.5, 1.0), EVENT]

    def test_a_step_that_was_not_paid_for_is_still_there(self, ledger: Ledger) -> None:
        """A refusal for the budget's sake, or an occasion that was charged, takes no step."""
        ledger.charge(occasion(1), EVENT, EVENT)
        with pytest.raises(BudgetRefusal):
            ledger.charge(occasion(2), GaussianSum(0.1, 1.0), EVENT, step="roster/1")
        with pytest.raises(ReplayRefusal, match="was released before in this run"):
            ledger.charge(occasion(1), EVENT, EVENT, step="roster/1")
        ledger.charge(occasion(3), EVENT, EVENT, step="roster/1")

    def test_no_step_is_no_step(self, ledger: Ledger) -> None:
        """Plain sums have none; any number of them are charged."""
        for number in range(3):
            ledger.charge(occasion(number), EVENT, EVENT)
        assert len(ledger.entries()) == 3

    def test_ledger_of_an_earlier_version(self, ledger: Ledger, path: Path) -> None:
        """A file without the table gets it, and keeps its charges."""
        ledger.charge(occasion(1), EVENT, EVENT)
        ledger.close()
        connection = sqlite3.connect(path)
        connection.execute("DROP TABLE secure_step")
        connection.close()
        again = Ledger(path, BUDGET)
        again.charge(occasion(2), EVENT, EVENT, step="roster/1")
        with pytest.raises(ReplayRefusal):
            again.charge(occasion(3), EVENT, EVENT, step="roster/1")
        assert len(again.entries()) == 2

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE secure_step SET step = 'roster/2'",
            "UPDATE OR REPLACE secure_step SET step = 'roster/2'",
            "DELETE FROM secure_step",
            "REPLACE INTO secure_step VALUES ('roster/1')",
            "INSERT OR REPLACE INTO secure_step VALUES ('roster/1')",
        ],
    )
    def test_steps_stay(self, ledger: Ledger, path: Path, statement: str) -> None:
        """Steps are neither changed, nor deleted, nor replaced, from any connection."""
        ledger.charge(occasion(1), EVENT, EVENT, step="roster/1")
        ledger.close()
        connection = sqlite3.connect(path)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
        connection.commit()
        assert connection.execute("SELECT step FROM secure_step").fetchall() == [("roster/1",)]
        connection.close()


class TestNotedSums:
    """Ledger.note_sum and survivors."""

    def test_is_kept(self, ledger: Ledger, path: Path) -> None:
        """How many merchants were in a sum is there after reopening, run by run."""
        ledger.charge(occasion(), EVENT, EVENT)
        ledger.note_sum("run", "update", 1, 0, 5)
        ledger.note_sum("run", "update", 1, 1, 7)
        ledger.note_sum("another", "update", 1, 0, 9)
        ledger.close()
        again = Ledger(path, BUDGET)
        assert again.survivors("run") == {("update", 1, 0): 5, ("update", 1, 1): 7}
        assert again.survivors("another") == {("update", 1, 0): 9}
        assert again.survivors("neither") == {}

    def test_first_note_stands(self, ledger: Ledger) -> None:
        """A sum is unmasked once; nothing said later changes who was in it."""
        ledger.note_sum("run", "update", 1, 0, 5)
        ledger.note_sum("run", "update", 1, 0, 50)
        assert ledger.survivors("run") == {("update", 1, 0): 5}

    def test_costs_nothing(self, ledger: Ledger) -> None:
        """A note is no charge and no refusal, and it frees nothing that was charged."""
        ledger.charge(occasion(), EVENT, EVENT)
        before = ledger.entries()
        ledger.note_sum("run", "update", 1, 0, 5)
        assert ledger.entries() == before
        with pytest.raises(ReplayRefusal):
            ledger.charge(occasion(), EVENT, EVENT)

    def test_charges_after_it_are_safe(self, ledger: Ledger) -> None:
        """A note need not reach the disk at once; the next charge does again."""
        ledger.note_sum("run", "update", 1, 0, 5)
        with ledger._transaction() as connection:
            assert connection.execute("PRAGMA synchronous").fetchone() == (2,)

    def test_ledger_of_an_earlier_version(self, ledger: Ledger, path: Path) -> None:
        """A file without the table gets it, and keeps its charges."""
        ledger.charge(occasion(), EVENT, EVENT)
        ledger.close()
        connection = sqlite3.connect(path)
        connection.execute("DROP TABLE secure_sum")
        connection.close()
        again = Ledger(path, BUDGET)
        again.note_sum("run", "update", 1, 0, 5)
        assert again.survivors("run") == {("update", 1, 0): 5}
        assert [e.event for e in again.entries()] == [EVENT]

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE secure_sum SET survivors = 9",
            "DELETE FROM secure_sum",
            "REPLACE INTO secure_sum VALUES ('run', 'update', 1, 0, 9)",
        ],
    )
    def test_notes_stay(self, ledger: Ledger, path: Path, statement: str) -> None:
        """Notes are neither changed, nor deleted, nor replaced, from any connection."""
        ledger.note_sum("run", "update", 1, 0, 5)
        ledger.close()
        connection = sqlite3.connect(path)
        with contextlib.suppress(sqlite3.IntegrityError):
            connection.execute(statement)
        connection.commit()
        connection.close()
        assert ledger.survivors("run") == {("update", 1, 0): 5}


class TestTampering:
    """What SQL can do to the file."""

    @pytest.mark.parametrize(
        "statement",
        [
            "UPDATE entry SET round = 9",
            "UPDATE OR REPLACE entry SET kind = 'refusal'",
            "DELETE FROM entry",
            "REPLACE INTO entry SELECT 1, at, 'refusal', run, stage, round, attempt, event, "
            "towards_server, contract, 'x' FROM entry",
            "REPLACE INTO entry SELECT NULL, at, kind, run, stage, round, attempt, '{}', "
            "towards_server, contract, reason FROM entry",
        ],
    )
    def test_rows_stay(self, ledger: Ledger, path: Path, statement: str) -> None:
        """Rows are neither changed, nor deleted, nor replaced, from any connection."""
        ledger.charge(occasion(), EVENT, EVENT)
        ledger.close()
        connection = sqlite3.connect(path)
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            connection.execute(statement)
        connection.close()
        assert [e.event for e in ledger.entries()] == [EVENT]

    @pytest.mark.parametrize("text", ["{", "[]", json.dumps({"kind": "laplace"})])
    def test_unreadable_entry(self, ledger: Ledger, path: Path, text: str) -> None:
        """An entry that nobody understands stops all charges, and the path is named."""
        connection = sqlite3.connect(path)
        connection.execute(
            "INSERT INTO entry (at, kind, run, stage, round, attempt, event, towards_server, "
            "contract, reason) VALUES (0, 'charge', 'r', 's', 0, 0, ?, ?, 'c', '')",
            (text, text),
        )
        connection.commit()
        connection.close()
        with pytest.raises(LedgerError, match=r"ledger\.sqlite: holds an entry"):
            ledger.charge(occasion(), EVENT, EVENT)
        with pytest.raises(LedgerError, match=r"ledger\.sqlite"):
            ledger.entries()


class TestBadFiles:
    """Files that are no ledger."""

    def test_not_a_database(self, tmp_path: Path) -> None:
        """Another file is left alone, and its path is named."""
        path = tmp_path / "ledger.sqlite"
        path.write_bytes(b"customers,spend\n" * 999)
        with pytest.raises(LedgerError, match=r"ledger\.sqlite: cannot be opened as a ledger"):
            Ledger(path, BUDGET)
        assert path.read_bytes().startswith(b"customers,spend\n")

    def test_a_folder(self, tmp_path: Path) -> None:
        """A folder is no ledger."""
        with pytest.raises(LedgerError, match=str(tmp_path)):
            Ledger(tmp_path, BUDGET)

    def test_below_a_file(self, tmp_path: Path) -> None:
        """A place that cannot exist is named."""
        (tmp_path / "file").touch()
        with pytest.raises(LedgerError, match=r"file/ledger\.sqlite"):
            Ledger(tmp_path / "file" / "ledger.sqlite", BUDGET)

    def test_somebody_elses_table(self, tmp_path: Path) -> None:
        """A database with another table of that name is refused."""
        path = tmp_path / "ledger.sqlite"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TABLE entry (x)")
        connection.close()
        with pytest.raises(LedgerError, match="cannot be opened as a ledger"):
            Ledger(path, BUDGET)

    def test_damaged_later(self, ledger: Ledger, path: Path) -> None:
        """A file that is damaged between two uses stops all charges."""
        for number in range(5):
            ledger.charge(occasion(number), EVENT, EVENT)
        ledger.close()
        path.write_bytes(b"\x00" * path.stat().st_size)
        with pytest.raises(LedgerError, match=r"ledger\.sqlite"):
            Ledger(path, BUDGET).charge(occasion(9), EVENT, EVENT)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes")
    def test_read_only(self, ledger: Ledger, path: Path) -> None:
        """Where nothing can be written, nothing is released."""
        ledger.close()
        path.chmod(0o400)
        with pytest.raises(LedgerError, match=r"ledger\.sqlite"):
            Ledger(path, BUDGET).charge(occasion(), EVENT, EVENT)

    def test_full(self, ledger: Ledger) -> None:
        """A full disk is a `LedgerError`, and the charge did not happen."""
        ledger.charge(occasion(0), EVENT, EVENT)
        with ledger._transaction() as connection:
            pages = connection.execute("PRAGMA page_count").fetchone()[0]
        ledger._connection.execute(f"PRAGMA max_page_count = {pages}")  # type: ignore[union-attr]
        with pytest.raises(LedgerError, match="full"):
            ledger.charge(occasion(1, run="r" * 100_000), EVENT, EVENT)
        assert len(ledger.entries()) == 1
