"""Tests of a node's connection, against Flower's own SuperLink over TLS."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict
from flwr.common.constant import ErrorCode
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from clients.fleet_link import FleetLink, read_node_key
from clients.fleet_troubles import FleetTrouble
from clients.flower_records import content_from_bytes, content_to_bytes
from clients.preparing import make_node_key
from common.errors import IdentityError
from common.worker_wire import UNAVAILABLE, Answer
from server.certificates import Pair, issue, make_authority
from tests.enrolment_world import free_port, serving, tls_server
from tests.fleet_world import SuperLink, until


@pytest.fixture(scope="module")
def superlink(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    """Give a SuperLink."""
    found = SuperLink(tmp_path_factory.mktemp("superlink"))
    with found.up():
        yield found


@contextmanager
def linked(superlink: SuperLink, key: Any = None, ca_pem: str = "") -> Iterator[FleetLink]:
    """Give a connection; not logged in yet."""
    link = FleetLink(
        superlink.url, ca_pem or superlink.ca_pem, key or ec.generate_private_key(ec.SECP384R1())
    )
    yield link
    link.close()


def content(**values: Any) -> RecordDict:
    """Return what a message may hold."""
    return RecordDict({"hansa": ConfigRecord(values)})


class TestMessages:
    """There and back."""

    def test_an_answer(self, superlink: SuperLink) -> None:
        """What was sent arrives, and so does what is answered."""
        with linked(superlink) as link:
            node, run = superlink.register(link.public), superlink.begin_run()
            link.activate()
            assert link.pull() is None
            sent = superlink.send(run, node, "query.attest", content(question=1))
            pulled = link.pull()
            assert pulled is not None
            assert pulled.message.metadata.message_type == "query.attest"
            assert 0 < pulled.seconds_left <= 60
            found = content_from_bytes(link.content_of(pulled))
            assert dict(found.config_records["hansa"]) == {"question": 1}
            answer = Answer(content_to_bytes(content(answer=2)))
            reply = link.reply(pulled, answer)
            link.push(reply, 0.5)
            link.push(reply, 0.5)  # where the first answer to it was lost
            back = superlink.reply(run, sent)
            assert dict(back.content.config_records["hansa"]) == {"answer": 2}
            assert link.pull() is None
            link.tidy()
            assert superlink.state.get_object(run, sent) is None

    @pytest.mark.parametrize(
        ("text", "code"),
        [
            ("field 'round': no", ErrorCode.CLIENT_APP_RAISED_EXCEPTION),
            (f"{UNAVAILABLE}: it ended", ErrorCode.NODE_UNAVAILABLE),
        ],
    )
    def test_an_error(self, superlink: SuperLink, text: str, code: int) -> None:
        """An error keeps its words."""
        with linked(superlink) as link:
            node, run = superlink.register(link.public), superlink.begin_run()
            link.activate()
            sent = superlink.send(run, node, "train.update", content(question=1))
            pulled = link.pull()
            assert pulled is not None
            link.push(link.reply(pulled, Answer(b"", text)), 0.0)
            error = superlink.reply(run, sent).error
            assert (error.code, error.reason) == (code, text)

    def test_the_run_has_ended(self, superlink: SuperLink) -> None:
        """A reply that comes too late is refused for good."""
        with linked(superlink) as link:
            node, run = superlink.register(link.public), superlink.begin_run()
            link.activate()
            superlink.send(run, node, "query.attest", content(question=1))
            pulled = link.pull()
            assert pulled is not None
            superlink.end_run(run)
            with pytest.raises(FleetTrouble) as caught:
                link.content_of(pulled)
            assert caught.value.over


class TestIdentity:
    """Who is let in."""

    def test_not_registered(self, superlink: SuperLink) -> None:
        """A key that the server does not know is not let in."""
        with linked(superlink) as link, pytest.raises(FleetTrouble) as caught:
            link.activate()
        assert caught.value.taken  # the server's words for both

    def test_two_nodes_with_one_key(self, superlink: SuperLink) -> None:
        """The second one is refused, and can find out that its key is still good."""
        key = ec.generate_private_key(ec.SECP384R1())
        with linked(superlink, key) as first, linked(superlink, key) as second:
            node = superlink.register(first.public)
            first.activate()
            with pytest.raises(FleetTrouble, match="another node uses this key"):
                second.activate()
            assert second.is_registered(node)
            superlink.revoke(node)
            assert not second.is_registered(node)

    def test_revoked_while_it_serves(self, superlink: SuperLink) -> None:
        """The next question is refused for good."""
        with linked(superlink) as link:
            node = superlink.register(link.public)
            link.activate()
            superlink.revoke(node)
            with pytest.raises(FleetTrouble, match="does not know this node's key") as caught:
                link.pull()
            assert caught.value.rejected

    def test_leaving(self, superlink: SuperLink) -> None:
        """Who says goodbye may come back at once."""
        key = ec.generate_private_key(ec.SECP384R1())
        link = FleetLink(superlink.url, superlink.ca_pem, key)
        superlink.register(link.public)
        link.activate()
        link.close(leave=True)
        with linked(superlink, key) as again:
            again.activate()
            assert again.node_id == link.node_id


class TestCertificates:
    """Whom a node speaks to."""

    def test_a_foreign_authority(self, superlink: SuperLink) -> None:
        """Nothing is sent to a server that another authority signed for."""
        other = make_authority("somebody").pem.decode()
        with linked(superlink, ca_pem=other) as link, pytest.raises(FleetTrouble, match="foreign"):
            link.activate()

    @pytest.mark.parametrize(
        ("days", "words"), [(-1000, "has expired"), (1000, "is not valid yet")]
    )
    def test_out_of_its_time(self, tmp_path: Path, days: int, words: str) -> None:
        """An expired certificate is refused, and so is one of the future."""
        now = datetime.now(UTC)
        authority = make_authority("test", now - timedelta(days=2000))
        write_pair(tmp_path, issue(authority, ["127.0.0.1"], now + timedelta(days=days)))
        with (
            hostile(lambda _: Response(), tmp_path) as url,
            pytest.raises(FleetTrouble, match=words),
        ):
            one_question(url, authority.pem.decode())

    def test_nobody_there(self, superlink: SuperLink) -> None:
        """A server that is down cannot be reached."""
        with pytest.raises(FleetTrouble, match="cannot be reached"):
            one_question(f"https://127.0.0.1:{free_port()}", superlink.ca_pem)


class TestHostileServer:
    """What a server may try."""

    @pytest.mark.parametrize(
        "answer",
        [
            Response(b"\xff" * 100),
            JSONResponse({"code": 1001, "detail": "Runtime version incompatible"}, 412),
            JSONResponse({"code": 1001, "public_message": "incompatible"}, 400),
            Response(b"", 500),
            Response("<html>login</html>", 200, media_type="text/html"),
        ],
        ids=["noise", "version", "version too", "500", "a portal"],
    )
    def test_strange_answers(self, superlink: SuperLink, answer: Response) -> None:
        """Each is a trouble; none ends this process."""
        with hostile(lambda _: answer, superlink.tls) as url, pytest.raises(FleetTrouble):
            one_question(url, superlink.ca_pem)

    def test_redirections_are_not_followed(self, superlink: SuperLink) -> None:
        """A server must not have this machine ask something of its neighbours."""
        visited: list[str] = []

        def answer(request: Request) -> Response:
            visited.append(request.url.path)
            return RedirectResponse(f"{request.base_url}internal", 307)

        with hostile(answer, superlink.tls) as url, pytest.raises(FleetTrouble):
            one_question(url, superlink.ca_pem)
        assert visited == ["/v1/fleet/activate-node"]


def one_question(url: str, ca_pem: str) -> None:
    """Try to log in."""
    link = FleetLink(url, ca_pem, ec.generate_private_key(ec.SECP384R1()))
    try:
        link.activate()
    finally:
        link.close()


@contextmanager
def hostile(answer: Any, tls: Path) -> Iterator[str]:
    """Serve one answer to everything; give the address."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await answer(Request(scope, receive))(scope, receive, send)

    application: ASGIApp = app
    port = free_port()
    with serving(tls_server(application, port, tls)):
        yield f"https://127.0.0.1:{port}"


def write_pair(folder: Path, pair: Pair) -> None:
    """Write a server's certificate and key."""
    (folder / "server.crt").write_bytes(pair.pem)
    (folder / "server.key").write_bytes(pair.key_pem)


class TestNodeKey:
    """Reading the node's key."""

    def test_good(self, tmp_path: Path) -> None:
        """A key as `hansa merchant init` makes it."""
        path = tmp_path / "node.key"
        path.write_bytes(make_node_key())
        path.chmod(0o600)
        assert read_node_key(path).curve.name == "secp384r1"

    def test_others_can_read_it(self, tmp_path: Path) -> None:
        """A key that others may have copied is not used."""
        path = tmp_path / "node.key"
        path.write_bytes(make_node_key())
        path.chmod(0o644)
        with pytest.raises(IdentityError, match="chmod 600"):
            read_node_key(path)

    @pytest.mark.parametrize(
        ("text", "words"), [(None, "there is no node key"), (b"key", "no private key")]
    )
    def test_bad(self, tmp_path: Path, text: bytes | None, words: str) -> None:
        """A file that is missing or no key is said."""
        path = tmp_path / "node.key"
        if text is not None:
            path.write_bytes(text)
        with pytest.raises(IdentityError, match=words):
            read_node_key(path)


def test_a_sign_of_life(superlink: SuperLink, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that serves is kept connected; one that was forgotten finds out by itself."""
    monkeypatch.setattr("clients.fleet_link._BEAT_S", 0.05)
    with linked(superlink) as link:
        node = superlink.register(link.public)
        link.activate()
        seen = link._seen_at
        until(lambda: link._seen_at > seen, "a sign of life")
        link.check()
        superlink.revoke(node)

        def lost() -> bool:
            try:
                link.check()
            except FleetTrouble as trouble:
                return trouble.rejected
            return False

        assert until(lost, "it finds out")
