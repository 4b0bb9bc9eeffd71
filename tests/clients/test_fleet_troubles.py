"""Tests of the words for what goes wrong between node and server."""

import ssl
from datetime import UTC, datetime
from email.utils import format_datetime

import httpx
import pytest

from clients.fleet_troubles import certificate_reason, trouble_of

NOW = 1_800_000_000.0


def status(code: int, server_time: float | None = None, body: str = "") -> httpx.HTTPStatusError:
    """Return the error of an answer with a status."""
    headers = {}
    if server_time is not None:
        headers["date"] = format_datetime(datetime.fromtimestamp(server_time, UTC), usegmt=True)
    request = httpx.Request("POST", "https://operator:8443/v1/fleet/pull-messages")
    response = httpx.Response(code, headers=headers, text=body, request=request)
    return httpx.HTTPStatusError("", request=request, response=response)


class TestUnauthorised:
    """401 has two meanings, which the server's clock tells apart."""

    @pytest.mark.parametrize(
        ("server", "words"),
        [
            (NOW - 86_400, "clock is 24 h fast"),
            (NOW + 86_400, "clock is 24 h slow"),
            (NOW - 6, "clock is 6 s fast"),
            (NOW + 600, "clock is 10 min slow"),
        ],
    )
    def test_the_clock_is_off(self, server: float, words: str) -> None:
        """Say by how much."""
        trouble = trouble_of(status(401, server), NOW)
        assert words in trouble.reason
        assert trouble.rejected

    @pytest.mark.parametrize("server", [NOW, NOW + 60, NOW - 2, None])
    def test_not_registered(self, server: float | None) -> None:
        """Where the clocks agree, the key is not known."""
        trouble = trouble_of(status(401, server), NOW)
        assert "does not know this node's key" in trouble.reason
        assert trouble.rejected

    def test_a_broken_date(self) -> None:
        """A server that tells no time cannot blame the clock."""
        error = status(401)
        error.response.headers["date"] = "yesterday"
        assert "does not know" in trouble_of(error, NOW).reason


class TestOtherAnswers:
    """What else a server may say."""

    def test_the_key_is_taken(self) -> None:
        """Flower refuses a second node with one key for a while."""
        trouble = trouble_of(status(412, body='{"code": 2004, "detail": "no"}'))
        assert "another node uses this key" in trouble.reason
        assert trouble.taken

    def test_the_run_is_over(self) -> None:
        """A reply to a run that ended is of no use."""
        assert trouble_of(status(403)).over

    @pytest.mark.parametrize(("code", "words"), [(503, "SuperLink does not"), (404, "HTTP 404")])
    def test_statuses(self, code: int, words: str) -> None:
        """The status is told."""
        assert words in trouble_of(status(code)).reason

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (httpx.ConnectError("refused"), "cannot be reached"),
            (httpx.ReadTimeout("slow"), "does not answer in time"),
            (ValueError("Invalid protobuf"), "what a Flower server does not"),
            (RecursionError(), "what a Flower server does not"),
        ],
    )
    def test_no_answer(self, error: Exception, words: str) -> None:
        """Whatever was raised has words."""
        assert words in trouble_of(error).reason


class TestCertificates:
    """Why a certificate is not accepted."""

    @pytest.mark.parametrize(
        ("code", "words"),
        [(10, "has expired"), (9, "not valid yet"), (62, "not for this name"), (20, "foreign")],
    )
    def test_codes(self, code: int, words: str) -> None:
        """OpenSSL's codes are told in words."""
        refusal = ssl.SSLCertVerificationError()
        refusal.verify_code, refusal.verify_message = code, "as OpenSSL says"
        assert words in certificate_reason(refusal)

    def test_deep_inside(self) -> None:
        """The reason is found below what the HTTP client raised."""
        refusal = ssl.SSLCertVerificationError()
        refusal.verify_code, refusal.verify_message = 10, "expired"
        error = httpx.ConnectError("failed")
        error.__cause__ = OSError()
        error.__cause__.__context__ = refusal
        assert "has expired" in trouble_of(error).reason
