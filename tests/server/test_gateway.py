"""The gateway over real TLS on loopback, in front of a server that writes down what reaches it."""

import json
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from clients.preparing import read_keys
from common.contract import Contract
from common.enrolment import MAX_BODY, PATH
from server import connections
from server.certificates import trusted
from simulations.datasets import load
from tests.enrolment_world import (
    World,
    gateway,
    make_world,
    merchant_folder,
    serving,
    tls_server,
)

LIMIT = 100_000
PULL = "/v1/fleet/pull-messages"


@dataclass
class Upstream:
    """Stands for the SuperLink: remembers requests, answers as it is told."""

    seen: list[tuple[str, bytes, dict[str, str], bytes]] = field(default_factory=list)
    answer: Response = field(default_factory=lambda: Response(b"fine", 200))
    break_off: bool = False
    cut_short: bool = False  # a request that did not come whole

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        try:
            body = await request.body()
        except Exception:
            self.cut_short = True
            raise
        self.seen.append((request.method, scope["raw_path"], dict(request.headers), body))
        if self.break_off:
            start = {"type": "http.response.start", "status": 200}
            await send(start | {"headers": [(b"content-length", b"1000")]})
            await send({"type": "http.response.body", "body": b"half", "more_body": True})
            raise ConnectionError("broken off")
        await self.answer(scope, receive, send)


@dataclass
class Outside:
    """A gateway that runs, what is behind it, and a client outside."""

    world: World
    upstream: Upstream
    client: httpx.Client

    def raw(self, text: bytes, wait_s: float = 10) -> bytes:
        """Send bytes as they are, and return all that comes back."""
        context = ssl.create_default_context(cadata=trusted(self.world.settings.tls))
        address = ("127.0.0.1", self.world.settings.port)
        with (
            socket.create_connection(address, timeout=wait_s) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as wrapped,
        ):
            wrapped.sendall(text)
            found = b""
            while part := wrapped.recv(65536):
                found += part
            return found

    def line(self, method: str, path: str) -> bytes:
        """Send a request with this path, byte by byte, and return the answer's first line."""
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n"
        return self.raw(head.encode("latin-1") + b"\r\n").split(b"\r\n")[0]


@pytest.fixture(scope="module")
def agreed() -> Contract:
    """Give a contract."""
    return load("synthetic", preset="smoke", merchants=3).contract


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, agreed: Contract) -> Iterator[Outside]:
    """Run a gateway and what is behind it."""
    world = make_world(tmp_path_factory.mktemp("gateway") / "operator", agreed)
    upstream = Upstream()
    settings = world.settings
    context = ssl.create_default_context(cadata=trusted(settings.tls))
    with (
        serving(tls_server(upstream, settings.superlink_port, settings.tls)),
        gateway(world, max_message=LIMIT),
        httpx.Client(base_url=settings.url, verify=context, trust_env=False) as client,
    ):
        yield Outside(world, upstream, client)


@pytest.fixture
def outside(running: Outside) -> Outside:
    """Give the running gateway, with nothing seen yet."""
    upstream = running.upstream
    upstream.seen.clear()
    upstream.answer = Response(b"fine", 200)
    upstream.break_off = upstream.cut_short = False
    return running


def reached(outside: Outside) -> list[bytes]:
    """Return the paths that reached the SuperLink, without the gateway's own question.

    That one has a content type, which `Outside.line` never sends.
    """
    return [
        path
        for _, path, headers, _ in outside.upstream.seen
        if path != b"/v1/control/list-nodes" or "content-type" not in headers
    ]


class TestPassingOn:
    """Flower's Fleet API."""

    def test_a_request(self, outside: Outside) -> None:
        """Reaches the SuperLink as it is, with Flower's headers and no others."""
        body = bytes(range(256)) * 50
        headers = {
            "content-type": "application/x-protobuf",
            "flwr-signature": "abc",
            "authorization": "Bearer x",
            "x-forwarded-for": "1.2.3.4",
            "cookie": "a=b",
        }
        outside.upstream.answer = Response(body[::-1], 201, media_type="application/x-protobuf")
        answer = outside.client.post(PULL, content=body, headers=headers)
        assert (answer.status_code, answer.content) == (201, body[::-1])
        assert answer.headers["content-type"] == "application/x-protobuf"
        (method, path, passed, content) = outside.upstream.seen[-1]
        assert (method, path, content) == ("POST", PULL.encode(), body)
        assert passed["flwr-signature"] == "abc"
        assert not {"authorization", "x-forwarded-for", "cookie"} & set(passed)

    @pytest.mark.parametrize("status", [400, 401, 404, 415, 500])
    def test_a_refusal(self, outside: Outside, status: int) -> None:
        """Comes back as it is: nodes know Flower's own."""
        outside.upstream.answer = Response(b"no", status)
        assert outside.client.post(PULL, content=b"x").status_code == status

    def test_health(self, outside: Outside) -> None:
        """Is the SuperLink's."""
        assert outside.client.get("/health").text == "fine"
        assert outside.client.head("/health").status_code == 200

    def test_a_body_without_a_length(self, outside: Outside) -> None:
        """Is passed on piece by piece."""
        answer = outside.client.post(PULL, content=iter([b"one", b"two"]))
        assert answer.status_code == 200
        assert outside.upstream.seen[-1][3] == b"onetwo"

    def test_a_query_is_not_passed_on(self, outside: Outside) -> None:
        """Flower has none."""
        assert outside.client.post(PULL + "?x=1", content=b"").status_code == 200
        assert outside.upstream.seen[-1][1] == PULL.encode()

    def test_an_answer_that_breaks_off(self, outside: Outside) -> None:
        """Is never mistaken for a whole one."""
        outside.upstream.break_off = True
        with pytest.raises(httpx.RemoteProtocolError):
            outside.client.post(PULL, content=b"x")


class TestEverythingElse:
    """Is not there."""

    @pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "OPTIONS", "CONNECT"])
    @pytest.mark.parametrize(
        "path",
        [
            "/",
            "/v1",
            "/v1/fleet",
            "/v1/fleet/",
            "/v1/control/list-nodes",
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/list-nodes",
            "/v1/fleet/./pull-messages",
            "/v1/fleet/%2e%2e/control/list-nodes",
            "/v1/fleet/..%2fcontrol/list-nodes",
            "/v1/fleet/%2e%2e%2fcontrol%2flist-nodes",
            "/v1/fleet/pull-messages/../../control/list-nodes",
            "//v1/fleet/pull-messages",
            "/v1//fleet/pull-messages",
            "/v1/fleet//pull-messages",
            "/v1/fleet/pull-messages/",
            "/v1/fleet/pull-messages%00",
            "/v1/fleet/pull-messages;x",
            "/v1/fleet/pull%2dmessages",
            "/V1/FLEET/pull-messages",
            "/v1/fleet\\..\\control\\list-nodes",
            "/health/",
            "/healthz",
            "/docs",
            "/openapi.json",
            "https://127.0.0.1/v1/control/list-nodes",
            "*",
        ],
    )
    def test_no_way_around(self, outside: Outside, method: str, path: str) -> None:
        """Every trick with a path ends here, whatever the method."""
        first = outside.line(method, path)
        assert first.split()[1] in {b"404", b"400"}
        assert reached(outside) == []

    @pytest.mark.parametrize(
        "method", ["GET", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"]
    )
    @pytest.mark.parametrize("path", [PULL, f"{PATH}/enrol"])
    def test_other_methods(self, outside: Outside, method: str, path: str) -> None:
        """Are not there either."""
        assert outside.line(method, path).split()[1] == b"404"
        assert reached(outside) == []

    @given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=40))
    @hypothesis_settings(
        max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )
    def test_any_path(self, outside: Outside, path: str) -> None:
        """Only a single plain word after /v1/fleet/ reaches the SuperLink."""
        outside.upstream.seen.clear()
        outside.line("POST", f"/v1/fleet/{path}")
        for found in reached(outside):
            name = found.removeprefix(b"/v1/fleet/")
            assert name.replace(b"-", b"").isalpha()
            assert name.islower()

    def test_a_smuggled_request(self, outside: Outside) -> None:
        """Two lengths that contradict each other are refused."""
        hidden = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
        head = (
            f"POST {PULL} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            f"Content-Length: {len(hidden) + 5}\r\nConnection: close\r\n\r\n0\r\n\r\n"
        )
        outside.raw(head.encode() + hidden)
        assert set(reached(outside)) <= {PULL.encode()}

    def test_a_websocket(self, outside: Outside) -> None:
        """Is not there."""
        text = (
            f"GET {PULL} HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade, close\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
            "Sec-WebSocket-Version: 13\r\n\r\n"
        )
        assert outside.raw(text.encode()).split()[1] == b"404"

    def test_no_tls(self, outside: Outside) -> None:
        """Nothing is said in the open."""
        port = outside.world.settings.port
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)


class TestLimits:
    """How much, how long."""

    def test_a_body_that_says_it_is_too_large(self, outside: Outside) -> None:
        """Is not even read."""
        answer = outside.client.post(PULL, content=b"x" * (LIMIT + 1))
        assert (answer.status_code, answer.json()) == (413, {"error": "this request is too large"})
        assert reached(outside) == []

    def test_a_body_that_is_too_large(self, outside: Outside) -> None:
        """Is cut off, also without a length: the SuperLink never gets it whole."""
        parts = (b"x" * 10_000 for _ in range(LIMIT // 10_000 + 5))
        answer = outside.client.post(PULL, content=parts)
        assert answer.status_code == 413
        assert reached(outside) == []

    def test_a_body_at_the_limit(self, outside: Outside) -> None:
        """Is passed on."""
        assert outside.client.post(PULL, content=b"x" * LIMIT).status_code == 200

    @pytest.mark.parametrize("question", ["enrol", "members", "offer", "rotate"])
    def test_a_large_question(self, outside: Outside, question: str) -> None:
        """Is refused before it is read as JSON."""
        body = json.dumps({"merchant": "x" * MAX_BODY}).encode()
        answer = outside.client.post(f"{PATH}/{question}", content=body)
        assert answer.status_code == 413

    def test_a_body_that_does_not_come(
        self, outside: Outside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is waited for, not for ever."""
        monkeypatch.setattr("server.gateway.IDLE_S", 0.2)
        head = (
            f"POST {PULL} HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\nConnection: close\r\n\r\nab"
        )
        assert outside.raw(head.encode()).split()[1] == b"408"
        assert reached(outside) == []

    def test_a_connection_that_asks_nothing(
        self, outside: Outside, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is closed, whether it is silent or sends a header a letter at a time."""
        monkeypatch.setattr(connections, "SILENT_S", 0.2)
        assert outside.raw(b"") == b""
        assert outside.raw(b"POST /v1/fl") == b""


class TestEnrolmentPaths:
    """What the gateway answers itself."""

    def test_the_authority(self, outside: Outside) -> None:
        """Is there for everybody: it is compared with a hash."""
        answer = outside.client.get(f"{PATH}/ca")
        assert answer.text == (outside.world.settings.tls / "ca.crt").read_text()

    def test_enrolling(self, outside: Outside, tmp_path: Path) -> None:
        """Works from outside, and reaches the SuperLink's list of nodes."""
        keys = read_keys(merchant_folder(tmp_path / "shop-a"))
        token = outside.world.token("shop-a")
        answer = outside.client.post(f"{PATH}/enrol", json=outside.world.request(token, keys))
        assert answer.status_code == 200
        assert answer.json()["list"]["members"]["shop-a"] == keys.identity.public.hex()
        assert keys.node in outside.world.nodes.ids
        assert reached(outside) == []

    @pytest.mark.parametrize(
        ("question", "body", "status"),
        [
            ("enrol", b"nonsense", 400),
            ("enrol", b"{}", 400),
            ("other", b"{}", 400),
            ("members", json.dumps({"merchant": "x", "at": 1, "signature": ""}).encode(), 403),
            ("offer", json.dumps({"merchant": "x", "secret": "0" * 64}).encode(), 403),
        ],
    )
    def test_a_refusal(self, outside: Outside, question: str, body: bytes, status: int) -> None:
        """Is one JSON object with one key, and nothing more."""
        answer = outside.client.post(f"{PATH}/{question}", content=body)
        assert answer.status_code == status
        assert list(answer.json()) == ["error"]
        assert str(outside.world.settings.folder) not in answer.text

    def test_a_superlink_that_is_down(self, outside: Outside, tmp_path: Path) -> None:
        """Is said with 503: the merchant tries again with the same token."""
        keys = read_keys(merchant_folder(tmp_path / "shop-b"))
        request = outside.world.request(outside.world.token("shop-b"), keys)
        outside.world.nodes.down = True
        answer = outside.client.post(f"{PATH}/enrol", json=request)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        outside.world.nodes.down = False
        assert outside.client.post(f"{PATH}/enrol", json=request).status_code == 200

    def test_a_disk_that_is_full(self, outside: Outside, tmp_path: Path) -> None:
        """Is said without a word about files, and changes nothing."""
        keys = read_keys(merchant_folder(tmp_path / "shop-c"))
        request = outside.world.request(outside.world.token("shop-c"), keys)
        path = outside.world.settings.folder / "registry.sqlite"
        before = outside.world.registry.version
        path.rename(path.with_suffix(".away"))
        try:
            answer = outside.client.post(f"{PATH}/enrol", json=request)
        finally:
            path.unlink(missing_ok=True)
            path.with_suffix(".away").rename(path)
        assert answer.status_code == 503
        assert "registry" not in answer.text
        assert outside.world.registry.version == before


class TestWithoutASuperLink:
    """It is down, or somebody else listens there."""

    def test_nodes_are_told_to_try_again(self, tmp_path: Path, agreed: Contract) -> None:
        """503, with a time."""
        world = make_world(tmp_path / "operator", agreed)
        context = ssl.create_default_context(cadata=trusted(world.settings.tls))
        with (
            gateway(world),
            httpx.Client(base_url=world.settings.url, verify=context, trust_env=False) as client,
        ):
            for answer in (client.get("/health"), client.post(PULL, content=b"x")):
                assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
                assert list(answer.json()) == ["error"]

    def test_another_server_on_its_port(self, tmp_path: Path, agreed: Contract) -> None:
        """Gets no request: its certificate is not the operator's."""
        world = make_world(tmp_path / "operator", agreed)
        stranger, upstream = make_world(tmp_path / "stranger", agreed), Upstream()
        context = ssl.create_default_context(cadata=trusted(world.settings.tls))
        with (
            serving(tls_server(upstream, world.settings.superlink_port, stranger.settings.tls)),
            gateway(world),
            httpx.Client(base_url=world.settings.url, verify=context, trust_env=False) as client,
        ):
            assert client.post(PULL, content=b"x").status_code == 503
        assert upstream.seen == []


class TestTheCommand:
    """`python -m server.gateway`."""

    def run(self, *arguments: Any) -> "subprocess.CompletedProcess[str]":
        """Run it until it ends."""
        return subprocess.run(
            [sys.executable, "-m", "server.gateway", *map(str, arguments)],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip

    def test_wrong_use(self, tmp_path: Path) -> None:
        """Is told in one line."""
        assert "usage" in self.run().stderr
        done = self.run(tmp_path)
        assert done.returncode == 2
        assert done.stderr.startswith("hansa: ")
        assert "Traceback" not in done.stderr

    def test_serves_until_it_is_stopped(self, tmp_path: Path, agreed: Contract) -> None:
        """And logs in JSON, without a token's secret."""
        world = make_world(tmp_path / "operator", agreed)
        keys, token = read_keys(merchant_folder(tmp_path / "shop")), world.token("shop", 1e6)
        context = ssl.create_default_context(cadata=trusted(world.settings.tls))
        process = subprocess.Popen(
            [sys.executable, "-m", "server.gateway", str(world.settings.folder)]
        )
        try:
            with httpx.Client(
                base_url=world.settings.url, verify=context, trust_env=False
            ) as client:
                answer = _when_there(client, process)
                assert answer.status_code == 503
                request = world.request(token, keys)
                assert client.post(f"{PATH}/enrol", json=request).status_code == 503
        finally:
            process.terminate()
            process.wait(20)
        lines = (world.settings.logs / "gateway.jsonl").read_text()
        assert all(json.loads(line)["component"] == "gateway" for line in lines.splitlines())
        assert token.secret not in lines


def _when_there(client: httpx.Client, process: "subprocess.Popen[bytes]") -> httpx.Response:
    while True:
        try:
            return client.get("/health")
        except httpx.ConnectError:
            assert process.poll() is None, "the gateway ended"
            time.sleep(0.1)


def test_many_at_once(outside: Outside) -> None:
    """No answer goes to another's request."""
    wrong: list[bytes] = []

    async def echo(scope: Scope, receive: Receive, send: Send) -> None:
        await Response(outside.upstream.seen[-1][3])(scope, receive, send)

    outside.upstream.answer = echo  # type: ignore[assignment]

    def ask(number: int) -> None:
        body = str(number).encode() * 2000
        for _ in range(5):
            answer = outside.client.post(PULL, content=body)
            if answer.content != body:
                wrong.append(answer.content[:20])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(10, 26)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
