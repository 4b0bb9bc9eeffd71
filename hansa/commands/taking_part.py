"""`hansa merchant join` and `leave`: a merchant's processes, started and ended."""

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from common.errors import EnrolmentError, HansaError, IdentityError, NotReady, PolicyError

if TYPE_CHECKING:
    from clients.places import Places

_READY_S = 120.0
_AT_ONCE = 4
_MISCONFIGURED = 2  # exit status of a worker that a person has to help


def join(
    folders: tuple[Path, ...], background: bool, accept_members: bool, rehearsal: bool
) -> None:
    """Start the processes of each merchant; stay, or return when all are connected.

    Raises:
        HansaError: A merchant cannot take part as its files are; none is started.
    """
    for folder in folders:
        _check(folder, rehearsal=rehearsal)
    for folder in folders:
        _agree_on_members(folder, accept=accept_members)
    if not background:
        raise typer.Exit(_stay(folders, rehearsal=rehearsal))
    with ThreadPoolExecutor(_AT_ONCE) as several:
        told = list(several.map(lambda folder: _started(folder, rehearsal=rehearsal), folders))
    if not all(told):
        raise typer.Exit(1)


def leave(folders: tuple[Path, ...]) -> None:
    """End the processes of each merchant.

    Raises:
        ServiceError: They belong to another user.
    """
    from clients.places import Places
    from common.supervision import stop

    def left(folder: Path) -> str:
        return "left" if stop(Places.of(folder).run) else "did not take part"

    with ThreadPoolExecutor(_AT_ONCE) as several:
        for folder, text in zip(folders, several.map(left, folders), strict=True):
            typer.echo(f"{folder}: {text}")


def _check(folder: Path, *, rehearsal: bool) -> None:
    """Check what can be seen at once, so that nothing is started in vain."""
    from clients.pinned import read_enrolment
    from clients.supervising import prepared

    places, merchant = prepared(folder)
    if not places.enrolment.is_file():
        raise IdentityError(
            f"{folder}: is not enrolled yet: ask the operator for a token, then run hansa "
            "merchant enrol TOKEN"
        )
    enrolment = read_enrolment(places.folder)
    if enrolment.merchant != merchant.merchant.id:
        raise IdentityError(
            f"{folder}: is enrolled as '{enrolment.merchant}', merchant.toml says "
            f"'{merchant.merchant.id}'"
        )
    if merchant.simulation.seed is not None and not rehearsal:
        raise PolicyError(
            f"{places.merchant}: simulation.seed makes the noise guessable; remove it to take "
            "part in a run (or rehearse, with customers that nobody has to protect: --rehearsal)"
        )


def _agree_on_members(folder: Path, *, accept: bool) -> None:
    """Compare the operator's list of members with the pinned one; go on only if they agree.

    An operator that does not answer is no reason not to start: the node tries for ever.
    """
    from clients.enrolling import fetch_members, pin_members
    from clients.places import Places
    from common.errors import UnreachableError
    from hansa.commands.enrolment import show_difference

    place = Places.of(folder).folder
    try:
        update = fetch_members(place)
    except UnreachableError as error:
        typer.echo(f"{folder}: {error}\n{folder}: goes on with the list that it pinned", err=True)
        return
    pinned = update.enrolment.members_version
    if update.listed.version == pinned:
        return
    typer.echo(
        f"{folder}: the operator's list of members has version {update.listed.version}, you "
        f"pinned version {pinned}"
    )
    show_difference(update.difference)
    if not accept:
        raise EnrolmentError(
            f"{folder}: look at the list, then join with --accept-members (or pin it: hansa "
            f"merchant members {folder} --accept)"
        )
    pin_members(update)


def _started(folder: Path, *, rehearsal: bool) -> bool:
    """Start one merchant in the background; say how it went."""
    from clients.places import Places
    from clients.supervising import standing, supervisor_command
    from common.supervision import start_in_background, state_of

    places = Places.of(folder)
    running = state_of(places.run)
    if running is not None:
        connected, reason = standing(places)
        typer.echo(
            f"{folder}: takes part already (process {running['pid']})"
            f"{'' if connected else f', but: {reason}'}"
        )
        return connected
    try:
        pid = start_in_background(
            supervisor_command(places.folder, rehearsal=rehearsal),
            places.run,
            places.log("supervisor"),
            lambda: _ready(places),
            _READY_S,
        )
    except NotReady as error:
        reason = standing(places)[1] or str(error)
        typer.echo(
            f"{folder}: not connected yet: {reason}; it goes on trying (see {places.log('node')})",
            err=True,
        )
        return False
    except HansaError as error:
        typer.echo(f"{folder}: {error}", err=True)
        return False
    typer.echo(f"{folder}: connected (process {pid})")
    return True


def _ready(places: "Places") -> bool:
    """Tell whether a merchant is connected; raises `NotReady` where a person has to help."""
    from clients.supervising import WORKER, standing
    from common.supervision import state_of

    worker = (state_of(places.run) or {"children": {}})["children"].get(WORKER, {})
    if worker.get("last_exit") == _MISCONFIGURED:
        raise NotReady(f"its worker {worker['note']}")
    return standing(places)[0]


def _stay(folders: tuple[Path, ...], *, rehearsal: bool) -> int:
    """Run a supervisor for each merchant until a signal comes; return the exit status."""
    from clients.places import Places
    from clients.supervising import supervisor_command
    from common.supervision import tethered

    commands = [
        supervisor_command(Places.of(folder).folder, rehearsal=rehearsal, tell=True)
        for folder in folders
    ]
    running = [
        subprocess.Popen(tethered(command, signal.SIGTERM))  # noqa: S603  # our own, no shell
        for command in commands
    ]

    def end(number: int, _frame: object) -> None:
        for process in running:
            if process.poll() is None:
                process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return max(process.wait() for process in running)
