"""Tests of following a run: its own verdict counts, and nobody is left waiting for the dead."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import ArchiveError, ServiceError
from server import following
from server.following import Ending, Follower, line_of
from server.run_control import RunControl
from server.runs import STALE_S, RunLease, RunState, RunStore, sqlite_url
from server.settings import Settings
from tests.operated import make_operator


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = time.time()

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give the store's clock."""
    return Clock()


@pytest.fixture
def store(tmp_path: Path, clock: Clock) -> RunStore:
    """Give an empty store."""
    return RunStore(sqlite_url(tmp_path / "runs.sqlite"), clock)


class Watcher:
    """Follows a run in a thread, and lets a test wait for what was said."""

    def __init__(
        self, store: RunStore, going: Callable[[], bool | None], after_epoch: int = 0
    ) -> None:
        self.said: list[str] = []
        self.ending: Ending | None = None
        follower = Follower(store, "r1", going, after_epoch)

        def follow() -> None:
            self.ending = follower.follow(self.said.append, pause_s=0.005)

        self._thread = threading.Thread(target=follow, daemon=True)
        self._thread.start()

    def wait_for(self, text: str) -> None:
        """Wait until a line holds a text."""
        until = time.monotonic() + 30
        while not any(text in line for line in self.said):
            assert time.monotonic() < until, self.said
            time.sleep(0.005)

    def end(self) -> Ending:
        """Return how the run ended."""
        self._thread.join(timeout=30)
        assert self.ending is not None, self.said
        return self.ending


def save(lease: RunLease, number: int) -> None:
    """Save a round."""
    lease.running()
    lease.save(b"x", round=number, epsilon=number / 10, cohort=5)


class TestFollower:
    """What is said, and how it ends."""

    def test_one_line_is_said_for_every_change(self, store: RunStore) -> None:
        """Waiting, then every round; a message that only counts down is no change."""
        watcher = Watcher(store, lambda: True)
        lease = store.begin("r1", "c0ffee", 2, "1")
        for left in (30, 29, 28):
            lease.beat(f"waits for 1 more merchant (at most {left} s more)")
            time.sleep(0.05)
        watcher.wait_for("waits for 1 more merchant")
        lease.running()
        for number in (1, 2):
            save(lease, number)
            watcher.wait_for(f"round {number}/2")
        lease.finish("bundle")
        ending = watcher.end()
        assert ending.state == RunState.FINISHED
        assert [line.partition(" ")[0] for line in watcher.said] == ["waits", "round", "round"]
        assert watcher.said[-1] == "round 2/2: 5 merchants, epsilon 0.2 so far"

    @pytest.mark.parametrize("end", ["fail", "stop"])
    def test_a_run_that_says_why_is_believed(self, store: RunStore, end: str) -> None:
        """Whatever Flower says of it meanwhile."""
        lease = store.begin("r1", "c0ffee", 2, "1")
        watcher = Watcher(store, lambda: True)
        getattr(lease, end)("too few merchants")
        ending = watcher.end()
        assert ending.row is not None
        assert ending.row.reason == "too few merchants"
        assert ending.state == {"fail": RunState.FAILED, "stop": RunState.STOPPED}[end]

    def test_flower_s_word_alone_ends_nothing(self, store: RunStore) -> None:
        """A run that gives signs of life goes on, though Flower calls it finished."""
        lease = store.begin("r1", "c0ffee", 2, "1")
        watcher = Watcher(store, lambda: False)
        save(lease, 1)
        watcher.wait_for("round 1/2")
        assert watcher.ending is None
        lease.finish("bundle")
        assert watcher.end().state == RunState.FINISHED

    def test_a_dead_coordinator_ends_it_when_flower_agrees(
        self, store: RunStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """While nobody can tell, it is waited for, and that is said once."""
        monkeypatch.setattr(following, "_ASK_FLOWER_S", 0.0)
        save(store.begin("r1", "c0ffee", 2, "1"), 1)
        answers: list[bool | None] = [None, True, None, True]
        watcher = Watcher(store, lambda: answers.pop(0) if answers else False)
        watcher.wait_for("round 1/2")
        clock.now += STALE_S + 1
        ending = watcher.end()
        assert ending.row is not None
        assert ending.state is None
        assert sum("no sign of life" in line for line in watcher.said) == 1

    def test_a_run_that_never_begins_ends_with_flower_s(self, store: RunStore) -> None:
        """Its coordinator wrote nothing; there is no row to blame."""
        ending = Watcher(store, lambda: False).end()
        assert ending.row is None
        assert ending.state is None

    def test_the_old_verdict_of_a_resumed_run_is_no_news(self, store: RunStore) -> None:
        """What the process before said is not what the new one says."""
        lease = store.begin("r1", "c0ffee", 2, "1")
        save(lease, 1)
        lease.fail("the disk was full")
        watcher = Watcher(store, lambda: True, after_epoch=1)
        time.sleep(0.05)
        assert watcher.said == []
        again = store.resume("r1", "2")
        save(again, 2)
        watcher.wait_for("round 2/2")
        again.finish("bundle")
        assert watcher.end().state == RunState.FINISHED

    def test_a_store_that_stays_away_is_an_error(
        self, tmp_path: Path, store: RunStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is tried again for a while, and that is said."""
        monkeypatch.setattr(following, "_PATIENCE_S", 0.5)
        store.begin("r1", "c0ffee", 2, "1")
        for path in tmp_path.glob("runs.sqlite*"):
            path.unlink()
        (tmp_path / "runs.sqlite").write_bytes(b"no database" * 1000)
        said: list[str] = []
        with pytest.raises(ArchiveError):
            Follower(store, "r1", lambda: True).follow(said.append)
        assert len(said) == 1
        assert said[0].endswith("trying again")

    def test_before_the_first_round_the_message_is_told(self, store: RunStore) -> None:
        """There is no round to speak of yet."""
        lease = store.begin("r1", "c0ffee", 2, "1")
        lease.beat("census")
        assert line_of(store.row("r1")) == "census"
        one = replace(store.row("r1"), state=RunState.RUNNING, round=1, cohort=1, epsilon=0.5)
        assert line_of(one) == "round 1/2: 1 merchant, epsilon 0.5 so far"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Give the settings of an operator's folder whose services do not run."""
    return make_operator(tmp_path / "operator")


class TestRunControl:
    """Which run is under way, and which can be taken up; nothing of Flower's runs here."""

    def test_a_run_that_gives_signs_of_life_is_under_way(
        self, settings: Settings, store: RunStore
    ) -> None:
        """A second one is refused, with what to do."""
        store.begin("r1", "c0ffee", 2, "1")
        control = RunControl(settings, store)
        assert control.under_way() == "r1"
        with pytest.raises(ServiceError, match=r"run r1 is under way.*hansa server stop"):
            control.start("r2", None)

    def test_a_dead_run_is_not_under_way(
        self, settings: Settings, store: RunStore, clock: Clock
    ) -> None:
        """Without services there is nobody who could work on it."""
        store.begin("r1", "c0ffee", 2, "1")
        clock.now += STALE_S + 1
        assert RunControl(settings, store).under_way() is None

    def test_a_run_that_flower_lost_is_not_going(self, settings: Settings, store: RunStore) -> None:
        """A name that is no number of Flower's, and one that nobody can be asked about."""
        control = RunControl(settings, store)
        assert control.going("") is False
        assert control.going("17") is False

    def test_a_damaged_note_is_told(self, settings: Settings, store: RunStore) -> None:
        """The file is named; nothing is guessed."""
        (settings.run_folder / "asked.json").write_text("{", "ascii")
        with pytest.raises(ServiceError, match=r"asked\.json: is damaged"):
            RunControl(settings, store).under_way()

    def test_the_newest_unfinished_run_is_taken_up(
        self, settings: Settings, store: RunStore, clock: Clock
    ) -> None:
        """A finished one never is, and without any there is a hint."""
        control = RunControl(settings, store)
        with pytest.raises(ServiceError, match="no run to go on with"):
            control.unfinished(None)
        for name, end in (("r1", "fail"), ("r2", "stop"), ("r3", "finish")):
            clock.now += 1
            getattr(store.begin(name, "c0ffee", 2, "1"), end)("so")
        assert control.unfinished(None).run == "r2"
        assert control.unfinished("r1").run == "r1"
        with pytest.raises(ServiceError, match="r3: has finished"):
            control.unfinished("r3")

    def test_a_run_that_lives_is_not_taken_up(
        self, settings: Settings, store: RunStore, clock: Clock
    ) -> None:
        """Signs of life while waiting for silence are an answer."""
        lease = store.begin("r1", "c0ffee", 2, "1")
        row = store.row("r1")
        clock.now += 1
        lease.beat()
        said: list[str] = []
        with pytest.raises(ServiceError, match="r1: is under way"):
            RunControl(settings, store).resume(row, said.append)
        assert len(said) == 1
