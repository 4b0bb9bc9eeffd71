"""The processes of one merchant: its worker and its node, under one supervisor.

`python -m clients.supervising FOLDER [--rehearsal] [--tell]` runs until SIGTERM. Locks, states and
the socket are in FOLDER/run, logs in FOLDER/logs.
"""

import argparse
import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.merchant import Merchant, read_merchant
from clients.node_user import prepare_for
from clients.places import Places
from clients.pulse import is_alive, read_pulse
from clients.worker_link import WorkerLink
from clients.worker_socket import check_socket_path
from common.errors import HansaError
from common.logs import set_up
from common.supervision import Child, Supervisor, state_of

logger = logging.getLogger("hansa.supervisor")

WORKER, NODE = "worker", "node"
FLOWER_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_BUSY_S = {"opening": 60.0, "computing": 15.0}  # may leave its health unanswered for so long
_HANG_S = 10.0
_LOOK_S = 1.0


@dataclass
class WorkerHealth:
    """Says whether a worker is well: it answers, or said a short while ago that it is busy."""

    ask: Callable[[], dict[str, Any] | None]
    clock: Callable[[], float] = time.monotonic
    _until: float = field(default=0.0, init=False)

    def __call__(self) -> bool:
        """Ask it."""
        found = self.ask()
        if found is not None:
            self._until = self.clock() + _BUSY_S.get(str(found.get("state")), 0.0)
            return True
        return self.clock() < self._until


def supervisor_command(folder: Path, *, rehearsal: bool, tell: bool = False) -> list[str]:
    """Return the command that runs a merchant's supervisor."""
    options = [*(["--rehearsal"] if rehearsal else []), *(["--tell"] if tell else [])]
    return [*_python("clients.supervising"), str(folder), *options]


def children_of(
    places: Places, merchant: Merchant, link: WorkerLink, *, rehearsal: bool
) -> tuple[Child, ...]:
    """Return the processes to be supervised."""
    user = merchant.node.user
    folder = str(places.folder)
    worker = [*_python("clients.worker_service"), folder]
    worker += ["--rehearsal"] if rehearsal else []
    worker += ["--socket-user", user] if user else []
    node = [*_python("clients.node"), folder, "--poll-s", str(merchant.node.poll_s)]
    return (
        Child(
            name=WORKER,
            command=tuple(worker),
            log=places.log(WORKER),
            env=FLOWER_ENVIRONMENT,
            healthy=WorkerHealth(link.health),
            hang_s=_HANG_S,
        ),
        Child(
            name=NODE,
            command=tuple(node),
            log=places.log(NODE),
            env=FLOWER_ENVIRONMENT,
            healthy=lambda: is_alive(places.node_state),
            hang_s=_HANG_S,
            user=user,
        ),
    )


def prepared(folder: Path) -> tuple[Places, Merchant]:
    """Return a merchant that can be supervised.

    Raises:
        PolicyError: Its file cannot be used, its path is too long, or its node's user is not
            as it has to be.
    """
    places = Places.of(folder)
    merchant = read_merchant(places.merchant)
    check_socket_path(places.socket)
    if merchant.node.user is not None:
        prepare_for(merchant.node.user, places, merchant)
    return places, merchant


def standing(places: Places) -> tuple[bool, str]:
    """Return whether a merchant's node is connected and its worker answers, or why not."""
    state = state_of(places.run)
    if state is None:
        return False, "does not take part"
    children: dict[str, Any] = state["children"]
    for name in (WORKER, NODE):
        child = children.get(name, {"state": "not started", "note": ""})
        if child["state"] != "running":
            return False, f"its {name} is {child['state']}: {child['note']}".removesuffix(": ")
    pulse = read_pulse(places.node_state)
    if pulse.get("pid") != children[NODE]["pid"] or not is_alive(places.node_state):
        return False, "its node is starting"
    if pulse["state"] == "connected":
        return True, ""
    return False, f"{pulse['state']}: {pulse['reason']}".removesuffix(": ")


def _python(module: str) -> list[str]:
    # -P: a folder called `clients` in the working directory must not be taken for ours
    return [sys.executable, "-P", "-m", module]


def _follow(places: Places, say: Callable[[str], None]) -> None:
    """Say how the merchant stands, each time that it is news."""
    before = ""
    while True:
        connected, reason = standing(places)
        now = "connected" if connected else reason
        if now != before:
            say(now)
            before = now
        time.sleep(_LOOK_S)


def main() -> int:
    """Run until a signal comes; return the exit status."""
    parser = argparse.ArgumentParser(prog="clients.supervising")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearsal", action="store_true")
    parser.add_argument("--tell", action="store_true")
    options = parser.parse_args()
    set_up("supervisor", Places.of(options.folder).log("supervisor"))
    try:
        places, merchant = prepared(options.folder)
        return _supervise(places, merchant, options)
    except HansaError as error:
        logger.critical("%s", error)
        if options.tell:
            print(f"{options.folder}: {error}", file=sys.stderr, flush=True)
        return 2


def _supervise(places: Places, merchant: Merchant, options: argparse.Namespace) -> int:
    def on_event(event: dict[str, Any]) -> None:
        level = logging.WARNING if event["event"] in {"ended", "hung", "failed"} else logging.INFO
        logger.log(level, "%s", event["event"], extra={k: v for k, v in event.items()})

    def say(text: str) -> None:
        logger.info("%s", text, extra={"merchant": merchant.merchant.id})
        if options.tell:
            print(f"{places.folder.name}: {text}", flush=True)

    link = WorkerLink(places.socket)
    children = children_of(places, merchant, link, rehearsal=options.rehearsal)
    supervisor = Supervisor(places.run, children, on_event)
    threading.Thread(target=_follow, args=(places, say), daemon=True).start()
    if merchant.node.metrics_port is not None:
        from clients.metrics import serve

        serve(merchant.node.metrics_port, places, link)
    try:
        return supervisor.run()
    finally:
        link.close()


if __name__ == "__main__":
    sys.exit(main())
