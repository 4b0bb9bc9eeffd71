"""Flower's own SuperLink, asked by the operator and by nodes."""

import os
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from clients.enrolling import enrol, fetch_members, pin_members, rotate_node_key, see_offer
from clients.preparing import NODE_KEY, make_node_key, node_public, read_keys
from common.contract import Contract
from common.errors import EnrolmentError, SuperLinkError, UnreachableError
from server.certificates import trusted
from server.enrolling import open_desk, reconcile
from server.flower_control import (
    list_nodes,
    register_node,
    run_status,
    start_run,
    stop_run,
    unregister_node,
)
from simulations.datasets import load
from tests.enrolment_world import World, gateway, make_world, merchant_folder

BIN = Path(sys.executable).parent
UNKNOWN = 412  # what Flower says to a key that is not registered


@pytest.fixture(scope="module")
def agreed() -> Contract:
    """Give a contract."""
    return load("synthetic", preset="smoke", merchants=3).contract


@pytest.fixture
def world(tmp_path: Path, agreed: Contract) -> World:
    """Make an operator whose desk asks the SuperLink."""
    made = make_world(tmp_path / "operator", agreed)
    return replace(made, desk=open_desk(made.settings), clock=time.time)


def start(world: World) -> "subprocess.Popen[bytes]":
    """Start Flower's SuperLink for a federation, and wait until it answers."""
    settings, state = world.settings, world.settings.folder / "superlink"
    state.mkdir(exist_ok=True)
    (state / "secret").write_bytes(b"s" * 32)
    command = [
        str(BIN / "flower-superlink"),
        "--ssl-ca-certfile", str(settings.tls / "ca.crt"),
        "--ssl-certfile", str(settings.tls / "server.crt"),
        "--ssl-keyfile", str(settings.tls / "server.key"),
        "--enable-supernode-auth", "--database", str(state / "state.db"),
        "--host", "127.0.0.1", "--port", str(settings.superlink_port),
        "--disable-runtime-dependency-installation", "--isolation", "process",
        "--superexec-auth-secret-file", str(state / "secret"),
    ]  # fmt: skip
    environment = {**os.environ, "FLWR_HOME": str(state)}
    with (state / "log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    while True:
        try:
            list_nodes(settings)
        except SuperLinkError:
            assert process.poll() is None, (state / "log").read_text()
            time.sleep(0.1)
        else:
            return process


@pytest.fixture
def superlink(world: World) -> Iterator[World]:
    """Run Flower's SuperLink."""
    process = start(world)
    yield world
    process.terminate()
    process.wait(30)


def asks(world: World, folder: Path, *, node: int = 0) -> int:
    """Ask the SuperLink through the gateway as a merchant's node; return HTTP's status.

    Without a node's id: to be let in. With it: for messages.
    """
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    key = load_ssh_private_key((folder / NODE_KEY).read_bytes(), None)
    client = FleetHttpClient(
        world.settings.url,
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],  # type: ignore[arg-type]
        verify=ssl.create_default_context(cadata=trusted(world.settings.tls)),
    )
    public = node_public(folder / NODE_KEY)
    try:
        if node:
            client.PullMessages(PullMessagesRequest(node=Node(node_id=node)))
        else:
            client.ActivateNode(ActivateNodeRequest(public_key=public, heartbeat_interval=30))
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    finally:
        client.close()
    return 200


def enrolled(world: World, folder: Path) -> Path:
    """Make a merchant's folder and enrol it."""
    merchant_folder(folder)
    token = world.token(folder.name)
    enrol(see_offer(token, folder), folder)
    return folder


def test_without_a_superlink(world: World) -> None:
    """What to do is told."""
    with pytest.raises(SuperLinkError, match="start it with hansa server start"):
        list_nodes(world.settings)


@pytest.mark.slow
class TestNodes:
    """The operator's list and the SuperLink's."""

    def test_registering(self, superlink: World, tmp_path: Path) -> None:
        """The same key keeps its id; once withdrawn it never comes back."""
        settings = superlink.settings
        key = read_keys(merchant_folder(tmp_path / "shop")).node
        node = register_node(settings, key, "shop")
        assert register_node(settings, key, "shop") == node
        (found,) = list_nodes(settings)
        assert (found.node, found.name, found.public_key) == (node, "shop", key)
        unregister_node(settings, node)
        unregister_node(settings, node)
        with pytest.raises(EnrolmentError, match="takes no key twice"):
            register_node(settings, key, "shop")
        with pytest.raises(SuperLinkError, match="public key is not valid"):
            register_node(settings, b"nonsense", "shop")

    def test_runs(self, superlink: World) -> None:
        """What is no run or no bundle is told."""
        settings = superlink.settings
        for question in (
            lambda: run_status(settings, 5),
            lambda: stop_run(settings, 5),
            lambda: start_run(settings, b"no bundle", {"a": 1}),
        ):
            with pytest.raises(SuperLinkError, match="the SuperLink refused"):
                question()

    def test_a_merchants_way(self, superlink: World, tmp_path: Path) -> None:
        """Its node is let in once it is enrolled, with its new key, and not once it is revoked."""
        with gateway(superlink):
            shop = merchant_folder(tmp_path / "shop")
            assert asks(superlink, shop) == UNKNOWN
            enrol(see_offer(superlink.token("shop"), shop), shop)
            assert asks(superlink, shop) == 200
            (first,) = superlink.registry.nodes()
            assert asks(superlink, shop, node=first) == 200
            rotate_node_key(shop)
            assert asks(superlink, shop, node=first) == 401
            (second,) = superlink.registry.nodes()
            assert asks(superlink, shop) == 200
            assert asks(superlink, shop, node=second) == 200
            unregister_node(superlink.settings, superlink.registry.revoke("shop").node)
            assert asks(superlink, shop, node=second) == 401
            assert asks(superlink, shop) == UNKNOWN

    def test_from_outside(self, superlink: World) -> None:
        """Control and runtime are not there, though the SuperLink has them."""
        context = ssl.create_default_context(cadata=trusted(superlink.settings.tls))
        inside, outside = f"https://{superlink.settings.superlink}", superlink.settings.url
        with gateway(superlink), httpx.Client(verify=context, trust_env=False) as client:
            assert client.get(f"{outside}/health").status_code == 200
            for path in ("/v1/control/list-nodes", "/v1/control/register-node"):
                assert client.post(f"{outside}{path}").status_code == 404
                assert client.post(f"{inside}{path}").status_code != 404

    def test_a_key_that_was_not_enrolled(self, superlink: World, tmp_path: Path) -> None:
        """Gets neither in nor at the messages of the merchant whose key it replaced."""
        with gateway(superlink):
            shop = enrolled(superlink, tmp_path / "shop")
            (node,) = superlink.registry.nodes()
            (shop / NODE_KEY).write_bytes(make_node_key())
            assert asks(superlink, shop) == UNKNOWN
            assert asks(superlink, shop, node=node) == 401

    def test_another_members_key(self, superlink: World, tmp_path: Path) -> None:
        """Does not open this member's messages."""
        with gateway(superlink):
            enrolled(superlink, tmp_path / "shop")
            (node,) = superlink.registry.nodes()
            assert asks(superlink, enrolled(superlink, tmp_path / "other"), node=node) == 401

    def test_reconciling(self, superlink: World, tmp_path: Path) -> None:
        """A node that was revoked while the SuperLink was down goes when it is back."""
        with gateway(superlink):
            shop, other = (enrolled(superlink, tmp_path / name) for name in ("shop", "other"))
            nodes = {name: node for node, name in superlink.registry.nodes().items()}
            superlink.registry.revoke("shop")  # and nobody told the SuperLink
            assert asks(superlink, shop, node=nodes["shop"]) == 200
            assert reconcile(superlink.settings, superlink.registry) == []
            assert asks(superlink, shop, node=nodes["shop"]) == 401
            assert asks(superlink, other, node=nodes["other"]) == 200


@pytest.mark.slow
def test_a_superlink_that_lost_its_database(world: World, tmp_path: Path) -> None:
    """Gets all members' nodes again; merchants need to do nothing."""
    process = start(world)
    try:
        with gateway(world):
            shop = enrolled(world, tmp_path / "shop")
            before = world.registry.nodes()
            process.terminate()
            process.wait(30)
            for path in (world.settings.folder / "superlink").glob("state.db*"):
                path.unlink()
            with pytest.raises(UnreachableError, match="does not answer"):
                enrolled(world, tmp_path / "late")
            process = start(world)
            while world.registry.nodes() == before:  # the gateway sees to it
                time.sleep(0.1)
            assert asks(world, shop) == 200
            enrol(see_offer(world.token("late"), tmp_path / "late"), tmp_path / "late")
            pin_members(fetch_members(shop))
    finally:
        process.terminate()
        process.wait(30)
    assert set(world.registry.nodes().values()) == {"shop", "late"}
