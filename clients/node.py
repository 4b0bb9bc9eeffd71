"""The node: a process that faces the network and has nothing of value.

`python -m clients.node FOLDER` logs in at the operator's server, takes messages, hands each to
the worker of the merchant in FOLDER and gives back what that answers. It reads the node's key,
the address and the certificate authority, and nothing else: no row, no identity key, no ledger;
it never fetches the app bundle, let alone runs it. It ends when it is told to, never because of
the server: it tries again for ever, and says in its state why it is not connected.
"""

import argparse
import logging
import signal
import sys
import threading
import time
from pathlib import Path

from clients.fleet_link import FleetLink, Pulled, read_node_key
from clients.fleet_troubles import FleetTrouble
from clients.handling import HANDLERS
from clients.pace import Backoff, Pace
from clients.pinned import read_enrolment
from clients.places import Places
from clients.pulse import Pulse, key_name
from clients.worker_link import WorkerLink
from common.errors import HansaError
from common.logs import set_up
from common.worker_wire import UNAVAILABLE, Answer

logger = logging.getLogger("hansa.node")

_TAKEN_S = 3.0  # between two tries to log in while another node has the same key
_WORKER_S, _HEALTH_S = 0.5, 3.0
_IDLE_S = 1.0  # a pause that is longer shows that no run goes on right now
_LONGEST_PUSH_S = 120.0
_LOST, _DROPPED = "lost", "run over"  # outcomes beside "answer", "error" and "unavailable"


class Node:
    """Takes messages and gives answers until it is told to stop.

    Args:
        places: The merchant's folder.
        worker: The way to its worker.
        pulse: Where the node says how it is.
        poll_s: The longest pause between two questions after messages.
    """

    def __init__(self, places: Places, worker: WorkerLink, pulse: Pulse, poll_s: float) -> None:
        self._places = places
        self._worker = worker
        self._pulse = pulse
        self._pace = Pace(poll_s)
        self._stop = threading.Event()
        self._known = (pulse.record["node_id"], pulse.record["key"])

    def stop(self) -> None:
        """Have `run` return; safe in a signal."""
        self._stop.set()

    def run(self) -> None:
        """Connect and serve, for ever."""
        backoff = Backoff()
        while not self._stop.is_set():
            if not self._worker_ready():
                self._wait(_WORKER_S)
                continue
            try:
                link = self._link()
            except HansaError as error:  # files that a person puts right meanwhile
                self._say("disconnected", str(error))
                self._wait(backoff.next())
                continue
            try:
                self._log_in(link)
                backoff.reset()
                self._serve(link)
            except FleetTrouble as trouble:
                self._say("disconnected", self._explained(link, trouble))
                self._wait(_TAKEN_S if trouble.taken else backoff.next())
            finally:
                link.close(leave=self._stop.is_set())
        self._say("stopped", "")

    def _worker_ready(self) -> bool:
        """Tell whether there is somebody to answer; a node without one must not log in."""
        found = self._worker.health(_HEALTH_S)
        if found is not None and found["state"] in {"ready", "computing"}:
            return True
        self._say(
            "waiting", "for its worker" if found is None else f"its worker is {found['state']}"
        )
        return False

    def _link(self) -> FleetLink:
        enrolment = read_enrolment(self._places.folder)
        key = read_node_key(self._places.node_key)
        return FleetLink(enrolment.url, enrolment.ca_pem, key)

    def _log_in(self, link: FleetLink) -> None:
        self._pulse.touch()
        link.activate()
        self._known = (link.node_id, key_name(link.public))
        self._pulse.known_as(link.node_id, link.public)
        self._say("connected", "")

    def _explained(self, link: FleetLink, trouble: FleetTrouble) -> str:
        """Return why it failed; where the server does not say, find out which of two it is."""
        node_id, key = self._known
        if trouble.taken and node_id and key == key_name(link.public):
            try:
                if not link.is_registered(node_id):
                    return "the server does not know this node any more: it was revoked or replaced"
            except FleetTrouble as other:
                return other.reason
            return trouble.reason
        if trouble.taken:
            return f"{trouble.reason} (if it stays so: the operator may have revoked this merchant)"
        return trouble.reason

    def _serve(self, link: FleetLink) -> None:
        """Take messages until the connection has to be made anew; raises `FleetTrouble`."""
        backoff = Backoff(longest_s=5.0)
        while not self._stop.is_set():
            link.check()
            asked = time.monotonic()
            try:
                pulled = link.pull()
            except FleetTrouble as trouble:
                if trouble.rejected:
                    raise
                self._say("disconnected", trouble.reason)
                self._wait(backoff.next())
                continue
            backoff.reset()
            self._say("connected", "")
            self._pace.took(time.monotonic() - asked)
            if pulled is None:
                self._rest(link)
                continue
            self._pace.message()
            self._care_for(link, pulled)
            self._pace.message()

    def _rest(self, link: FleetLink) -> None:
        pause = self._pace.next()
        if pause > _IDLE_S:
            link.tidy()
        self._wait(pause)

    def _care_for(self, link: FleetLink, pulled: Pulled) -> None:
        """Answer one message, whatever happens; log that, and nothing that is in it."""
        started, metadata = time.monotonic(), pulled.message.metadata
        line = {"type": metadata.message_type[:64], "run": str(metadata.run_id)}
        outcome, size = _LOST, (0, 0)
        try:
            content = link.content_of(pulled)
            answer = self._answer(pulled, content)
            size = (len(content), len(answer.content))
            outcome = self._give(link, pulled, answer, time.monotonic() - started)
        except FleetTrouble as trouble:
            outcome = _DROPPED if trouble.over else _LOST
            line["reason"] = trouble.reason
        except Exception:
            logger.exception("a message was lost", extra=line)
        seconds = time.monotonic() - started
        self._pulse.count(metadata.message_type, outcome, seconds)
        logger.info(
            "message",
            extra={
                **line,
                "outcome": outcome,
                "ms": round(seconds * 1000, 1),
                "bytes_in": size[0],
                "bytes_out": size[1],
            },
        )

    def _answer(self, pulled: Pulled, content: bytes) -> Answer:
        def waiting() -> bool:
            self._pulse.touch()
            return not self._stop.is_set()

        kind = pulled.message.metadata.message_type
        return self._worker.ask(kind, content, max(pulled.seconds_left, 0.0), waiting)

    def _give(self, link: FleetLink, pulled: Pulled, answer: Answer, seconds: float) -> str:
        """Push a reply, again and again while it is of use; return the outcome."""
        reply, backoff = link.reply(pulled, answer), Backoff(longest_s=5.0)
        end = time.monotonic() + min(pulled.seconds_left, _LONGEST_PUSH_S)
        while True:
            self._pulse.touch()
            try:
                link.push(reply, seconds)
                break
            except FleetTrouble as trouble:
                if trouble.over or trouble.rejected or time.monotonic() > end:
                    raise
                self._say("disconnected", trouble.reason)
                if self._wait(backoff.next()):
                    raise
        if answer.error is None:
            return "answer"
        return "unavailable" if answer.error.startswith(UNAVAILABLE) else "error"

    def _say(self, state: str, reason: str) -> None:
        if self._pulse.tell(state, reason):
            level = logging.INFO if state != "disconnected" else logging.WARNING
            logger.log(level, "%s%s", state, f": {reason}" if reason else "")

    def _wait(self, seconds: float) -> bool:
        """Wait, showing that this process is alive; return at once when it shall stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._pulse.touch()
            if self._stop.wait(min(left, 1.0)):
                return True
        return self._stop.is_set()


def main() -> int:
    """Run until a signal comes; return the exit status."""
    parser = argparse.ArgumentParser(prog="clients.node")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--poll-s", type=float, default=2.0)
    options = parser.parse_args()
    set_up("node")
    places = Places.of(options.folder)
    worker = WorkerLink(places.socket)
    try:
        pulse = Pulse(places.node_state, frozenset(HANDLERS))
    except HansaError as error:
        logger.critical("%s", error)
        return 2
    node = Node(places, worker, pulse, options.poll_s)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: node.stop())
    node.run()
    pulse.close()
    worker.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
