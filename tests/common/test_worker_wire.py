"""Tests of what passes over a merchant's own socket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.worker_wire import (
    Answer,
    parse_reply,
    parse_request,
    reply_bytes,
    request_bytes,
)


@given(st.text(max_size=100), st.binary(max_size=100))
def test_requests_come_back(kind: str, content: bytes) -> None:
    """What is packed is what is unpacked."""
    assert parse_request(request_bytes(kind, content)) == (kind, content)


@given(st.binary(max_size=100))
def test_replies_come_back(content: bytes) -> None:
    """An answer stays an answer, an error an error."""
    assert parse_reply(reply_bytes(Answer(content))) == Answer(content)
    assert parse_reply(reply_bytes(Answer(b"", "why"))) == Answer(b"", "why")


@pytest.mark.parametrize("broken", [b"", b"\0", b"\0\5abc", b"\0\1\xff"])
def test_broken_requests(broken: bytes) -> None:
    """What is cut, or no text, is a `ValueError`."""
    with pytest.raises(ValueError):  # noqa: PT011  # of whatever text
        parse_request(broken)


@pytest.mark.parametrize("broken", [b"", b"\2abc", b"\1\xff"])
def test_broken_replies(broken: bytes) -> None:
    """What is neither answer nor error is a `ValueError`."""
    with pytest.raises(ValueError):  # noqa: PT011
        parse_reply(broken)
