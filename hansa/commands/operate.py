"""`hansa server start, stop, run, resume, status`: what the operator runs."""

import logging
import os
import secrets
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from server.run_control import Asked, RunControl
    from server.runs import RunRow, RunStore
    from server.settings import Settings

_READY_S = 120.0
_TRIES = 2  # starts of a service after the first, until there is no hope
_STOP_S = 150.0  # for a run to reach its next checkpoint
_EXIT_S = 10.0  # for a supervisor whose services have ended
_LOOK_S = 2.0
_INTERRUPTED = 130


def start(folder: Path, background: bool) -> None:
    """Start the services; stay with them, or return when the gateway answers.

    Raises:
        HansaError: They cannot be started; nothing is left running.
    """
    from server.readiness import check_ready
    from server.runs import RunStore
    from server.settings import read_settings

    settings = read_settings(folder)
    _refuse_second(settings)
    check_ready(folder, settings)
    RunStore(settings.store_url)  # a database that cannot be used is told now, not in mid-run
    for made in (settings.run_folder, settings.logs):
        made.mkdir(mode=0o700, exist_ok=True)
    if background:
        _start_in_background(settings)
        return
    status = _supervise(settings)
    if status:
        raise typer.Exit(status)


def _refuse_second(settings: "Settings") -> None:
    """Raise a `ServiceError` where services run already."""
    from common.errors import ServiceError
    from common.service_lock import state_of

    state = state_of(settings.run_folder)
    if state is not None:
        raise ServiceError(
            f"{settings.folder}: the services run already (process {state['pid']}); see them: "
            f"hansa server status {settings.folder}"
        )


def _supervise(settings: "Settings") -> int:
    """Run the services in this process until it is told to end."""
    from common.logs import set_up
    from common.supervision import Supervisor
    from server.log_files import LogKeeper
    from server.metrics import serve
    from server.services import services

    os.umask(0o077)  # what services write is nobody else's
    set_up("services", settings.logs / "services.jsonl", logging.INFO)
    keeper = LogKeeper(settings.logs)
    metrics = serve(settings.folder, settings)
    typer.echo(f"gateway {settings.url}, metrics http://127.0.0.1:{settings.metrics_port}/metrics")
    try:
        children = services(settings.folder, settings)
        return Supervisor(settings.run_folder, children, _tell_event).run()
    finally:
        metrics.shutdown()
        metrics.server_close()
        keeper.close()


def _tell_event(event: dict[str, Any]) -> None:
    """Log what happened to a service, and say it."""
    details = {name: value for name, value in event.items() if name not in {"event", "child"}}
    calm = event["event"] in {"started", "healthy", "stopped"}
    logging.getLogger("hansa.services").log(
        logging.INFO if calm else logging.WARNING,
        "%s %s",
        event["child"],
        event["event"],
        extra={"event": event["event"], "service": event["child"], **details},
    )
    told = ", ".join(f"{name} {value}" for name, value in details.items() if value is not None)
    typer.echo(f"{event['child']}: {event['event']}{f' ({told})' if told else ''}")


def _start_in_background(settings: "Settings") -> None:
    """Start the services detached; wait until all answer.

    Raises:
        RunError: They do not; none is left running.
    """
    from common.errors import RunError
    from common.service_lock import start_in_background
    from server.services import PYTHON

    command = (*PYTHON, "-m", "hansa.cli", "server", "start", str(settings.folder))
    log = settings.logs / "supervisor.log"
    try:
        pid = start_in_background(
            command, settings.run_folder, log, lambda: _all_well(settings), _READY_S
        )
    except RunError as error:
        reasons = _reasons(settings)
        _end(settings)
        raise RunError(
            f"{settings.folder}: the services did not start: {error}{reasons}\nnothing of them "
            f"is left running; their logs are in {settings.logs}"
        ) from None
    typer.echo(f"{settings.folder}: the services run (process {pid})")
    typer.echo(f"merchants reach the gateway at {settings.url}")


def _all_well(settings: "Settings") -> bool:
    """Return whether all services answer; give up early on one that ends again and again.

    Raises:
        RunError: There is such a one.
    """
    from common.errors import RunError
    from server.services import gateway_answers
    from server.status import services_document

    services = services_document(settings.folder)
    for child in services["children"]:
        if child["state"] == "failed" and child["restarts"] >= _TRIES:
            raise RunError(f"{child['name']} ended {child['restarts'] + 1} times")
    return bool(services["healthy"]) and gateway_answers(settings)


def _reasons(settings: "Settings") -> str:
    """Say which services are not well, each with the end of its log."""
    from server.log_files import last_lines
    from server.services import Places
    from server.status import services_document

    told = []
    for child in services_document(settings.folder)["children"]:
        if child["state"] == "running":
            continue
        told.append(f"\n{child['name']}: {child['state']} {child['note']}".rstrip())
        lines = last_lines(Places(settings.folder).log(child["name"]))
        told += [f"\n    {line}" for line in lines]
    return "".join(told)


def stop(folder: Path) -> None:
    """Ask a run that is under way to stop at its next checkpoint; then end the services."""
    from common.service_lock import state_of
    from server.settings import read_settings

    settings = read_settings(folder)
    if state_of(settings.run_folder) is None:
        typer.echo(f"{folder}: no services run")
        return
    _stop_run(settings)
    _end(settings)
    typer.echo(f"{folder}: the services have ended")


def _end(settings: "Settings") -> None:
    """End the services, and wait until the supervisor's own process has gone, too."""
    from common.service_lock import state_of, stop

    state = state_of(settings.run_folder)
    stop(settings.run_folder)
    until = time.monotonic() + _EXIT_S
    while state is not None and _is_there(state["pid"]) and time.monotonic() < until:
        time.sleep(0.05)


def _is_there(pid: int) -> bool:
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())  # none: to be reaped
    except OSError:
        return False


def _stop_run(settings: "Settings") -> None:
    """Ask the run under way, if there is one, to stop, and wait until it has."""
    from common.errors import ArchiveError

    try:
        store = _store(settings)
        active = [row for row in store.rows() if store.is_alive(row)]
        for row in active:
            store.request_stop(row.run)
            typer.echo(f"run {row.run}: asked to stop; waits for its next checkpoint")
            _await_stop(settings, store, row)
    except ArchiveError as error:  # what cannot be asked is ended with the services all the same
        typer.echo(f"{error}; the services end without a word from the run", err=True)


def _await_stop(settings: "Settings", store: "RunStore", row: "RunRow") -> None:
    until = time.monotonic() + _STOP_S
    while store.is_alive(row) and time.monotonic() < until:
        time.sleep(0.3)
        row = store.row(row.run)
    if store.is_alive(row):
        typer.echo(f"run {row.run}: did not stop within {_STOP_S:g} s; it is ended now")
    if row.state.value != "finished":
        typer.echo(f"go on later with: hansa server resume {settings.folder} {row.run}")


def run(folder: Path, wait: float | None) -> None:
    """Start a run, follow it, and end with its own verdict."""
    settings = _running(folder)
    store = _store(settings)
    control = _control(settings, store)
    name = secrets.token_hex(8)
    asked = control.start(name, wait)
    typer.echo(f"run {name}")
    _follow(settings, store, control, asked)


def resume(folder: Path, run: str | None) -> None:
    """Go on with a run that broke off, and follow it."""
    settings = _running(folder)
    store = _store(settings)
    control = _control(settings, store)
    row = control.unfinished(run)
    asked = control.resume(row, typer.echo)
    typer.echo(f"run {row.run}: goes on; {row.round:,} of {row.rounds:,} rounds are done")
    _follow(settings, store, control, asked)


def _running(folder: Path) -> "Settings":
    """Return the settings of a folder whose services run.

    Raises:
        ServiceError: They do not.
    """
    from common.errors import ServiceError
    from common.service_lock import state_of
    from server.settings import read_settings

    settings = read_settings(folder)
    if state_of(settings.run_folder) is None:
        raise ServiceError(
            f"{folder}: its services do not run; first: hansa server start {folder} --background"
        )
    return settings


def _store(settings: "Settings") -> "RunStore":
    from server.runs import RunStore

    return RunStore(settings.store_url)


def _control(settings: "Settings", store: "RunStore") -> "RunControl":
    from server.run_control import RunControl

    return RunControl(settings, store)


def _follow(settings: "Settings", store: "RunStore", control: "RunControl", asked: "Asked") -> None:
    """Follow a run to its end; exit with its own verdict."""
    from hansa.commands.verdict import tell_ending
    from server.following import Follower

    follower = Follower(
        store, asked.run, lambda: control.going(asked.flower_run), asked.after_epoch
    )
    try:
        ending = follower.follow(typer.echo)
    except KeyboardInterrupt:
        typer.echo(
            f"\nthe run goes on; watch it: hansa server status {settings.folder} --watch; "
            f"end it: hansa server stop {settings.folder}"
        )
        raise typer.Exit(_INTERRUPTED) from None
    tell_ending(settings.folder, asked.run, ending)


def status(folder: Path, watch: bool, json: Path | None) -> None:
    """Show services, run and merchants."""
    from rich.console import Console
    from rich.live import Live

    from hansa.commands.choose import write_json
    from hansa.commands.status_table import picture
    from server.status import status_document

    console = Console(stderr=str(json) == "-", highlight=False)
    document = status_document(folder)
    if json is not None:
        write_json(document, json)
    if not watch:
        console.print(picture(document), soft_wrap=True)
        return
    with Live(picture(document), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(_LOOK_S)
            document = status_document(folder)
            live.update(picture(document), refresh=True)
            if json is not None:
                write_json(document, json)
