"""A federation that can be enrolled in: a real gateway over TLS on loopback, and merchants.

The SuperLink is either Flower's own (tests marked slow) or a set of node keys in this process.
"""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from clients.preparing import Keys, Wishes, prepare
from common.contract import Contract, contract_toml, read_contract
from common.enrolment import Enrolling, Token, contract_statement
from common.errors import SuperLinkError
from server.archive import make_archive
from server.certificates import authority_sha256, make_tls
from server.enrolling import Desk, open_desk
from server.gateway import create_app, server_of
from server.registry import Registry
from server.settings import Settings, checked_settings, read_settings, write_settings


@dataclass
class Nodes:
    """Which node keys were let in; stands for the SuperLink's own list."""

    ids: dict[bytes, int] = field(default_factory=dict)
    gone: list[int] = field(default_factory=list)
    down: bool = False

    def register(self, key: bytes, _name: str) -> int:
        """Let a node in."""
        if self.down:
            raise SuperLinkError("the SuperLink does not answer")
        return self.ids.setdefault(key, 2**63 + len(self.ids))

    def unregister(self, node: int) -> None:
        """Let a node in no longer."""
        if self.down:
            raise SuperLinkError("the SuperLink does not answer")
        self.gone.append(node)


@dataclass
class Clock:
    """A clock that a test sets."""

    at: float = 1_800_000_000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.at


@dataclass
class World:
    """An operator's folder, its desk, and what was let in."""

    settings: Settings
    contract: Contract
    nodes: Nodes
    clock: Any
    desk: Desk

    @property
    def registry(self) -> Registry:
        """The registry."""
        return self.desk.registry

    @property
    def operator(self) -> bytes:
        """The operator's public key."""
        return self.desk.identity.public

    def token(self, merchant: str, hours: float = 72) -> Token:
        """Invite a merchant."""
        return Token(
            self.settings.url,
            authority_sha256(self.settings.tls),
            self.operator.hex(),
            self.contract.sha256,
            merchant,
            self.registry.invite(merchant, hours, self.clock()),
        )

    def request(self, token: Token, keys: Keys, **changes: Any) -> dict[str, Any]:
        """Return what a merchant sends to enrol, with some fields replaced after it signed."""
        public = keys.identity.public
        asked = Enrolling(token.merchant, public, keys.node, token.secret_sha256)
        return {
            "secret": token.secret,
            "merchant": token.merchant,
            "identity": public.hex(),
            "node": keys.node.decode(),
            "proof": keys.identity.sign(asked.statement(self.operator)).hex(),
        } | changes


def free_port() -> int:
    """Return a port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_world(folder: Path, contract: Contract, **settings: Any) -> World:
    """Make an operator's folder."""
    ports = {name: free_port() for name in ("port", "superlink_port", "metrics_port")}
    found = checked_settings(ports | settings, folder)
    folder.mkdir(parents=True)
    operator = make_archive(found.archive)
    (folder / "contract.toml").write_text(contract_toml(contract))
    signature = operator.sign(contract_statement(contract.sha256)).hex()
    (folder / "contract.sig").write_text(signature + "\n")
    make_tls(found.tls, contract.federation.name, found.hosts)
    Registry.create(folder, operator.public)
    write_settings(found)
    return opened(folder, Clock())


def opened(folder: Path, clock: Callable[[], float] = time.time) -> World:
    """Open an operator's folder, with the SuperLink's part played in this process."""
    settings, nodes = read_settings(folder), Nodes()
    desk = replace(
        open_desk(settings), register=nodes.register, unregister=nodes.unregister, now=clock
    )
    contract = read_contract(folder / "contract.toml")
    return World(settings, contract, nodes, clock, desk)


def merchant_folder(path: Path) -> Path:
    """Make a merchant's folder, its id the folder's name."""
    prepare(path, Wishes(None, None, 1.0, 1e-5))
    return path


class Server(uvicorn.Server):
    """A server that keeps no connection open when it has ended, whatever the other side does."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End."""
        await super().shutdown(sockets)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        while self.server_state.connections:
            await asyncio.sleep(0.01)


@contextmanager
def serving(config: uvicorn.Config) -> Iterator[None]:
    """Run a server in a thread of this process."""
    server = Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        thread.join(20)


def tls_server(app: ASGIApp, port: int, tls: Path) -> uvicorn.Config:
    """Return how to serve any application with a folder's certificate."""
    return uvicorn.Config(
        app,
        host="127.0.0.1",
        port=port,
        ssl_certfile=tls / "server.crt",
        ssl_keyfile=tls / "server.key",
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=1,
    )


@contextmanager
def gateway(world: World, **options: Any) -> Iterator[World]:
    """Serve a federation's gateway."""
    with serving(
        server_of(world.settings, create_app(world.settings, world.desk, **options)).config
    ):
        yield world
