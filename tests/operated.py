"""An operator's folder for tests, on ports of its own."""

import socket
import time
from pathlib import Path

from typer.testing import CliRunner

from common.contract import contract_toml
from common.enrolment import Enrolling, secret_sha256
from common.identity import Identity
from hansa.cli import app
from server.registry import Registry
from server.settings import Settings, read_settings
from simulations.datasets import load


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [int(listener.getsockname()[1]) for listener in listeners]
    finally:
        for listener in listeners:
            listener.close()


def make_operator(folder: Path, merchants: int = 3) -> Settings:
    """Make an operator's folder with `hansa server init`; nothing runs yet."""
    contract = folder.with_name(f"{folder.name}-contract.toml")
    contract.write_text(
        contract_toml(load("synthetic", preset="smoke", merchants=merchants).contract),
        encoding="utf-8",
    )
    port, superlink, metrics = map(str, free_ports(3))
    words = ["server", "init", str(folder), "--contract", str(contract), "--port", port]
    words += ["--superlink-port", superlink, "--metrics-port", metrics]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{done.output}{done.exception!r}"
    return read_settings(folder)


def enrol_unasked(settings: Settings, merchant: str, node: int) -> None:
    """Put a merchant on the list without a SuperLink: its node gets a number that is made up."""
    registry = Registry(settings.folder)
    secret = registry.invite(merchant, 1.0, time.time())
    identity = Identity.generate(merchant).public
    asked = Enrolling(merchant, identity, merchant.encode(), secret_sha256(secret))
    registry.enrol(asked, lambda _key, _name: node)
