"""Tests of the run store, on SQLite and on a real PostgreSQL."""

import shutil
import socket
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from common.errors import ArchiveError, RunError
from server.run_tables import CHECKPOINTS, RUNS
from server.runs import STALE_S, MerchantRow, RunLease, RunState, RunStore, sqlite_url
from tests.postgres import PASSWORD, Postgres, database_url, postgres

__all__ = ["database_url", "postgres"]  # fixtures

TAKEN_OVER = r"taken over by another process \(epoch 2, this one has 1\)"


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give the store's clock."""
    return Clock()


@pytest.fixture
def store(database_url: str, clock: Clock) -> RunStore:
    """Give an empty store."""
    return RunStore(database_url, clock)


@pytest.fixture
def lease(store: RunStore) -> RunLease:
    """Give the lease of a new run."""
    return store.begin("run-1", "c0ffee", 3, "77")


def save(lease: RunLease, number: int, body: bytes | None = None) -> None:
    """Save the checkpoint of a round."""
    wanted = f"checkpoint {number}".encode() if body is None else body
    lease.save(wanted, round=number, epsilon=number / 4, cohort=5)


def dead(clock: Clock) -> None:
    """Let so much time pass that a silent process is taken for dead."""
    clock.now += STALE_S


class TestBegin:
    """RunStore.begin."""

    def test_new_run(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A new run waits, holds what it was given, and nothing else yet."""
        row = store.row("run-1")
        assert (row.run, row.contract, row.rounds, row.flower_run) == ("run-1", "c0ffee", 3, "77")
        assert (row.state, row.round, row.epsilon, row.cohort) == (RunState.WAITING, 0, 0.0, 0)
        assert (row.reason, row.message, row.bundle, row.stop_requested) == ("", "", "", False)
        assert {row.started_at, row.updated_at, row.alive_at} == {clock.now}
        assert (lease.run, lease.epoch, lease.checkpoint) == ("run-1", 1, None)

    def test_twice(self, store: RunStore, lease: RunLease) -> None:
        """A run of a name that is taken does not begin, and the first goes on."""
        with pytest.raises(RunError, match="run-1: is in the run store already"):
            store.begin("run-1", "other", 9, "78")
        assert store.row("run-1").contract == "c0ffee"
        save(lease, 1)


class TestRows:
    """RunStore.row, rows and last."""

    def test_newest_first(self, store: RunStore, clock: Clock) -> None:
        """Runs are listed from the newest to the oldest."""
        for name in ("b", "a", "c"):
            store.begin(name, "c0ffee", 1, "")
            clock.now += 1
        assert [row.run for row in store.rows()] == ["c", "a", "b"]
        last = store.last()
        assert last is not None
        assert last.run == "c"

    def test_none(self, store: RunStore) -> None:
        """An empty store has no last run, and says which run it does not know."""
        assert store.last() is None
        for ask in (store.row, store.request_stop, lambda run: store.resume(run, "")):
            with pytest.raises(RunError, match="run-9: is not in the run store"):
                ask("run-9")

    def test_another_store_sees_it(self, store: RunStore, lease: RunLease, url: str) -> None:
        """What one process wrote another one reads."""
        save(lease, 2)
        assert RunStore(url).row("run-1") == store.row("run-1")

    @pytest.fixture
    def url(self, database_url: str) -> str:
        """Give the URL of the store."""
        return database_url


class TestSave:
    """RunLease.save."""

    def test_checkpoint_and_row(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A checkpoint is kept together with how far the run is."""
        clock.now += 5
        save(lease, 2)
        row = store.row("run-1")
        assert (row.round, row.epsilon, row.cohort, row.updated_at) == (2, 0.5, 5, clock.now)
        assert lease.checkpoint == b"checkpoint 2"

    def test_resumes_at_the_last(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """Who takes a run over gets the checkpoint that was saved last, byte for byte."""
        body = bytes(range(256)) * 4096
        for number in (1, 2, 3):
            save(lease, number)
        save(lease, 4, body)
        dead(clock)
        assert store.resume("run-1", "78").checkpoint == body

    def test_keeps_two(self, store: RunStore, lease: RunLease) -> None:
        """Older checkpoints than the last two are forgotten, those of other runs are not."""
        other = store.begin("run-2", "c0ffee", 3, "78")
        save(other, 1)
        for number in range(1, 6):
            save(lease, number)
        found = store._database.read(
            lambda connection: connection.execute(
                CHECKPOINTS.select().order_by(CHECKPOINTS.c.run, CHECKPOINTS.c.number)
            ).all()
        )
        assert [(row.run, row.round) for row in found] == [("run-1", 4), ("run-1", 5), ("run-2", 1)]

    def test_both_or_neither(self, store: RunStore, lease: RunLease) -> None:
        """The row never tells of a checkpoint that could not be kept."""
        save(lease, 1)
        store._database.write(
            lambda connection: connection.exec_driver_sql(
                "ALTER TABLE hansa_checkpoint RENAME TO out_of_the_way"
            )
        )
        with pytest.raises(ArchiveError, match="hansa_checkpoint"):
            save(lease, 2)
        assert (store.row("run-1").round, lease.checkpoint) == (1, b"checkpoint 1")

    def test_damaged_checkpoint(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A checkpoint that changed on the disk is passed over, and the row says so."""
        save(lease, 1)
        save(lease, 2)
        damage(store, 2)
        dead(clock)
        assert store.resume("run-1", "78").checkpoint == b"checkpoint 1"
        row = store.row("run-1")
        assert row.round == 1
        assert row.message == "the checkpoint of round 2 is damaged; goes on from the one before"

    def test_all_are_damaged(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A run without a whole checkpoint does not go on by itself from the beginning."""
        save(lease, 1)
        save(lease, 2)
        damage(store, 1)
        damage(store, 2)
        dead(clock)
        with pytest.raises(ArchiveError, match="run-1: its checkpoints are damaged"):
            store.resume("run-1", "78")
        assert store.row("run-1").epoch == 1


def damage(store: RunStore, number: int) -> None:
    """Change one byte of a checkpoint behind the store's back."""
    wrong = update(CHECKPOINTS).where(CHECKPOINTS.c.round == number)
    store._database.write(lambda connection: connection.execute(wrong.values(body=b"checkpoint X")))


class TestResume:
    """RunStore.resume and the fence it puts up."""

    def test_row(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A resumed run waits again, under Flower's new number and the next epoch."""
        save(lease, 1)
        lease.fail("the network went away")
        clock.now += 1
        again = store.resume("run-1", "78")
        row = store.row("run-1")
        assert (row.state, row.reason, row.flower_run, row.epoch) == (RunState.WAITING, "", "78", 2)
        assert (row.round, row.epsilon, row.alive_at, again.epoch) == (1, 0.25, clock.now, 2)

    def test_before_the_first_checkpoint(
        self, store: RunStore, lease: RunLease, clock: Clock
    ) -> None:
        """A run that crashed before it saved anything begins anew."""
        dead(clock)
        assert store.resume("run-1", "78").checkpoint is None

    def test_living_process(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """Nobody takes a run over from a process that gave a sign of life just now."""
        dead(clock)
        lease.beat()
        clock.now += STALE_S - 1
        with pytest.raises(RunError, match=r"another process works on it \(seen 19 s ago\)"):
            store.resume("run-1", "78")
        clock.now += 1
        assert store.resume("run-1", "78").epoch == 2

    def test_clock_that_was_put_back(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A sign of life from far in the future does not block a run for ever."""
        clock.now -= 86_400
        assert store.resume("run-1", "78").epoch == 2

    @pytest.mark.parametrize("end", ["fail", "stop"])
    def test_ended_process(self, store: RunStore, lease: RunLease, end: str) -> None:
        """A run that failed or was stopped can be resumed at once."""
        getattr(lease, end)("why")
        assert store.resume("run-1", "78").epoch == 2

    def test_finished(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A finished run is not run again."""
        lease.finish("runs/run-1/bundle")
        dead(clock)
        with pytest.raises(RunError, match="run-1: has finished"):
            store.resume("run-1", "78")

    def test_fences_the_old_process(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """Whatever an older process sends after it was taken for dead is refused and not kept."""
        save(lease, 1)
        dead(clock)
        new = store.resume("run-1", "78")
        save(new, 2)
        before = store.row("run-1")
        clock.now += 1
        row = MerchantRow("shop", "takes part", 9, "", clock.now)
        for write in (
            lambda: save(lease, 9),
            lambda: lease.beat("still here"),
            lambda: lease.merchants([row]),
            lease.running,
            lambda: lease.finish("elsewhere"),
            lambda: lease.fail("elsewhere"),
            lambda: lease.stop("elsewhere"),
        ):
            with pytest.raises(ArchiveError, match=TAKEN_OVER):
                write()
        assert (store.row("run-1"), store.merchants("run-1")) == (before, [])
        assert lease.checkpoint == b"checkpoint 1"
        dead(clock)
        assert store.resume("run-1", "79").checkpoint == b"checkpoint 2"

    def test_fence_after_the_end(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """An older process learns that it was taken over, also where the newer one has finished."""
        dead(clock)
        store.resume("run-1", "78").finish("bundle")
        for write in (lambda: save(lease, 1), lease.beat, lambda: lease.finish("bundle")):
            with pytest.raises(ArchiveError, match=TAKEN_OVER):
                write()

    def test_run_that_was_deleted(self, store: RunStore, lease: RunLease) -> None:
        """A run that somebody deleted from the database is not written again."""
        store._database.write(lambda connection: connection.execute(RUNS.delete()))
        with pytest.raises(ArchiveError, match="run-1: is no longer in the run store"):
            save(lease, 1)


class TestEnds:
    """RunLease.running, finish, fail and stop."""

    def test_states(self, store: RunStore, lease: RunLease) -> None:
        """Each step of a run's life is in its row."""
        lease.running()
        assert store.row("run-1").state == RunState.RUNNING
        lease.fail("two\nlines")
        assert (store.row("run-1").state, store.row("run-1").reason) == (
            RunState.FAILED,
            "two lines",
        )
        lease.stop("asked to")
        assert store.row("run-1").reason == "asked to"
        lease.finish(Path("runs/bundle"))
        assert (store.row("run-1").state, store.row("run-1").bundle) == (
            RunState.FINISHED,
            "runs/bundle",
        )

    def test_finished_is_final(self, store: RunStore, lease: RunLease) -> None:
        """After the end nothing changes: the same end is no matter, another one is an error."""
        lease.finish("bundle")
        before = store.row("run-1")
        lease.finish("bundle")
        assert lease.beat("too late by one") is False
        for write in (lambda: save(lease, 4), lease.running, lambda: lease.finish("another")):
            with pytest.raises(ArchiveError, match="run-1: has finished; nothing was written"):
                write()
        assert store.row("run-1") == before


class TestStop:
    """RunStore.request_stop and RunLease.beat."""

    def test_living_process_is_asked(self, store: RunStore, lease: RunLease) -> None:
        """A process learns with its next sign of life that it is asked to stop."""
        assert lease.beat() is False
        store.request_stop("run-1")
        assert store.row("run-1").state == RunState.WAITING
        assert lease.beat() is True
        lease.stop("asked to")
        assert store.row("run-1").stop_requested is False

    def test_dead_process(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A run whose process died is ended; a process that only slept stops when it wakes up."""
        dead(clock)
        store.request_stop("run-1")
        row = store.row("run-1")
        assert (row.state, row.reason) == (
            RunState.STOPPED,
            "was stopped after its process had died",
        )
        assert lease.beat() is True

    def test_ended_run(self, store: RunStore, lease: RunLease) -> None:
        """There is nothing to stop in a run that has ended."""
        lease.fail("why")
        with pytest.raises(RunError, match=r"run-1: has ended \(failed\)"):
            store.request_stop("run-1")

    def test_resumed_run(self, store: RunStore, lease: RunLease) -> None:
        """A resumed run is not stopped by what was asked of the process before."""
        store.request_stop("run-1")
        lease.stop("asked to")
        assert store.resume("run-1", "78").beat() is False


class TestBeat:
    """RunLease.beat and RunStore.is_alive."""

    def test_message(self, store: RunStore, lease: RunLease) -> None:
        """The last message stays until there is another."""
        lease.beat("waits for 1 more merchant")
        lease.beat()
        assert store.row("run-1").message == "waits for 1 more merchant"

    def test_message_of_strangers(self, store: RunStore, lease: RunLease) -> None:
        """A text is one short line, whatever signs a merchant's error had."""
        lease.beat("a\x00b\r\n\x1b[31mc \ud800d" + "e" * 9999)
        message = store.row("run-1").message
        assert message.startswith("a b [31mc d")
        assert len(message) == 500

    def test_alive(self, store: RunStore, lease: RunLease, clock: Clock) -> None:
        """A run is alive while its process says so and it has not ended."""
        row = store.row("run-1")
        assert store.is_alive(row)
        assert not store.is_alive(row, clock.now + STALE_S)
        assert not store.is_alive(replace(row, state=RunState.FAILED))
        dead(clock)
        assert not store.is_alive(row)
        lease.beat()
        assert store.is_alive(store.row("run-1"))


class TestMerchants:
    """RunLease.merchants and RunStore.merchants."""

    def test_upsert(self, store: RunStore, lease: RunLease) -> None:
        """A merchant's row replaces the one before; others stay; order is by id."""
        first = [
            MerchantRow("shop-b", "takes part", 1, "", 10.0),
            MerchantRow("shop-A", "late", 1, "", 11.0),
        ]
        lease.merchants(first)
        changed = MerchantRow("shop-b", "refused", 2, "the budget is spent", 20.5)
        lease.merchants([first[0], changed])
        lease.merchants([])
        assert store.merchants("run-1") == [first[1], changed]
        assert store.merchants("run-2") == []

    def test_error_of_several_lines(self, store: RunStore, lease: RunLease) -> None:
        """An error becomes one line."""
        lease.merchants([MerchantRow("shop", "out", 1, "a\n\tb\x00", 1.0)])
        assert store.merchants("run-1")[0].last_error == "a b"


class TestErrors:
    """What a person reads when a store cannot be used."""

    @pytest.mark.parametrize(
        ("url", "told"),
        [
            ("nonsense", "the URL of the run store cannot be read; write sqlite:///FILE or "),
            ("mysql://me:hidden@host/runs", r"mysql://me:\*\*\*@host/runs: no run store can be"),
            ("sqlite://", "outlives its process"),
            ("sqlite:///:memory:", "outlives its process"),
        ],
    )
    def test_url(self, url: str, told: str) -> None:
        """A URL of another form is refused with the two forms, never with its password."""
        with pytest.raises(ArchiveError, match=told) as caught:
            RunStore(url)
        assert "hidden" not in str(caught.value)

    def test_missing_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Who lacks the driver of PostgreSQL is told what to install."""
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(ArchiveError, match=r"pip install 'hansa\[postgres\]'"):
            RunStore("postgresql://me:hidden@127.0.0.1/runs")

    def test_server_that_is_not_there(self) -> None:
        """A server that does not answer is named, and its password is not."""
        with socket.socket() as taken:  # bound, and not listening
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            with pytest.raises(ArchiveError, match="check that the server runs") as caught:
                RunStore(f"postgresql://me:hidden@127.0.0.1:{port}/runs?sslpassword=veiled")
        assert f"postgresql+psycopg://me:***@127.0.0.1:{port}/runs" in str(caught.value)
        assert not {"hidden", "veiled"} & set(str(caught.value).replace("=", " ").split())

    def test_wrong_password(self, postgres: Postgres) -> None:
        """A wrong password is neither accepted nor repeated."""
        url = postgres.new_database().replace(PASSWORD, "not-the-word")
        with pytest.raises(ArchiveError, match="password authentication failed") as caught:
            RunStore(url)
        assert "not-the-word" not in str(caught.value)

    def test_user_without_rights(self, postgres: Postgres) -> None:
        """A user who may not make tables is told which right is missing."""
        url = postgres.new_database()
        with postgres.connect() as connection:
            connection.execute("DROP ROLE IF EXISTS guest")
            connection.execute("CREATE ROLE guest LOGIN PASSWORD 'pw-of-guest'")
        guest = url.replace(f"hansa:{PASSWORD}", "guest:pw-of-guest")
        with pytest.raises(ArchiveError, match="give its user the right to make tables"):
            RunStore(guest)

    def test_missing_folder(self, tmp_path: Path) -> None:
        """A file in a folder that is not there cannot be opened."""
        with pytest.raises(ArchiveError, match="No such file or directory"):
            RunStore(sqlite_url(tmp_path / "nowhere" / "runs.sqlite"))

    def test_other_file(self, tmp_path: Path) -> None:
        """A file that is no database is left as it is."""
        path = tmp_path / "runs.sqlite"
        path.write_text("a letter, long enough to be none" * 99)
        with pytest.raises(ArchiveError, match="file is not a database"):
            RunStore(sqlite_url(path))
        assert path.read_text().startswith("a letter")

    def test_locked_file(self, tmp_path: Path) -> None:
        """A file that another process holds is an error after a while, and works again later."""
        path = tmp_path / "runs.sqlite"
        store = RunStore(f"{sqlite_url(path)}?timeout=0.2")
        lease = store.begin("run-1", "c0ffee", 3, "77")
        with closing(sqlite3.connect(path, isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            with pytest.raises(ArchiveError, match="another process holds it"):
                save(lease, 1)
        save(lease, 2)
        assert store.row("run-1").round == 2

    def test_no_checkpoint_in_a_message(self, tmp_path: Path) -> None:
        """What a checkpoint holds stays out of errors."""
        store = RunStore(sqlite_url(tmp_path / "runs.sqlite"))
        lease = store.begin("run-1", "c0ffee", 3, "77")
        with pytest.raises(ArchiveError) as caught:
            lease.save(b"secret state", round=1, epsilon=float("nan"), cohort=1)
        assert "secret" not in str(caught.value)


class TestSqliteFile:
    """What is particular to SQLite."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """Give the path of a new store."""
        return tmp_path / "odd % name?.sqlite"

    @pytest.fixture
    def lease(self, path: Path) -> RunLease:
        """Give the lease of a run in it."""
        return RunStore(sqlite_url(path)).begin("run-1", "c0ffee", 3, "77")

    def test_only_its_owner_reads_it(self, path: Path, lease: RunLease) -> None:
        """A new file has mode 0600."""
        save(lease, 1)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def test_settings(self, path: Path, lease: RunLease) -> None:
        """Commits reach the disk, and what is deleted is overwritten."""
        wanted = {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1, "foreign_keys": 1}
        database = lease._database
        for name, value in wanted.items():
            found = database.read(
                lambda connection, name=name: connection.exec_driver_sql(  # type: ignore[misc]
                    f"PRAGMA {name}"
                ).scalar()
            )
            assert (name, found) == (name, value)

    def test_old_checkpoints_are_overwritten(self, path: Path, lease: RunLease) -> None:
        """Nothing of a forgotten checkpoint is left in the store's files."""
        with closing(sqlite3.connect(path)) as reader:  # so that the log is not simply deleted
            reader.execute("SELECT count(*) FROM hansa_run").fetchone()
            for number in range(1, 5):
                save(lease, number, f"<secret {number}>".encode() * 5000)
            files = sorted(path.parent.glob(f"{path.name}*"))
            assert len(files) == 3
            kept = b"".join(file.read_bytes() for file in files)
        found = [f"<secret {number}>".encode() in kept for number in range(1, 5)]
        assert found == [False, False, True, True]

    def test_saves_beside_a_reader(self, path: Path, lease: RunLease) -> None:
        """A reader in the middle of its transaction keeps no checkpoint from being saved."""
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            before = reader.execute("SELECT round FROM hansa_run").fetchone()
            save(lease, 1)
            assert reader.execute("SELECT round FROM hansa_run").fetchone() == before == (0,)
        assert RunStore(sqlite_url(path)).row("run-1").round == 1


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Give a file system of one MiB."""
    folder = Path(tempfile.mkdtemp(prefix="hansa-disk-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
        if done.returncode != 0:
            pytest.skip("a small file system cannot be mounted (needs root)")
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)
    finally:
        shutil.rmtree(folder)


def test_full_disk(small_disk: Path, clock: Clock) -> None:
    """A full disk is told, the last checkpoint stays, and the run goes on when there is room."""
    store = RunStore(sqlite_url(small_disk / "runs.sqlite"), clock)
    lease = store.begin("run-1", "c0ffee", 3, "77")
    save(lease, 1, b"1" * 100_000)
    filler = small_disk / "filler"
    filler.write_bytes(bytes(800_000))
    with pytest.raises(ArchiveError, match=r"disk is full.*make room on its disk"):
        save(lease, 2, b"2" * 500_000)
    assert store.row("run-1").round == 1
    filler.unlink()
    save(lease, 2, b"2" * 200_000)
    dead(clock)
    assert store.resume("run-1", "78").checkpoint == b"2" * 200_000
