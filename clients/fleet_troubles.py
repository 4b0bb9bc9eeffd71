"""Why a node cannot speak with its operator's server, in words that say what to do."""

import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError

_EXPIRED, _NOT_YET = 10, 9  # OpenSSL's X509_V_ERR_*
_OTHER_NAME = {62, 63, 64}
_AHEAD_S, _BEHIND_S = 4.0, 240.0  # Flower lets a node's clock be 5 s ahead and 305 s behind
SET_CLOCK = "for example: timedatectl set-ntp true"
ONLINE_S = 20.0  # so long after its last sign a node counts as connected: twice its interval


class FleetTrouble(Exception):
    """What was asked of the server was not done.

    Args:
        reason: Why, for a person.
        rejected: The server does not know this node, or not any more.
        taken: Another node has the same key, it seems.
        over: The run that a message belongs to has ended; there is nothing to be done about it.
    """

    def __init__(
        self, reason: str, *, rejected: bool = False, taken: bool = False, over: bool = False
    ) -> None:
        super().__init__(reason)
        self.reason = reason
        self.rejected = rejected
        self.taken = taken
        self.over = over


def trouble_of(error: Exception, now: float | None = None) -> FleetTrouble:
    """Return what an error of the connection means.

    Args:
        error: What the client raised.
        now: This machine's clock, seconds since 1970.
    """
    if isinstance(error, FleetTrouble):
        return error
    if isinstance(error, httpx.HTTPStatusError):
        return _refused(error.response, time.time() if now is None else now)
    return FleetTrouble(_unreached(error))


def _unreached(error: Exception) -> str:
    """Return why there is no answer that can be used."""
    for found in _chain(error):
        if isinstance(found, ssl.SSLCertVerificationError):
            return certificate_reason(found)
        if isinstance(found, ssl.SSLError):
            return "the server breaks off the TLS handshake: does TLS answer there?"
    if isinstance(error, httpx.TimeoutException):
        return "the server does not answer in time: is the network slow, or cut?"
    if isinstance(error, httpx.TransportError):
        return (
            f"the server cannot be reached ({type(error).__name__}): is the address right, is the "
            "network up, and did the operator start its server?"
        )
    return f"the server answers what a Flower server does not ({type(error).__name__})"


def certificate_reason(refusal: ssl.SSLCertVerificationError) -> str:
    """Return why a certificate was not accepted, and what to do."""
    if refusal.verify_code == _EXPIRED:
        return (
            "the server's certificate has expired (or this machine's clock is fast): the operator "
            "renews it with hansa server rotate --tls"
        )
    if refusal.verify_code == _NOT_YET:
        return "the server's certificate is not valid yet: this machine's clock is slow"
    if refusal.verify_code in _OTHER_NAME:
        return (
            "the server's certificate is not for this name: the operator adds it to server.toml, "
            "then hansa server rotate --tls"
        )
    return (
        "the server shows a foreign certificate, not one of the authority that you pinned: "
        f"somebody else answers there, or is in between ({refusal.verify_message}); nothing was "
        "sent"
    )


def _refused(response: httpx.Response, now: float) -> FleetTrouble:
    """Return what an HTTP status means."""
    status, said = response.status_code, FlowerError.from_json(response.text)
    if status == httpx.codes.UNAUTHORIZED:
        return FleetTrouble(
            _unauthorised(clock_offset(response.headers.get("date"), now)), rejected=True
        )
    if status == httpx.codes.FORBIDDEN:
        return FleetTrouble("the run has ended, or is not for this node", over=True)
    if said is not None and said.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return FleetTrouble(
            "another node uses this key, or it was killed less than "
            f"{ONLINE_S:g} s ago; trying again",
            taken=True,
        )
    if status in {502, 503, 504}:
        return FleetTrouble(
            f"the operator's gateway answers, its SuperLink does not (HTTP {status})"
        )
    return FleetTrouble(f"the server refuses (HTTP {status}): is it a gateway of Hansa?")


def _unauthorised(offset: float | None) -> str:
    """Return why a node's signature is refused; `offset` is its clock less the server's."""
    if offset is not None and is_off(offset):
        return (
            f"this machine's clock is {off_by(offset)} by the server's: set it right ({SET_CLOCK})"
        )
    return (
        "the server does not know this node's key: it was revoked, or replaced, or its operator "
        "started afresh; ask the operator"
    )


def is_off(offset: float) -> bool:
    """Tell whether a clock is so far off that Flower refuses a node's signature."""
    return not -_BEHIND_S < offset < _AHEAD_S


def off_by(offset: float) -> str:
    """Return how far off a clock is.

    >>> off_by(86_400.0)
    '24 h fast'
    """
    return f"{_duration(abs(offset))} {'fast' if offset > 0 else 'slow'}"


def clock_offset(date: str | None, now: float) -> float | None:
    """Return this machine's clock less the server's, in seconds; None where it tells no time."""
    try:
        return None if date is None else now - parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _duration(seconds: float) -> str:
    """Return a duration for people.

    >>> _duration(75.0), _duration(86_400.0), _duration(4.6)
    ('1 min', '24 h', '5 s')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__
