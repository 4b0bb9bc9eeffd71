"""The same exchanges with Flower's defaults: SuperLink, SuperNodes and apps as in its guides.

`send_and_receive` in the ServerApp, SuperNodes in their default isolation, and a ClientApp that
imports torch, as one that trains does: Flower starts a fresh process for every message.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from clients.preparing import make_node_key, node_public
from common.files import write_new
from server.flower_control import register_node, run_status, start_run
from server.settings import Settings, read_settings

BIN = Path(sys.executable).parent
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "exchanges"
version = "0.1.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41,<1.42"]

[tool.flwr.app]
publisher = "benchmark"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "exchanges.server:app"
clientapp = "exchanges.client:app"

[tool.flwr.app.config]
out = ""
rounds = 1
stages = 3
numbers = 1000
"""
_SERVER = """\
import json, time
import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.serverapp import ServerApp

app = ServerApp()

@app.main()
def main(grid, context):
    config, rounds = context.run_config, []
    content = RecordDict({"x": ArrayRecord({"v": Array(np.zeros(config["numbers"], np.uint32))})})
    for _ in range(config["rounds"]):
        start = time.monotonic()
        for _ in range(config["stages"]):
            messages = [Message(content, dst_node_id=n, message_type="query")
                        for n in grid.get_node_ids()]
            replies = list(grid.send_and_receive(messages))
            assert not any(reply.has_error() for reply in replies)
        rounds.append(time.monotonic() - start)
    with open(config["out"], "w") as file:
        json.dump({"rounds": rounds, "nodes": len(messages)}, file)
"""
_CLIENT = """\
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

app = ClientApp()

@app.query()
def query(message, context):
    torch.set_num_threads(1)
    return Message(message.content, reply_to=message)
"""


@dataclass
class Defaults:
    """A SuperLink and SuperNodes that wait for runs."""

    folder: Path
    settings: Settings
    processes: list["subprocess.Popen[bytes]"] = field(default_factory=list)

    @property
    def nodes(self) -> list[int]:
        """Processes of the SuperNodes."""
        return [process.pid for process in self.processes[1:]]

    def run(self, rounds: int, numbers: int) -> list[float]:
        """Return the seconds of each of so many rounds of three exchanges."""
        out = self.folder / f"{time.monotonic_ns()}.json"
        config = {"out": str(out), "rounds": rounds, "numbers": numbers}
        run = start_run(self.settings, _bundle(), config)
        while not run_status(self.settings, run).startswith("finished"):
            time.sleep(0.2)
        found: list[float] = json.loads(out.read_text())["rounds"]
        return found

    def begin(self, *command: str) -> None:
        """Start a process."""
        with (self.folder / f"{len(self.processes)}.log").open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - Flower's own commands
                [str(BIN / command[0]), *command[1:]],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    **_ENVIRONMENT,
                    "FLWR_HOME": str(self.folder / "home"),
                    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
                },
                start_new_session=True,
            )
        self.processes.append(process)


def _bundle() -> bytes:
    from flwr.cli.build import build_fab_from_disk

    with tempfile.TemporaryDirectory(prefix="hansa-") as scratch:
        root = Path(scratch) / "exchanges"
        (root / "exchanges").mkdir(parents=True)
        for name, text in (
            ("pyproject.toml", _PROJECT),
            ("LICENSE", "Apache-2.0\n"),
            ("exchanges/__init__.py", ""),
            ("exchanges/server.py", _SERVER),
            ("exchanges/client.py", _CLIENT),
        ):
            (root / name).write_text(text, encoding="utf-8")
        return build_fab_from_disk(root)


@contextmanager
def flower_defaults(folder: Path, operator: Path, ports: list[int]) -> Iterator[Defaults]:
    """Give a SuperLink with TLS and node authentication, and one SuperNode for each further port.

    Args:
        folder: For keys and logs.
        operator: A folder that `hansa server init` made: its certificates and ports are used.
        ports: One a node.
    """
    settings = read_settings(operator)
    found = Defaults(folder, settings)
    tls = operator / "tls"
    try:
        found.begin(
            "flower-superlink", "--ssl-ca-certfile", f"{tls / 'ca.crt'}",
            "--ssl-certfile", f"{tls / 'server.crt'}", "--ssl-keyfile", f"{tls / 'server.key'}",
            "--enable-supernode-auth", "--database", f"{folder / 'state.db'}",
            "--host", "127.0.0.1", "--port", str(settings.superlink_port),
        )  # fmt: skip
        for number, port in enumerate(ports):
            key = folder / f"node{number}.key"
            write_new(key, make_node_key(), 0o600)
            _registered(settings, node_public(key), f"node{number}")
            found.begin(
                "flower-supernode", "--root-certificates", f"{tls / 'ca.crt'}",
                "--superlink", f"127.0.0.1:{settings.superlink_port}",
                "--auth-supernode-private-key", f"{key}", "--host", "127.0.0.1",
                "--port", str(port),
            )  # fmt: skip
        yield found
    finally:
        for process in reversed(found.processes):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
        for process in found.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)
                process.wait()


def _registered(settings: Settings, public: bytes, name: str) -> None:
    """Register a node, as soon as the SuperLink answers."""
    from common.errors import SuperLinkError

    for _ in range(200):
        try:
            register_node(settings, public, name)
        except SuperLinkError:
            time.sleep(0.2)
        else:
            return
    raise SystemExit("the SuperLink did not start")
