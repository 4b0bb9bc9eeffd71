"""Who gets nothing: strangers, revoked merchants, men in the middle, a hostile app bundle."""

import json
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from server.certificates import issue, make_authority
from server.settings import read_settings
from tests.deployed.stack import Stack, until
from tests.deployed.test_survival import finished, is_connected

pytestmark = pytest.mark.slow


def outside(up: Stack) -> httpx.Client:
    """Return what a stranger with the right certificate sees."""
    settings = read_settings(up.operator)
    context = ssl.create_default_context(cafile=str(up.operator / "tls" / "ca.crt"))
    return httpx.Client(base_url=settings.url, verify=context, trust_env=False, timeout=10)


def node_log(folder: Path) -> str:
    """Return what a merchant's node logged."""
    path = folder / "logs" / "node.jsonl"
    return path.read_text(encoding="utf-8") if path.exists() else ""


class TestFromOutside:
    """The gateway, as anybody reaches it."""

    @pytest.mark.parametrize(
        "path",
        [
            "/v1/control/start-run",
            "/v1/control/list-runs",
            "/v1/control/register-node",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/list-runs",
            "/v1/fleet/%2e%2e/control/list-runs",
            "//v1/control/list-runs",
            "/v1/fleet//../runtime/acquire-task",
            "/docs",
            "/openapi.json",
            "/metrics",
            "/",
        ],
    )
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_control_and_runtime_are_not_there(self, up: Stack, path: str, method: str) -> None:
        """They answer 404, as if they did not exist."""
        with outside(up) as client:
            url = httpx.URL(str(client.base_url)).copy_with(raw_path=path.encode())
            assert client.request(method, url).status_code == 404

    def test_health_is_told(self, up: Stack) -> None:
        """And nothing else without a key."""
        with outside(up) as client:
            assert client.get("/health").status_code == 200
            for path in ("pull-messages", "activate-node", "register-node", "get-fab"):
                answer = client.post(f"/v1/fleet/{path}", content=b"")
                assert answer.status_code in {400, 401, 403, 404, 415, 422}, (path, answer.text)

    def test_a_stranger_learns_nothing_about_members(self, up: Stack) -> None:
        """Neither names nor the contract without a signature of a member, or a token."""
        with outside(up) as client:
            for name in ("members", "enrol", "offer", "rotate", "anything"):
                answer = client.post(f"/v1/fleet/hansa/{name}", json={"merchant": up.name(0)})
                assert answer.status_code >= 400
                assert answer.json().keys() == {"error"}
                assert not any(other in answer.text for other in up.names[1:])


def test_an_unenrolled_node_gets_an_error(up: Stack, tmp_path: Path) -> None:
    """Its key is not registered: it says so, goes on trying, and sees no message."""
    stranger = tmp_path / "stranger"
    shutil.copytree(up.shop(0), stranger, ignore=shutil.ignore_patterns("run", "logs", "*.sqlite*"))
    (stranger / "node.key").unlink()
    text = (stranger / "merchant.toml").read_text()
    (stranger / "merchant.toml").write_text(text)
    up.hansa("merchant", "init", stranger)
    joined = up.begin("merchant", "join", stranger, "--rehearsal")
    try:
        until(lambda: "may have revoked this merchant" in node_log(stranger), 60, "it is told so")
        finished(up, up.run())
        assert '"type"' not in node_log(stranger)
    finally:
        joined.terminate()
        joined.communicate(timeout=30)


@contextmanager
def man_in_the_middle(folder: Path) -> Iterator[tuple[str, list[bytes]]]:
    """Give the address of a server with a certificate of its own, and what it was sent."""
    heard: list[bytes] = []
    own = issue(make_authority("mallory"), ["127.0.0.1"])
    (folder / "mitm.crt").write_bytes(own.pem)
    (folder / "mitm.key").write_bytes(own.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "mitm.crt", folder / "mitm.key")
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.2)
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            try:
                raw, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                with context.wrap_socket(raw, server_side=True) as secure:
                    secure.settimeout(2)
                    heard.append(secure.recv(65536))
            except OSError:
                continue  # the other side hung up, which is what it should do

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"https://127.0.0.1:{listener.getsockname()[1]}", heard
    finally:
        ended.set()
        thread.join()
        listener.close()


def test_a_man_in_the_middle_hears_nothing(up: Stack, tmp_path: Path) -> None:
    """A merchant says nothing to a server whose certificate is not of the pinned authority."""
    shop = tmp_path / up.name(0)
    shutil.copytree(up.shop(0), shop, ignore=shutil.ignore_patterns("run", "logs", "*.sqlite*"))
    with man_in_the_middle(tmp_path) as (url, heard):
        document = json.loads((shop / "enrolment.json").read_text())
        (shop / "enrolment.json").write_text(json.dumps({**document, "url": url}))
        checked = up.hansa("merchant", "check", shop, code=None)
        assert checked.returncode
        joined = up.begin("merchant", "join", shop, "--rehearsal")
        try:
            printed = joined.communicate(timeout=20)[0]
            assert joined.returncode
            assert "certificate" in printed
        except subprocess.TimeoutExpired:  # it may wait for the right server for ever
            assert "certificate" in node_log(shop)
        finally:
            joined.terminate()
            joined.communicate()
    assert not any(heard)


def test_a_revoked_merchant(fresh: Stack) -> None:
    """It is out at once: no message reaches it, and its name is in no sum; others go on."""
    fresh.make(rounds=2, federation={"min_merchants": 3}, aggregation={"min_survivors": 2})
    fresh.start()
    fresh.enrol()
    fresh.join()
    finished(fresh, fresh.run())
    fresh.hansa("server", "revoke", fresh.operator, fresh.name(2))
    until(lambda: "revoked" in node_log(fresh.shop(2)), 60, "it is told so")
    code, printed = fresh.verdict(fresh.run("--wait", "3"))
    assert code == 0, printed
    found = {one["merchant"]: one for one in fresh.status()["merchants"]}
    assert fresh.name(2) not in found or not found[fresh.name(2)]["connected"]
    for number in (0, 1):
        members = fresh.hansa("merchant", "members", fresh.shop(number)).stdout
        assert "removed" in members
        accepted = fresh.hansa("merchant", "members", fresh.shop(number), "--accept").stdout
        assert "your worker starts anew" in accepted


def test_keys_are_replaced_on_both_sides(fresh: Stack) -> None:
    """A merchant's node key and the server's certificate change, and runs go on."""
    fresh.up(rounds=2)
    old = (fresh.shop(0) / "node.key").read_bytes()
    rotated = fresh.hansa("merchant", "rotate", fresh.shop(0)).stdout
    assert (fresh.shop(0) / "node.key").read_bytes() != old
    assert "your node starts anew" in rotated
    fresh.hansa("server", "rotate", fresh.operator, "--tls")
    fresh.hansa("server", "stop", fresh.operator)
    fresh.start()
    until(lambda: all(is_connected(fresh, number) for number in range(3)), 90, "all are there")
    finished(fresh, fresh.run())


def test_the_operators_identity_is_replaced(fresh: Stack) -> None:
    """Who accepted the new key takes part; who did not spends nothing and is told why.

    An audit follows the change.
    """
    fresh.up(rounds=2, federation={"min_merchants": 3}, aggregation={"min_survivors": 2})
    finished(fresh, fresh.run())
    fresh.hansa("server", "stop", fresh.operator)
    told = fresh.hansa("server", "rotate", fresh.operator, "--identity").stdout
    assert "hansa merchant members" in told
    fresh.start()
    until(lambda: all(is_connected(fresh, number) for number in range(3)), 90, "all are there")
    for number in (0, 1):
        shown = fresh.hansa("merchant", "members", fresh.shop(number), "--accept").stdout
        assert "rotated  the operator" in shown
        assert "your worker starts anew" in shown
    before = fresh.hansa("merchant", "budget", fresh.shop(2), "--json", "-").stdout
    code, printed = fresh.verdict(fresh.run("--wait", "20"))
    assert code == 0, printed
    assert fresh.hansa("merchant", "budget", fresh.shop(2), "--json", "-").stdout == before
    fresh.hansa("merchant", "members", fresh.shop(2), "--accept")
    finished(fresh, fresh.run())
    fresh.audit()
