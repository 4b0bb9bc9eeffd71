"""All that the outside sees of the operator: TLS, Flower's Fleet API, health, and enrolment.

Flower has its Fleet, Control and Runtime APIs on one port, and asks for no authorisation on two
of them. The SuperLink therefore listens on 127.0.0.1 only, and this gateway passes on

    POST /v1/fleet/<name>        to the SuperLink, which asks for the node's signature
    GET, HEAD /health            to the SuperLink
    POST /v1/fleet/hansa/<name>  offer, enrol, members, rotate, identity: server/enrolling.py
    GET /v1/fleet/hansa/ca       the authority's certificate, to be compared with a token's hash

and nothing else: what is compared is the path as it was sent, byte by byte, so that no escape,
dot or double slash means something different to the SuperLink. Run it with
`python -m server.gateway FOLDER`.
"""

import asyncio
import logging
import re
import ssl
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from common.enrolment import MAX_BODY, PATH
from common.errors import EnrolmentError, HansaError, SuperLinkError, WireError
from server.certificates import trusted
from server.enrolling import Desk, open_desk, reconcile
from server.settings import Settings, read_settings

if TYPE_CHECKING:
    import uvicorn

MAX_MESSAGE = 64 * 1024 * 1024  # bytes of a node's request
IDLE_S = 60.0  # between two pieces of a request or of an answer
WHOLE_S = 900.0  # for a request and its answer
CONNECTIONS = 4096
_TO_SUPERLINK = 256  # connections
_RECONCILE_S = 60.0
_FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
_OURS = re.compile(PATH.encode() + rb"/[a-z]+")
_AUTHORITY = f"{PATH}/ca".encode()
_PASSED = {b"accept", b"content-length", b"content-type"}
_RETURNED = {b"content-length", b"content-type", b"content-encoding"}
_FLOWERS = b"flwr-"  # signature, timestamp, version

log = logging.getLogger("hansa.gateway")


class _BodyError(Exception):
    """A request's body is too large, or does not come."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Gateway:
    """An ASGI application: passes on, answers, or knows nothing.

    Args:
        settings: Of the federation.
        desk: Answers merchants.
        max_message: Bytes of a request that is passed on.
    """

    def __init__(self, settings: Settings, desk: Desk, max_message: int = MAX_MESSAGE) -> None:
        self._desk = desk
        self._max_message = max_message
        self._authority = (settings.tls / "ca.crt").read_bytes()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=trusted(settings.tls))
        self._superlink = httpx.AsyncClient(
            base_url=f"https://{settings.superlink}",
            verify=context,
            timeout=httpx.Timeout(IDLE_S, connect=5.0),
            limits=httpx.Limits(max_connections=_TO_SUPERLINK),
            trust_env=False,  # never through a proxy
        )

    @asynccontextmanager
    async def running(self, _app: Starlette) -> AsyncIterator[None]:
        """Keep the SuperLink's nodes as the registry has them, while the gateway runs."""
        keeping = asyncio.create_task(self._reconcile())
        try:
            yield
        finally:
            keeping.cancel()
            await self._superlink.aclose()

    async def _reconcile(self) -> None:
        while True:
            pause = _RECONCILE_S
            try:
                await run_in_threadpool(reconcile, self._desk.settings, self._desk.registry)
            except SuperLinkError:
                pause = 2.0  # it is starting, or down: whoever watches over it says so
            except HansaError as error:
                log.warning("nodes are not as the registry has them", extra=_why(error))
            await asyncio.sleep(pause)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        method, path = request.method, scope.get("raw_path", b"")
        if method == "GET" and path == _AUTHORITY:
            response: Response = PlainTextResponse(self._authority)
        elif method == "POST" and _OURS.fullmatch(path):
            response = await self._answer(path.rpartition(b"/")[2].decode(), request)
        elif (method == "POST" and _FLEET.fullmatch(path)) or (
            method in {"GET", "HEAD"} and path == b"/health"
        ):
            await self._pass_on(request, path.decode("ascii"), send)
            return
        else:
            response = _no(404, "not found")
        await response(scope, receive, send)

    async def _answer(self, question: str, request: Request) -> Response:
        """Let the desk answer a merchant."""
        try:
            body = b"".join([part async for part in _body(request, MAX_BODY)])
            return JSONResponse(await run_in_threadpool(self._desk.answer, question, body))
        except _BodyError as error:
            return _no(error.status, str(error))
        except WireError as error:
            return _no(400, str(error))
        except EnrolmentError as error:
            log.info("refused", extra={"question": question} | _why(error))
            return _no(403, str(error))
        except SuperLinkError as error:
            log.warning("no SuperLink", extra={"question": question} | _why(error))
            return _no(503, "the operator's SuperLink does not answer; nothing was changed")
        except HansaError as error:  # it names files: not for others
            log.error("cannot answer", extra={"question": question} | _why(error))  # noqa: TRY400
            return _no(503, "the operator cannot answer now; try again later")

    async def _pass_on(self, request: Request, path: str, send: Send) -> None:
        """Let the SuperLink answer, piece by piece."""
        begun, refusal = False, None

        async def sending(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(WHOLE_S):
                await self._exchange(request, path, sending)
        except ClientDisconnect:
            log.info("a node went away in mid-request", extra={"path": path})
        except _BodyError as error:
            refusal = _no(error.status, str(error))
        except (httpx.TransportError, TimeoutError) as error:
            log.warning("no SuperLink", extra={"path": path, "reason": type(error).__name__})
            refusal = _no(503, "the operator's SuperLink does not answer")
        if refusal is None:
            return
        if begun:  # only a broken connection tells now that the answer is not whole
            raise ConnectionError("the SuperLink broke off")
        await refusal(request.scope, request.receive, send)

    async def _exchange(self, request: Request, path: str, send: Send) -> None:
        has_body = request.method == "POST"
        asked = self._superlink.build_request(
            request.method,
            path,
            headers=[
                (name, value)
                for name, value in request.headers.raw
                if name in _PASSED or name.startswith(_FLOWERS)
            ],
            content=_body(request, self._max_message) if has_body else None,
        )
        answer = await self._superlink.send(asked, stream=True)
        try:
            headers = [(n.lower(), v) for n, v in answer.headers.raw if n.lower() in _RETURNED]
            start = {"type": "http.response.start", "status": answer.status_code}
            await send(start | {"headers": headers})
            async for part in answer.aiter_raw():
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body"})
        finally:
            await answer.aclose()


async def _body(request: Request, most: int) -> AsyncIterator[bytes]:
    """Yield a request's body; raise a `_BodyError` where it is too large or does not come."""
    if int(request.headers.get("content-length", "0")) > most:
        raise _BodyError(413, "this request is too large")
    seen, parts = 0, request.stream()
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise _BodyError(408, "this request did not come whole") from None
        seen += len(part)
        if seen > most:
            raise _BodyError(413, "this request is too large")
        yield part


def _no(status: int, text: str) -> Response:
    headers = {"retry-after": "2"} if status == 503 else None
    return JSONResponse({"error": text}, status, headers)


def _why(error: HansaError) -> dict[str, str]:
    return {"reason": str(error)}


def create_app(settings: Settings, desk: Desk, max_message: int = MAX_MESSAGE) -> Starlette:
    """Return the gateway as an application."""
    gateway = Gateway(settings, desk, max_message)
    return Starlette(routes=[Mount("/", app=gateway)], lifespan=gateway.running)


def server_of(settings: Settings, app: Starlette) -> "uvicorn.Server":
    """Return the server that listens where the settings say."""
    import uvicorn

    from server.connections import Protocol

    return uvicorn.Server(
        uvicorn.Config(
            app,
            host=settings.bind,
            port=settings.port,
            ssl_certfile=settings.tls / "server.crt",
            ssl_keyfile=settings.tls / "server.key",
            http=Protocol,
            ws="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
    )


def main(arguments: list[str]) -> int:
    """Serve a federation's gateway until it is told to stop."""
    from common.logs import set_up

    if len(arguments) != 1:
        sys.stderr.write("usage: python -m server.gateway FOLDER\n")
        return 2
    folder = Path(arguments[0])
    set_up("gateway", folder / "logs" / "gateway.jsonl")
    try:
        settings = read_settings(folder)
        server_of(settings, create_app(settings, open_desk(settings))).run()
    except HansaError as error:
        sys.stderr.write(f"hansa: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
