"""Requests to the operator, over TLS, with its own certificate authority and no other.

Every reason why a connection is not made has its own sentence: that the certificate ran out is
put right by the operator, that it is another authority's is a reason to ask who answers there.
"""

import hashlib
import json
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from common.enrolment import MAX_ANSWER, PATH, grouped
from common.errors import EnrolmentError, UnreachableError

TIMEOUT_S = 30.0
_MAX_PEM = 64 * 1024
_MAX_SHOWN = 400
_EXPIRED, _NOT_YET = 10, 9  # OpenSSL's X509_V_ERR_*
_OTHER_NAME = {62, 63, 64}


@dataclass(frozen=True)
class Operator:
    """Where the operator is, and which authorities sign for it (PEM, one or more)."""

    url: str
    ca_pem: str

    def ask(self, question: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Return the operator's answer.

        Raises:
            UnreachableError: There is no answer, or not from the operator.
            EnrolmentError: The operator refuses.
        """
        body = json.dumps(fields).encode()
        status, content = _exchange(_context(self.ca_pem), "POST", self._at(question), body)
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise UnreachableError(f"{self.url}: answers like no gateway of Hansa (HTTP {status})")
        if status == httpx.codes.OK:
            return answer
        said = _shown(answer.get("error"))
        if status in {httpx.codes.BAD_REQUEST, httpx.codes.FORBIDDEN}:
            raise EnrolmentError(f"the operator refused: {said}")
        raise UnreachableError(f"{self.url}: {said} (HTTP {status})")

    def _at(self, question: str) -> str:
        return f"{self.url}{PATH}/{question}"


def fetch_authority(url: str, sha256: str) -> str:
    """Return the operator's certificate authority as PEM, which a token named by its hash.

    It is asked for without trust in who answers; nothing else is sent until it is compared.

    Raises:
        UnreachableError: There is no answer, or another authority than expected.
    """
    blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    blind.check_hostname = False
    blind.verify_mode = ssl.CERT_NONE
    status, content = _exchange(blind, "GET", f"{url}{PATH}/ca", None, most=_MAX_PEM)
    try:
        pem = content.decode("ascii")
        shown = hashlib.sha256(ssl.PEM_cert_to_DER_cert(pem)).hexdigest()
    except ValueError:
        raise UnreachableError(f"{url}: answers like no gateway of Hansa (HTTP {status})") from None
    if shown != sha256:
        raise UnreachableError(
            f"{url}: shows another certificate authority than your token names; somebody else "
            f"answers there, or is in between. Your token was not sent.\n  shown: {grouped(shown)}"
            f"\n  token: {grouped(sha256)}"
        )
    return pem


def check_pem(pem: str) -> None:
    """Raise an `UnreachableError` unless a text is one or more certificates."""
    _context(pem)


def _context(pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        context.load_verify_locations(cadata=pem)
    except (ssl.SSLError, ValueError):
        raise UnreachableError("the pinned certificate authority is none as PEM") from None
    return context


def _exchange(
    context: ssl.SSLContext, method: str, url: str, body: bytes | None, most: int = MAX_ANSWER
) -> tuple[int, bytes]:
    """Send one request; return status and body of the answer, at most so many bytes."""
    headers = {"content-type": "application/json"}
    try:
        with (
            httpx.Client(verify=context, timeout=TIMEOUT_S) as client,
            client.stream(method, url, content=body, headers=headers) as answer,
        ):
            return answer.status_code, _limited(answer, most)
    except httpx.HTTPError as error:
        raise UnreachableError(_reason(error, url.removesuffix(httpx.URL(url).path))) from None


def _limited(answer: httpx.Response, most: int) -> bytes:
    content = bytearray()
    for part in answer.iter_bytes():
        content += part
        if len(content) > most:
            raise httpx.RemoteProtocolError("the answer is too large")
    return bytes(content)


def _reason(error: httpx.HTTPError, url: str) -> str:
    """Say why there was no answer, and what to do about it."""
    refusal = next((e for e in _chain(error) if isinstance(e, ssl.SSLCertVerificationError)), None)
    if refusal is None:
        return (
            f"{url}: there is no answer ({type(error).__name__}): is the address right, and did "
            "the operator start its server?"
        )
    if refusal.verify_code == _EXPIRED:
        return (
            f"{url}: the server's certificate ran out (or your clock is fast): the operator renews "
            "it with hansa server rotate --tls"
        )
    if refusal.verify_code == _NOT_YET:
        return f"{url}: the server's certificate is not valid yet: your clock is slow"
    if refusal.verify_code in _OTHER_NAME:
        return (
            f"{url}: the server's certificate is not for this name: the operator adds it to host "
            "or names in server.toml, then hansa server rotate --tls"
        )
    return (
        f"{url}: the server shows a certificate of another authority than the one you pinned; "
        "somebody else answers there, or is in between. Nothing was sent. "
        f"({refusal.verify_message})"
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _shown(text: object) -> str:
    """Return what a stranger said, harmless to print."""
    told = text if isinstance(text, str) else "no reason given"
    return "".join(char if char.isprintable() else "?" for char in told[:_MAX_SHOWN])
