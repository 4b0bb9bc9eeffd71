"""What would stop an enrolled merchant from taking part, found before it tries."""

import http.client
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from urllib.parse import urlsplit

from clients.fleet_troubles import SET_CLOCK, certificate_reason, clock_offset, is_off, off_by
from clients.merchant import Merchant
from clients.pinned import Enrolment, read_enrolment
from clients.places import Places
from clients.worker_socket import check_socket_path, user_id
from common.contract import Contract
from common.errors import HansaError
from common.supervision import state_of

_TIMEOUT_S = 8.0
_SOON_DAYS = 14
_NEEDED_BYTES = 200 * 1024 * 1024  # for the ledger and the logs of many runs
_LEAST_BYTES = 20 * 1024 * 1024


class Level(StrEnum):
    """How much a finding matters."""

    OK = "ok"
    NOTE = "note"
    STOP = "STOP"


@dataclass(frozen=True)
class Finding:
    """One thing that was tried."""

    level: Level
    what: str
    do: str = ""


@dataclass(frozen=True)
class Answer:
    """What the operator's server said to a question after its health."""

    status: int
    date: str | None
    expires: datetime


def findings(folder: Path, merchant: Merchant, contract: Contract) -> list[Finding]:
    """Try all that an enrolled merchant needs beside its table and its budget."""
    places = Places(folder)
    try:
        enrolment = read_enrolment(folder)
    except HansaError as error:
        return [Finding(Level.STOP, str(error))]
    return [
        *_processes(places, merchant),
        *_files(places, merchant),
        _pinned(enrolment, merchant, contract),
        *_server(enrolment),
        _members(folder),
        _disk(folder),
    ]


def _processes(places: Places, merchant: Merchant) -> Iterator[Finding]:
    """Yield how the merchant's processes would start, or that they run."""
    state = state_of(places.run)
    if state is not None:
        yield Finding(Level.OK, f"takes part now (process {state['pid']})")
    try:
        check_socket_path(places.socket)
    except HansaError as error:
        yield Finding(Level.STOP, str(error))
    if merchant.simulation.seed is not None:
        yield Finding(
            Level.STOP,
            "simulation.seed makes your noise guessable",
            "take it out of merchant.toml, or rehearse only (hansa merchant join --rehearsal)",
        )
    yield from _node(merchant, running=state is not None)


def _node(merchant: Merchant, *, running: bool) -> Iterator[Finding]:
    node = merchant.node
    if node.user is not None:
        try:
            user_id(node.user)
        except HansaError as error:
            yield Finding(Level.STOP, str(error), f"make it: useradd --system {node.user}")
        if os.geteuid() != 0:
            yield Finding(
                Level.STOP,
                f"only root can start the node as '{node.user}' (node.user)",
                "join as root, or take node.user out of merchant.toml",
            )
    if node.metrics_port is not None and not running and not _is_free(node.metrics_port):
        yield Finding(
            Level.STOP,
            f"127.0.0.1:{node.metrics_port} is taken (node.metrics_port)",
            "end what listens there, or name another port",
        )


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _files(places: Places, merchant: Merchant) -> Iterator[Finding]:
    """Yield who can read what only this merchant may read."""
    for path in (merchant.merchant.key, places.node_key):
        try:
            mode = path.stat().st_mode & 0o777
        except OSError:
            yield Finding(Level.STOP, f"{path}: is missing", "hansa merchant init makes it")
            continue
        if mode & 0o077:
            yield Finding(Level.STOP, f"{path}: others can read this key", f"chmod 600 {path}")
        else:
            yield Finding(Level.OK, f"{path.name} is yours alone")
    table = merchant.data.path
    if table is not None and table.exists() and table.stat().st_mode & 0o044:
        yield Finding(Level.NOTE, f"{table}: others can read your customers", f"chmod 600 {table}")
    if merchant.data.url is not None and places.merchant.stat().st_mode & 0o044:
        yield Finding(
            Level.NOTE,
            f"{places.merchant}: others can read it, and with it your database's URL",
            f"chmod 600 {places.merchant}",
        )


def _pinned(enrolment: Enrolment, merchant: Merchant, contract: Contract) -> Finding:
    """Return whether file, contract and enrolment speak of the same."""
    if enrolment.merchant != merchant.merchant.id:
        return Finding(
            Level.STOP,
            f"you enrolled as '{enrolment.merchant}', merchant.toml says '{merchant.merchant.id}'",
            "put merchant.id back",
        )
    if enrolment.contract != contract.sha256:
        return Finding(
            Level.STOP,
            f"the contract here is {contract.sha256[:16]}, the operator's is "
            f"{enrolment.contract[:16]}: every run would refuse you",
            "put back the contract.toml that you enrolled with, or enrol anew for a new one",
        )
    return Finding(Level.OK, f"the contract is the operator's, {contract.sha256[:16]}")


def _server(enrolment: Enrolment) -> Iterator[Finding]:
    """Yield whether the operator's server can be reached, who it is, and whose clock is right."""
    try:
        answer = ask_health(enrolment)
    except ssl.SSLCertVerificationError as error:
        yield Finding(Level.STOP, f"{enrolment.url}: {certificate_reason(error)}")
        return
    except (OSError, http.client.HTTPException) as error:
        yield Finding(
            Level.STOP,
            f"{enrolment.url}: cannot be reached ({error or type(error).__name__})",
            "is the network up, does a firewall let you out to that port, did the operator start "
            "its server?",
        )
        return
    yield Finding(Level.OK, f"{enrolment.url} answers, with a certificate of the pinned authority")
    yield _validity(answer.expires, datetime.now(UTC))
    yield _clock(clock_offset(answer.date, time.time()))
    if answer.status != http.client.OK:
        yield Finding(
            Level.STOP,
            f"the operator's SuperLink does not answer (HTTP {answer.status})",
            "ask the operator; your node would try on by itself",
        )


def ask_health(enrolment: Enrolment) -> Answer:
    """Ask a gateway after its health, trusting the pinned authority alone.

    Raises:
        OSError: It cannot be reached, or shows another certificate.
        HTTPException: It does not speak HTTP.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=enrolment.ca_pem)
    parts = urlsplit(enrolment.url)
    connection = http.client.HTTPSConnection(
        str(parts.hostname), parts.port, timeout=_TIMEOUT_S, context=context
    )
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)  # noqa: S101  # what the class is for
        shown = connection.sock.getpeercert() or {}
        expires = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(shown["notAfter"])), UTC)
        connection.request("GET", "/health")
        response = connection.getresponse()
        return Answer(response.status, response.getheader("date"), expires)
    finally:
        connection.close()


def _validity(expires: datetime, now: datetime) -> Finding:
    days = (expires - now).days
    text = f"the server's certificate is good for {days:,} more days"
    if days < _SOON_DAYS:
        return Finding(Level.NOTE, text, "tell the operator: hansa server rotate --tls")
    return Finding(Level.OK, text)


def _clock(offset: float | None) -> Finding:
    if offset is None:
        return Finding(Level.NOTE, "the server tells no time: your clock was not compared")
    if is_off(offset):
        return Finding(
            Level.STOP, f"your clock is {off_by(offset)}: the server refuses you", SET_CLOCK
        )
    return Finding(Level.OK, "your clock agrees with the server's")


def _members(folder: Path) -> Finding:
    """Return whether the pinned list of members is the operator's."""
    from clients.enrolling import fetch_members

    try:
        update = fetch_members(folder)
    except HansaError as error:
        return Finding(Level.STOP, f"the list of members: {error}")
    listed, enrolment = update.listed, update.enrolment
    if enrolment.merchant not in listed.members:
        return Finding(
            Level.STOP, "the operator's list of members does not hold you", "ask the operator"
        )
    if listed.version != enrolment.members_version:
        return Finding(
            Level.STOP,
            f"the operator's list of members has version {listed.version}, you pinned "
            f"{enrolment.members_version}",
            f"look at it: hansa merchant members {folder}; pin it with --accept",
        )
    return Finding(Level.OK, f"your list of members is the operator's, version {listed.version}")


def _disk(
    folder: Path, usage: Callable[[Path], tuple[int, int, int]] = shutil.disk_usage
) -> Finding:
    """Return whether there is room for ledger and logs; without it every run stops."""
    free = usage(folder)[2]
    text = f"{free / 1024**2:,.0f} MiB are free on the disk of {folder}"
    if free < _LEAST_BYTES:
        return Finding(Level.STOP, text, "make room: nothing is released that cannot be written")
    if free < _NEEDED_BYTES:
        return Finding(Level.NOTE, text, "make room: ledger and logs grow with every run")
    return Finding(Level.OK, text)
