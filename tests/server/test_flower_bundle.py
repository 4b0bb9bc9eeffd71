"""Tests of the app bundle of a deployed federation, and of the shim in it."""

import io
import subprocess
import sys
import tomllib
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from clients.joining import Opened
from clients.worker_service import WorkerService
from clients.worker_socket import bound
from common.contract import Contract
from common.wire import Attest, Attested, pack, unpack
from common.worker_wire import CHANNEL_OPTIONS
from server.flower_bundle import FILES, FOLDER, bundle
from tests.clients.conftest import build_contract
from tests.clients.test_app import worker_of
from tests.enrolment_world import free_port
from tests.fleet_world import SuperLink, node_folder, running, until

BIN = Path(sys.executable).parent
SHIM = FOLDER / "hansa_app" / "client.py"


@pytest.fixture
def contract() -> Contract:
    """Give a contract with plain sums."""
    return build_contract(aggregation={"secure": False})


class TestBundle:
    """What is shipped."""

    def test_the_same_bytes_each_time(self) -> None:
        """Its hash can be compared."""
        assert bundle() == bundle()

    def test_nothing_else_is_in_it(self) -> None:
        """The way to the installed Hansa, the licence, and Flower's list of both."""
        with zipfile.ZipFile(io.BytesIO(bundle())) as found:
            assert set(found.namelist()) == {*FILES, ".info/CONTENT"}
            settings = tomllib.loads(found.read("pyproject.toml").decode())
        assert settings["tool"]["flwr"]["app"]["components"] == {
            "serverapp": "hansa_app.server:app",
            "clientapp": "hansa_app.client:app",
        }
        assert {"federation", "run", "store", "wait"} <= set(
            settings["tool"]["flwr"]["app"]["config"]
        )


class TestShim:
    """The client in the bundle."""

    def test_it_is_light(self) -> None:
        """It imports nothing of Hansa, no torch and no table."""
        code = (
            f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n"
            "import hansa_app.client\n"
            "ours = {'clients', 'common', 'server', 'hansa', 'torch', 'pandas', 'opacus'}\n"
            "print(sorted(name for name in sys.modules if name.split('.')[0] in ours))\n"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == "[]"

    @pytest.mark.slow
    def test_with_flowers_own_node(
        self, contract: Contract, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        """A message to `flower-supernode` with the bundle is answered by the worker."""
        folder = tmp_path_factory.mktemp("m")
        superlink = SuperLink(folder / "superlink")
        places, public = node_folder(folder / "shop", superlink)
        node = superlink.register(public)
        worker = worker_of(contract, folder)
        table: Any = None
        service = WorkerService(lambda: Opened(worker, table, None))
        server = grpc.server(ThreadPoolExecutor(8), options=CHANNEL_OPTIONS)
        with (
            bound(server, places.socket, None),
            running(lambda: service.serve(server), service.stop),
            superlink.up(),
            (folder / "log").open("w") as log,
        ):
            process = subprocess.Popen(
                [
                    str(BIN / "flower-supernode"),
                    *("--superlink", superlink.url.removeprefix("https://")),
                    *("--root-certificates", str(superlink.tls / "ca.crt")),
                    *("--auth-supernode-private-key", str(places.node_key)),
                    *("--port", str(free_port())),
                    *("--node-config", f'worker="{places.socket}"'),
                ],
                env={
                    "PATH": f"{BIN}:/usr/bin:/bin",
                    "FLWR_HOME": str(folder / "flower"),
                    "FLWR_TELEMETRY_ENABLED": "0",
                    "FLWR_DISABLE_UPDATE_CHECK": "1",
                    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
                },
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            try:
                run = superlink.begin_run(bundle())
                until(lambda: node in superlink.state.get_nodes(run), "it is connected", 120)
                content = pack(Attest("r", worker.contract.sha256))
                sent = superlink.send(run, node, "query.attest", content, ttl=180)
                reply = until(
                    lambda: next(iter(superlink.state.get_message_res({sent}, run)), None),
                    "a reply",
                    170,
                )
                assert not reply.has_error(), (reply.error.reason, (folder / "log").read_text())
                whole = superlink._whole(run, reply)
                assert unpack(Attested, whole.content).merchant == "shop"
            finally:
                process.terminate()
                process.wait(60)
