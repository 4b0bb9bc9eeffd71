"""Follows a run from outside, by what its coordinator writes into the run store.

The verdict is the run's own. Flower only says whether its process is still there: it calls a run
that failed completed, and one that was killed running.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from common.errors import ArchiveError, RunError
from common.statements import epsilon_text
from server.runs import STALE_S, RunRow, RunState, RunStore

ACTIVE = frozenset({RunState.WAITING, RunState.RUNNING})
_PAUSE_S = 0.5
_ASK_FLOWER_S = 2.0
_PATIENCE_S = 300.0  # with a run store that does not answer
_SECONDS = re.compile(r"\d[\d,.]* s\b")  # a message that only counts down is no news


@dataclass(frozen=True)
class Ending:
    """How a run came to its end; `row` is None where its coordinator never wrote a word."""

    row: RunRow | None
    expected: bool = True  # False: the coordinator is gone and did not say why

    @property
    def state(self) -> RunState | None:
        """Return the run's own verdict, if it gave one."""
        return self.row.state if self.row is not None and self.expected else None


class Follower:
    """Follows one run.

    Args:
        store: Of the runs.
        run: Its name.
        going: Says whether Flower's run still goes on; None: nobody can tell right now.
        after_epoch: What an older process of the same run wrote up to this epoch is not news.
    """

    def __init__(
        self,
        store: RunStore,
        run: str,
        going: Callable[[], bool | None],
        after_epoch: int = 0,
    ) -> None:
        self._store = store
        self._run = run
        self._going = going
        self._after_epoch = after_epoch
        self._told: tuple[object, ...] = ()
        self._silent = False
        self._ask_after = 0.0

    def follow(self, say: Callable[[str], None], pause_s: float = _PAUSE_S) -> Ending:
        """Say one line for every change; return when the run is at its end.

        Raises:
            ArchiveError: The run store does not answer for minutes.
        """
        while True:
            row = self._row(say)
            if row is not None and row.state not in ACTIVE:
                return Ending(row)
            if row is not None:
                for line in self._news(row):
                    say(line)
            if self._is_gone(row):
                row = self._row(say)  # its last word may have come meanwhile
                return Ending(row, expected=row is not None and row.state not in ACTIVE)
            time.sleep(pause_s)

    def _row(self, say: Callable[[str], None]) -> RunRow | None:
        """Return what the run's present process wrote, if it wrote anything yet."""
        until, told = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                row = self._store.row(self._run)
            except ArchiveError as error:  # a database server that restarts
                if time.monotonic() > until:
                    raise
                if not told:
                    say(f"{error}; trying again")
                told = True
                time.sleep(1.0)
            except RunError:
                return None  # not begun yet
            else:
                return row if row.epoch > self._after_epoch else None

    def _news(self, row: RunRow) -> Iterator[str]:
        silent = not self._store.is_alive(row)
        if silent and not self._silent:
            yield (
                f"no sign of life from the coordinator for {STALE_S} s; waiting for Flower to "
                "say what became of it"
            )
        self._silent = silent
        news = line_of(row)
        told = (row.round, _SECONDS.sub("", news))
        if news and told != self._told:
            yield news
        self._told = told

    def _is_gone(self, row: RunRow | None) -> bool:
        """Tell whether nobody works on the run any more; Flower is not asked all the time."""
        if row is not None and self._store.is_alive(row):
            return False
        if time.monotonic() < self._ask_after:
            return False
        self._ask_after = time.monotonic() + _ASK_FLOWER_S
        return self._going() is False


def line_of(row: RunRow) -> str:
    """Say in one line where a run is."""
    if row.state == RunState.WAITING or row.round == 0:
        return row.message
    merchants = "1 merchant" if row.cohort == 1 else f"{row.cohort:,} merchants"
    return (
        f"round {row.round:,}/{row.rounds:,}: {merchants}, epsilon "
        f"{epsilon_text(row.epsilon)} so far"
    )
