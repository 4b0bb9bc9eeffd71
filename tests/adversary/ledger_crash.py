"""Merchants as processes that can be killed: a warm process that forks one for every command.

Starting Python and torch takes seconds, and a fork a few milliseconds. The parent sends a socket
and a description to the warm process; the fork serves one merchant on that socket until it dies.

    python -m tests.adversary.ledger_crash FD
"""

import os
import pickle
import signal
import socket
import struct
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from clients.secure_party import SecureParty
from clients.session_store import FileStore
from clients.worker import Customers, Worker
from common.budget import Budget
from common.contract import Contract
from common.errors import HansaError
from common.identity import Identity, Members
from common.ledger import Ledger

ERROR, READY = "error", "ready"
_LENGTH = struct.Struct(">I")


@dataclass(frozen=True)
class Merchant:
    """Everything that a process needs to speak for a merchant."""

    folder: Path
    name: str
    key: bytes
    members: dict[str, bytes]
    witness: bytes
    contract: Contract
    budget: Budget

    @property
    def identity(self) -> Identity:
        """Return who it is."""
        return Identity(self.name, Ed25519PrivateKey.from_private_bytes(self.key))

    @property
    def ledger(self) -> Path:
        """Return where its ledger is."""
        return self.folder / "ledger.sqlite"

    def worker(self) -> Worker:
        """Open its files."""
        identity, members = self.identity, Members(self.members, self.witness)
        store = FileStore(self.folder / "session.sealed", identity)
        generator = np.random.default_rng(0)
        return Worker(
            self.name,
            self.contract,
            Customers(
                generator.uniform(-1, 1, (12, 1)), generator.integers(0, 2, 12), np.arange(12) < 4
            ),
            Ledger(self.ledger, self.budget, identity, self.witness),
            accept_unmasked_sums=True,
            secure=SecureParty(identity, members, 2, store),
        )


@dataclass(frozen=True)
class Command:
    """One message for a merchant, and after how many calls of functions its process dies."""

    method: str
    message: Any
    dies_after: int = 0  # 0: it does not


def send(connection: socket.socket, value: object) -> None:
    """Send one object; it arrives whole or not at all."""
    raw = pickle.dumps(value)
    connection.sendall(_LENGTH.pack(len(raw)) + raw)


def receive(connection: socket.socket) -> Any:
    """Return the next whole object; None if there is none and never will be."""
    head = _exactly(connection, _LENGTH.size)
    raw = _exactly(connection, _LENGTH.unpack(head)[0]) if head else None
    return None if raw is None else pickle.loads(raw)  # noqa: S301  # from our own child


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    raw = b""
    while len(raw) < size:
        with suppress(ConnectionError):
            part = connection.recv(size - len(raw))
            if part:
                raw += part
                continue
        return None
    return raw


class _Deadline:
    """Kills this process at its n-th call of a function, as nobody can handle."""

    def __init__(self, calls: int) -> None:
        self.calls, self.most = 0, calls

    def __call__(self, _frame: object, event: str, _arg: object) -> None:
        if event in {"call", "c_call"}:
            self.calls += 1
            if self.calls == self.most:
                os.kill(os.getpid(), signal.SIGKILL)


def serve(connection: socket.socket, merchant: Merchant) -> None:
    """Answer for a merchant until the connection ends."""
    worker = merchant.worker()
    send(connection, (READY, None, 0))
    while (command := receive(connection)) is not None:
        deadline = _Deadline(command.dies_after)
        sys.setprofile(deadline)
        try:
            answer = (command.method, getattr(worker, command.method)(command.message))
        except HansaError as error:
            answer = (ERROR, f"{type(error).__name__}: {error}")
        finally:
            sys.setprofile(None)
        send(connection, (*answer, deadline.calls))


def main() -> None:
    """Fork a process for every merchant that comes, until the parent is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    parent = socket.socket(fileno=int(sys.argv[1]))
    for _ in range(2):  # plan and network of each contract are worked out once, and kept
        warm = pickle.loads(receive(parent))  # noqa: S301
        warm.worker().ledger.close()
        send(parent, READY)
    while True:
        raw, handles, _, _ = socket.recv_fds(parent, 2**20, 1)
        if not raw:
            return
        child = os.fork()
        if child == 0:
            parent.close()
            serve(socket.socket(fileno=handles[0]), pickle.loads(raw))  # noqa: S301
            os._exit(0)
        os.close(handles[0])
        send(parent, child)


if __name__ == "__main__":
    main()
