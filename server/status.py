"""The state of a federation at a glance: services, the last run, and every merchant.

One document for machines (`hansa/schemas/status.schema.json`); `hansa server status` draws it.
Nothing in it says anything about a customer.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import supervision
from common.errors import HansaError
from server.services import NAMES, Places
from server.settings import Settings, read_settings

SCHEMA = "hansa/status/1"
_ONLINE = "online"  # Flower's word


@dataclass(frozen=True)
class Standing:
    """What is known about one merchant besides its part in a run."""

    merchant: str
    enrolled: bool  # false: revoked
    connected: bool | None = None  # None: nobody can tell while the SuperLink is down


def status_document(folder: Path, now: float | None = None) -> dict[str, Any]:
    """Return the document; what cannot be found out is named under `problems`.

    Raises:
        HansaError: The folder's own configuration cannot be used.
    """
    settings = read_settings(folder)
    problems: list[str] = []
    services = services_document(folder)
    run, rows = _run(settings, problems, now)
    standings = _standings(folder, settings, running=services["pid"] is not None, told=problems)
    return {
        "schema": SCHEMA,
        "at": time.time() if now is None else now,
        "services": services,
        "certificate": _certificate(folder, problems),
        "run": run,
        "merchants": merchants_document(standings, rows),
        "problems": problems,
    }


def services_document(folder: Path) -> dict[str, Any]:
    """Return the supervisor and its processes; `pid` is null where none runs."""
    state = supervision.state_of(Places(folder).run)
    children: Mapping[str, Mapping[str, Any]] = {} if state is None else state["children"]
    return {
        "pid": None if state is None else state["pid"],
        "started_at": None if state is None else state["started_at"],
        "healthy": healthy(children),
        "children": [_child(name, children.get(name, {})) for name in NAMES],
    }


def healthy(children: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether every service runs and answers."""
    return all(children.get(name, {}).get("state") == "running" for name in NAMES)


def _child(name: str, child: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "state": str(child.get("state", "stopped")),
        "pid": child.get("pid"),
        "restarts": int(child.get("restarts", 0)),
        "since": child.get("since"),
        "last_exit": child.get("last_exit"),
        "note": str(child.get("note") or ""),
    }


def _run(
    settings: Settings, problems: list[str], now: float | None
) -> tuple[dict[str, Any] | None, list[Any]]:
    """Return the newest run, and what it knows about merchants."""
    from server.runs import RunStore

    try:
        store = RunStore(settings.store_url)
        row = store.last()
        if row is None:
            return None, []
        return run_document(row, alive=store.is_alive(row, now)), list(store.merchants(row.run))
    except HansaError as error:
        problems.append(str(error))
        return None, []


def run_document(row: Any, *, alive: bool) -> dict[str, Any]:
    """Return one run, as the store knows it."""
    return {
        "run": row.run,
        "contract": row.contract,
        "state": row.state.value,
        "alive": alive,
        "message": row.message,
        "reason": row.reason,
        "round": row.round,
        "rounds": row.rounds,
        "epsilon": row.epsilon,
        "cohort": row.cohort,
        "started_at": row.started_at,
        "updated_at": row.updated_at,
        "processes": row.epoch,
        "stop_requested": row.stop_requested,
        "flower_run": row.flower_run,
        "bundle": row.bundle,
    }


def merchants_document(standings: Iterable[Standing], rows: Iterable[Any]) -> list[dict[str, Any]]:
    """Return every merchant that is on the list or that the last run knows, by name."""
    known = {standing.merchant: standing for standing in standings}
    told = {row.merchant: row for row in rows}
    return [
        _merchant(known.get(name) or Standing(name, enrolled=False), told.get(name))
        for name in sorted({*known, *told})
    ]


def _merchant(standing: Standing, row: Any) -> dict[str, Any]:
    return {
        "merchant": standing.merchant,
        "enrolled": standing.enrolled,
        "connected": standing.connected,
        "state": "" if row is None else row.state,
        "round": None if row is None else row.round,
        "last_error": "" if row is None else row.last_error,
        "seen_at": None if row is None else row.seen_at,
    }


def _certificate(folder: Path, problems: list[str]) -> dict[str, Any]:
    from server.certificates import read_certificate

    try:
        expires_at = read_certificate(Places(folder).certificate).not_valid_after_utc.timestamp()
    except HansaError as error:
        problems.append(str(error))
        return {"expires_at": None, "days_left": None}
    return {"expires_at": expires_at, "days_left": (expires_at - time.time()) / 86_400}


def _standings(
    folder: Path, settings: Settings, *, running: bool, told: list[str]
) -> list[Standing]:
    """Return every merchant that was ever enrolled, with whether its node is connected."""
    from server.flower_control import list_nodes
    from server.registry import Registry

    try:
        state = Registry(folder).state()
    except HansaError as error:
        told.append(str(error))
        return []
    online: set[int] | None = None
    if running:
        try:
            online = {node.node for node in list_nodes(settings) if node.status == _ONLINE}
        except HansaError as error:
            told.append(str(error))
    found = [Standing(name, enrolled=False, connected=False) for name in state.revoked]
    for name, member in state.members.items():
        connected = None if online is None else member.node in online
        found.append(Standing(name, enrolled=True, connected=connected))
    return found
