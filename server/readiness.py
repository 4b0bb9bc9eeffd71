"""What must hold before the operator's services are started, and what to do where it does not."""

import socket
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography.exceptions import InvalidSignature

from common.contract import read_contract
from common.errors import ServiceError
from common.start import read_start
from server.certificates import read_certificate, read_pair
from server.services import LOOPBACK, Places
from server.settings import Settings


@dataclass(frozen=True)
class Port:
    """A port that a service is about to listen on."""

    host: str
    number: int
    purpose: str
    setting: str  # its name in server.toml


def check_ready(folder: Path, settings: Settings, now: datetime | None = None) -> None:
    """Check files, keys, certificates and ports.

    Raises:
        HansaError: Something is missing; the message says what, where, and what to do.
    """
    places = Places(folder)
    _check_files(places)
    read_start(places.contract, read_contract(places.contract))
    _check_certificates(places, now or datetime.now(UTC))
    _check_ports(settings)


def _check_files(places: Places) -> None:
    needed = (
        places.contract,
        places.ca,
        places.certificate,
        places.key,
        places.superexec_secret,
        places.identity,
    )
    for path in needed:
        try:
            with path.open("rb") as file:
                empty = not file.read(1)
        except FileNotFoundError:
            raise ServiceError(
                f"{path}: is missing; first: hansa server init {places.folder}"
            ) from None
        except OSError as error:
            raise ServiceError(
                f"{path}: cannot be read ({error.strerror}); it must belong to the user that runs "
                "the services"
            ) from None
        if empty:
            raise ServiceError(f"{path}: is empty; put it back from a backup")


def _check_certificates(places: Places, now: datetime) -> None:
    """Check that certificate and key belong together, are the CA's, and are valid today."""
    authority, own = read_certificate(places.ca), read_pair(places.tls, "server").certificate
    try:
        own.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        raise ServiceError(
            f"{places.certificate}: is not signed by {places.ca.name}; no merchant would accept "
            f"it; make it anew: hansa server rotate {places.folder} --tls"
        ) from None
    for path, certificate, option in (
        (places.ca, authority, "--ca"),
        (places.certificate, own, "--tls"),
    ):
        if certificate.not_valid_after_utc < now:
            raise ServiceError(
                f"{path}: expired on {certificate.not_valid_after_utc:%Y-%m-%d}; make it anew: "
                f"hansa server rotate {places.folder} {option}"
            )
        if certificate.not_valid_before_utc > now:
            raise ServiceError(
                f"{path}: is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} "
                "UTC; is this machine's clock right?"
            )


def _check_ports(settings: Settings) -> None:
    """Check that every port is ours to take."""
    for port in (
        Port(settings.bind, settings.port, "gateway", "port"),
        Port(LOOPBACK, settings.superlink_port, "SuperLink", "superlink_port"),
        Port(LOOPBACK, settings.metrics_port, "metrics", "metrics_port"),
    ):
        _check_free(port)


def _check_free(port: Port) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            port.host, port.number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1)
    except OSError as error:
        raise ServiceError(
            f"{port.host}:{port.number}: the {port.purpose} cannot listen there "
            f"({error.strerror}); end what does, or change {port.setting} in server.toml"
        ) from None
