"""Keep processes running: start in order, start again what ended or hangs, end all together.

One supervisor a folder, which is locked while it runs. What it does is in `state.json` beside
the lock. Whatever ends the supervisor ends its children (`common.tether`).
"""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.child_process import Child, signal_group, started, tethered, wait_for
from common.errors import PolicyError
from common.files import write_atomically
from common.logs import last_error
from common.service_lock import locked, start_in_background, state_of, stop

__all__ = ["Child", "Supervisor", "start_in_background", "state_of", "stop", "tethered"]

_TICK_S = 0.2
_PROBE_S = 1.0  # between two questions after a child's health
_FIRST_DELAY_S, _LAST_DELAY_S = 0.5, 30.0
_WELL_S = 60.0  # so long without trouble, and earlier trouble is forgotten
_GRACE_S = 10.0  # between SIGTERM and SIGKILL
_TURN_S = 2.0  # that a child has to end before the one that it needs is told to
_STALL_S = 3.0  # a supervisor that itself stood still for so long blames no child

Event = dict[str, Any]


class _Held:
    """One child and how it is."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: subprocess.Popen[bytes] | None = None
        self.number = 0  # of starts
        self.state = "waiting"
        self.note = ""
        self.restarts = 0
        self.since = time.time()
        self.last_exit: int | None = None
        self.started_at = 0.0  # the rest by the monotonic clock
        self.not_before = 0.0
        self.troubles = 0
        self.well_since: float | None = None
        self.seen_well: tuple[int, float] = (0, 0.0)  # number, when
        self.logged = 0  # bytes of the log before this start

    def tell(self, state: str, note: str = "") -> bool:
        """Take a state; tell whether it is news."""
        news = (state, note) != (self.state, self.note)
        if state != self.state:
            self.since = time.time()
        self.state, self.note = state, note
        return news

    def forgive(self, seconds: float) -> None:
        """Let a time not count during which nobody could have seen it being well."""
        self.started_at += seconds
        number, when = self.seen_well
        self.seen_well = (number, when + seconds)

    def document(self) -> dict[str, Any]:
        """Return it as the state file has it."""
        return {
            "pid": self.process.pid if self.process else None,
            "state": self.state,
            "restarts": self.restarts,
            "since": self.since,
            "last_exit": self.last_exit,
            "note": self.note,
        }


class Supervisor:
    """Runs children until it is told to stop.

    Args:
        folder: Where lock and state are, made with mode 0700.
        children: What should run.
        on_event: Called with what happens: `event`, `child` and more.

    Raises:
        PolicyError: A child should run as another user, and this process may not do that.
    """

    def __init__(
        self, folder: Path, children: Sequence[Child], on_event: Callable[[Event], None]
    ) -> None:
        for child in children:
            if child.user is not None and os.geteuid() != 0:
                raise PolicyError(
                    f"{child.name} should run as the user '{child.user}'; only root can start a "
                    "process as another user: start as root, or take the user out of the settings"
                )
        self._folder = folder
        self._held = {child.name: _Held(child) for child in children}
        self._on_event = on_event
        self._stop = threading.Event()
        self._started_at = time.time()

    def run(self) -> int:
        """Run until SIGTERM or SIGINT; return the exit status.

        Raises:
            ServiceError: Another supervisor runs in this folder.
        """
        with locked(self._folder), self._signals():
            try:
                self._save()
                for held in self._held.values():
                    if held.child.healthy is not None:
                        threading.Thread(target=self._watch, args=(held,), daemon=True).start()
                self._go_on()
            finally:
                self._stop.set()
                self._end_all()
                self._save()
        return 0

    def _go_on(self) -> None:
        last = time.monotonic()
        while not self._stop.is_set():
            stall = time.monotonic() - last
            if stall > _STALL_S:
                for held in self._held.values():
                    held.forgive(stall)
            last = time.monotonic()
            if any([self._care(held) for held in self._held.values()]):
                self._save()
            self._stop.wait(_TICK_S)

    def stop(self) -> None:
        """Have `run` return, as a signal would."""
        self._stop.set()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Stop at SIGTERM and SIGINT, where signals can be caught."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, lambda *_: self._stop.set()) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _watch(self, held: _Held) -> None:
        """Ask a child after its health, again and again; the answer may take long."""
        healthy = held.child.healthy
        while healthy is not None and not self._stop.is_set():
            number = held.number
            if held.process is not None:
                try:
                    well = healthy()
                except Exception as error:  # noqa: BLE001  # whatever it raises, it is no "yes"
                    well = False
                    held.note = f"its health cannot be asked ({type(error).__name__})"
                if well:
                    held.seen_well = (number, time.monotonic())
            self._stop.wait(_PROBE_S if held.state == "running" else _TICK_S)

    def _care(self, held: _Held) -> bool:
        """Do what a child needs now; tell whether its state is news."""
        if held.process is None:
            return self._consider_start(held)
        status = held.process.poll()
        if status is not None:
            signal_group(held.process, signal.SIGKILL)  # what it started itself and left behind
            return self._ended(held, status)
        now = time.monotonic()
        well_at = self._well_at(held, now)
        if well_at is None:
            if now - held.started_at > held.child.start_s:
                self._kill_hung(held, held.process, f"not healthy within {held.child.start_s:g} s")
            return False
        if now - well_at > held.child.hang_s:
            self._kill_hung(held, held.process, f"no sign of health for {held.child.hang_s:g} s")
            return False
        if held.well_since is None:
            held.well_since = now
            self._tell(held, "healthy", pid=held.process.pid)
        if now - held.well_since > _WELL_S:
            held.troubles = 0
        return held.tell("running")

    @staticmethod
    def _well_at(held: _Held, now: float) -> float | None:
        """Return when this start of a child was seen to be well last."""
        if held.child.healthy is None:
            return now
        number, when = held.seen_well
        return when if number == held.number else None

    def _consider_start(self, held: _Held) -> bool:
        if time.monotonic() < held.not_before:
            return False
        needed = [name for name in held.child.after if self._held[name].state != "running"]
        if needed:
            return held.tell("waiting", f"for {', '.join(needed)}")
        self._start(held)
        return True

    def _start(self, held: _Held) -> None:
        child = held.child
        held.number += 1
        held.restarts = held.number - 1
        held.started_at, held.well_since = time.monotonic(), None
        held.tell("starting")
        try:
            held.process, held.logged = started(child)
        except OSError as error:
            held.tell("failed", f"cannot be started ({error.strerror})")
            self._put_off(held)
            self._tell(held, "failed", reason=held.note)
            return
        self._tell(held, "started", pid=held.process.pid)

    def _ended(self, held: _Held, status: int) -> bool:
        held.process, held.last_exit = None, status
        delay = self._put_off(held)
        reason = last_error(held.child.log, held.logged)
        how = f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        held.tell("failed", f"ended ({how}){': ' if reason else ''}{reason}")
        self._tell(held, "ended", status=status, reason=reason, again_in_s=round(delay, 1))
        return True

    def _put_off(self, held: _Held) -> float:
        """Wait before the next start, longer after each trouble; return for how long."""
        delay = min(_FIRST_DELAY_S * 2.0 ** min(held.troubles, 10), _LAST_DELAY_S)
        held.troubles += 1
        held.not_before = time.monotonic() + delay
        return delay

    def _kill_hung(self, held: _Held, process: subprocess.Popen[bytes], why: str) -> None:
        self._tell(held, "hung", pid=process.pid, reason=why)
        signal_group(process, signal.SIGKILL)
        self._ended(held, process.wait())
        held.tell("failed", f"was killed: {why}")
        self._save()

    def _end_all(self) -> None:
        """End the children, the last one first; after a while by force."""
        end = time.monotonic() + _GRACE_S
        for held in reversed(self._held.values()):
            if held.process is not None:
                signal_group(held.process, signal.SIGTERM)
                signal_group(held.process, signal.SIGCONT)  # a stopped one cannot end itself
                wait_for(held.process, min(_TURN_S, end - time.monotonic()))
        for held in self._held.values():
            if held.process is not None:
                wait_for(held.process, end - time.monotonic())
                signal_group(held.process, signal.SIGKILL)
                held.last_exit = held.process.wait()
                held.process = None
                self._tell(held, "stopped", status=held.last_exit)
            held.tell("stopped")

    def _tell(self, held: _Held, event: str, **more: object) -> None:
        self._on_event({"event": event, "child": held.child.name, **more})

    def _save(self) -> None:
        """Write the state file; a full disk must not end what runs."""
        document = {
            "pid": os.getpid(),
            "started_at": self._started_at,
            "children": {name: held.document() for name, held in self._held.items()},
        }
        try:
            write_atomically(self._folder / "state.json", json.dumps(document).encode())
        except OSError as error:
            self._on_event({"event": "state not written", "child": "", "reason": error.strerror})
