"""Starts, stops and takes up runs on the operator's own SuperLink; one at a time."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from common.errors import RunError, ServiceError, SuperLinkError
from common.files import write_atomically
from common.service_lock import locked, state_of
from server.flower_control import Value, run_status, start_run, stop_run
from server.following import ACTIVE
from server.runs import STALE_S, RunRow, RunState, RunStore
from server.services import store_for_run
from server.settings import Settings

_LOCK = "starting.lock"
_ASKED = "asked.json"
_FLOWER_STOPS_S = 90.0  # a process that was killed is missed by Flower only after a while
_PAUSE_S = 0.5


@dataclass(frozen=True)
class Asked:
    """A run that Flower was asked to start; its coordinator writes later than `after_epoch`."""

    run: str
    flower_run: int
    after_epoch: int


class RunControl:
    """Starts and ends runs of one operator's folder.

    Args:
        settings: Of the folder.
        store: Of its runs.
    """

    def __init__(self, settings: Settings, store: RunStore) -> None:
        self._settings = settings
        self._store = store

    @property
    def _asked_file(self) -> Path:
        return self._settings.run_folder / _ASKED

    def start(self, run: str, wait_s: float | None) -> Asked:
        """Start a new run.

        Raises:
            ServiceError: Another run is under way.
            SuperLinkError: Flower does not start it.
        """
        with locked(self._settings.run_folder, _LOCK):
            self._refuse_second()
            return self._start(run, wait_s, after_epoch=0)

    def resume(self, row: RunRow, say: Callable[[str], None]) -> Asked:
        """Take a run up that broke off, as soon as its old process is certainly gone.

        Raises:
            ServiceError: It is under way, or another run is.
            SuperLinkError: Flower does not start it.
        """
        with locked(self._settings.run_folder, _LOCK):
            self._wait_for_silence(row, say)
            self._end_flower_run(row, say)
            self._refuse_second()
            return self._start(row.run, None, after_epoch=row.epoch)

    def unfinished(self, run: str | None) -> RunRow:
        """Return a run that can be taken up; without a name the newest one.

        Raises:
            ServiceError: There is none, or it has finished.
            RunError: The run is unknown.
        """
        if run is None:
            found = (row for row in self._store.rows() if row.state != RunState.FINISHED)
            row = next(found, None)
            if row is None:
                raise ServiceError(
                    "there is no run to go on with; begin one: hansa server run "
                    f"{self._settings.folder}"
                )
            return row
        row = self._store.row(run)
        if row.state == RunState.FINISHED:
            raise ServiceError(f"run {run}: has finished ({row.bundle}); nothing is left to do")
        return row

    def under_way(self) -> str | None:
        """Return the run that somebody works on, or is about to."""
        for row in self._store.rows():
            if row.state not in ACTIVE:
                continue
            if self._store.is_alive(row) or self.going(row.flower_run):
                return row.run
        asked = self._asked()
        if asked is not None and not self._has_begun(asked) and self.going(asked.flower_run):
            return asked.run
        return None

    def going(self, flower_run: int | str) -> bool | None:
        """Return whether Flower's run still goes on; None: nobody can tell right now."""
        try:
            status = run_status(self._settings, int(flower_run))
        except ValueError:
            return False  # Flower never had it
        except SuperLinkError as error:
            if hasattr(error, "code"):  # it answers, and knows no such run
                return False
            return None if state_of(self._settings.run_folder) is not None else False
        return bool(status) and not status.startswith("finished")

    def _refuse_second(self) -> None:
        run = self.under_way()
        if run is not None:
            folder = self._settings.folder
            raise ServiceError(
                f"run {run} is under way, and there can be only one; watch it: hansa server "
                f"status {folder} --watch; or end it: hansa server stop {folder}"
            )

    def _start(self, run: str, wait_s: float | None, after_epoch: int) -> Asked:
        from server.flower_bundle import bundle

        config: dict[str, Value] = {
            "federation": str(self._settings.folder.absolute()),
            "run": run,
            "store": store_for_run(self._settings),
        }
        if wait_s is not None:
            config["wait"] = float(wait_s)
        asked = Asked(run, start_run(self._settings, bundle(), config), after_epoch)
        write_atomically(self._asked_file, json.dumps(asdict(asked)).encode(), 0o600)
        return asked

    def _asked(self) -> Asked | None:
        try:
            return Asked(**json.loads(self._asked_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            raise ServiceError(f"{self._asked_file}: is damaged; remove it") from None

    def _has_begun(self, asked: Asked) -> bool:
        return any(
            row.run == asked.run and row.epoch > asked.after_epoch for row in self._store.rows()
        )

    def _wait_for_silence(self, row: RunRow, say: Callable[[str], None]) -> None:
        """Wait until a process that gives no more signs of life counts as gone.

        Raises:
            ServiceError: It gives signs of life.
        """
        first, told = row.alive_at, False
        while self._store.is_alive(row):
            if not told:
                say(f"waits up to {STALE_S} s to be sure that the old coordinator is gone")
            told = True
            time.sleep(_PAUSE_S)
            row = self._store.row(row.run)
            if row.state in ACTIVE and row.alive_at > first:
                raise ServiceError(
                    f"run {row.run}: is under way; watch it: hansa server status "
                    f"{self._settings.folder} --watch"
                )

    def _end_flower_run(self, row: RunRow, say: Callable[[str], None]) -> None:
        """Have Flower end what is left of the old run, and wait until it says so."""
        if self.going(row.flower_run) is False:
            return
        say("ends what is left of the old run")
        stop_run(self._settings, int(row.flower_run))
        until = time.monotonic() + _FLOWER_STOPS_S
        while self.going(row.flower_run) is not False:
            if time.monotonic() > until:
                raise RunError(
                    f"run {row.run}: Flower does not end its old run; restart the services "
                    "(hansa server stop, then start) and try again"
                )
            time.sleep(_PAUSE_S)
