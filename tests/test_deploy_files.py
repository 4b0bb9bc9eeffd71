"""The files in `deploy/`: what they name exists, and the tools that read them accept them."""

import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import click
import pytest
import typer
import yaml

from hansa.cli import app
from server.certificates import make_tls

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
CONTAINERFILE = DEPLOY / "container" / "Containerfile"
COMPOSE = DEPLOY / "container" / "compose.yaml"
NGINX = DEPLOY / "nginx" / "hansa.conf"
FILES = [*UNITS, CONTAINERFILE, COMPOSE, NGINX]
_HANSA = re.compile(r"(?:/bin/hansa|(?:^|[\s`])hansa) ((?:server|merchant) [a-z]+)([^\n`]*)")

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # typer imports old names of click
    COMMAND = typer.main.get_command(app)


def told_commands() -> list[tuple[str, str]]:
    """Return every `hansa` command that a file names, with what follows it."""
    found = []
    for path in FILES:
        found += _HANSA.findall(path.read_text(encoding="utf-8"))
    containerfile = CONTAINERFILE.read_text(encoding="utf-8")
    for words in re.findall(r'^CMD \["((?:server|merchant)[^\]]*)"\]', containerfile, re.M):
        first, second, *rest = words.split('", "')
        found.append((f"{first} {second}", " ".join(rest)))
    return found


def names(path: Path) -> str:
    """Name a file in the list of tests."""
    return path.name


@pytest.mark.parametrize(("name", "rest"), told_commands())
def test_a_named_command_and_its_options_exist(name: str, rest: str) -> None:
    """Whoever copies a line from the files gets a command that is there."""
    group, command = name.split()
    assert isinstance(COMMAND, click.Group)
    inner = COMMAND.commands[group]
    assert isinstance(inner, click.Group)
    known = {option for parameter in inner.commands[command].params for option in parameter.opts}
    assert set(re.findall(r"--[a-z-]+", rest)) <= known


def test_every_command_is_looked_at() -> None:
    """The test above sees the commands that matter most."""
    seen = {name for name, _ in told_commands()}
    assert {"server start", "server stop", "server init", "merchant join", "merchant leave"} <= seen


class TestUnits:
    """The systemd units."""

    @pytest.mark.parametrize("path", UNITS, ids=names)
    @pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
    def test_systemd_accepts_them(self, path: Path, tmp_path: Path) -> None:
        """Every key is known and every program that they start is there."""
        program = tmp_path / "hansa"
        program.write_text("#!/bin/sh\n", encoding="ascii")
        program.chmod(0o755)
        text = path.read_text(encoding="utf-8").replace("/opt/hansa/bin/hansa", str(program))
        copy = tmp_path / path.name
        copy.write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(copy)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        told = [line for line in done.stderr.splitlines() if path.stem.rstrip("@") in line]
        assert not told

    @pytest.mark.parametrize("path", UNITS, ids=names)
    def test_they_start_again_and_give_up_rights(self, path: Path) -> None:
        """A service comes back for ever, as a user of its own, with nothing that it needs not."""
        text = path.read_text(encoding="utf-8")
        for line in (
            "Restart=always",
            "StartLimitIntervalSec=0",
            "NoNewPrivileges=yes",
            "CapabilityBoundingSet=",
            "ProtectSystem=strict",
            "ProtectHome=yes",
            "UMask=0077",
            "LimitCORE=0",
        ):
            assert re.search(rf"^{re.escape(line)}$", text, re.M), line
        assert re.search(r"^User=hansa", text, re.M)


class TestContainer:
    """The container files."""

    def test_what_is_copied_is_there(self) -> None:
        """Every COPY from the repository names something in it, and no room is forgotten."""
        text = CONTAINERFILE.read_text(encoding="utf-8")
        copied = {
            source
            for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M)
            for source in line.split()[:-1]
        }
        assert all((ROOT / source).exists() for source in copied)
        rooms = re.search(r"^packages = \[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.M)
        assert rooms is not None
        assert set(re.findall(r'"(\w+)"', rooms[1])) <= copied

    def test_both_sides_run_as_a_plain_user(self) -> None:
        """The image gives up root before anything of ours starts."""
        base = CONTAINERFILE.read_text(encoding="utf-8").partition("AS base")[2]
        assert base.index("USER 10001") < base.index("ENTRYPOINT")
        assert "USER root" not in base

    def test_the_python_is_the_one_that_the_package_wants(self) -> None:
        """The base image is of the version that pyproject.toml asks for."""
        wanted = re.search(r'requires-python = ">=(3\.\d+)', (ROOT / "pyproject.toml").read_text())
        assert wanted is not None
        assert f"python:{wanted[1]}-slim" in CONTAINERFILE.read_text(encoding="utf-8")

    def test_compose_names_targets_and_ports_that_exist(self) -> None:
        """The example builds the two targets of the file and opens the gateway alone."""
        document = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
        targets = set(re.findall(r"^FROM base AS (\w+)", CONTAINERFILE.read_text(), re.M))
        services = document["services"]
        assert {service["build"]["target"] for service in services.values()} == targets
        for service in services.values():
            build = service["build"]
            context = (COMPOSE.parent / build["context"]).resolve()
            assert (context / build["dockerfile"]).samefile(CONTAINERFILE)
            assert service["cap_drop"] == ["ALL"]
        assert services["server"]["ports"] == ["8443:8443"]
        assert "ports" not in services["merchant"]


class Echo(BaseHTTPRequestHandler):
    """Says that a request came through."""

    def do_GET(self) -> None:
        """Answer any path."""
        self.send_response(200)
        self.send_header("Content-Length", "7")
        self.end_headers()
        self.wfile.write(b"through")

    def log_message(self, format: str, *args: object) -> None:
        """Stay quiet."""


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def ask(port: int, ca: Path, target: str) -> int:
    """Ask for a path exactly as it is written; return the status."""
    context = ssl.create_default_context(cafile=str(ca))
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="127.0.0.1") as tls,
    ):
        tls.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return int(tls.recv(64).split()[1])


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """Run nginx with our file before a server that answers every path; give port and CA."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    if not os.access(program, os.X_OK):
        pytest.skip("no nginx here")
    make_tls(tmp_path / "tls", "test", ["127.0.0.1"])
    behind = HTTPServer(("127.0.0.1", 0), Echo)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "tls" / "server.crt", tmp_path / "tls" / "server.key")
    behind.socket = context.wrap_socket(behind.socket, server_side=True)
    threading.Thread(target=behind.serve_forever, daemon=True).start()
    port = free_port()
    text = NGINX.read_text(encoding="utf-8")
    for old, new in (
        ("/etc/hansa/tls", str(tmp_path / "tls")),
        ("127.0.0.1:8443", f"127.0.0.1:{behind.server_address[1]}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("listen [::]:443 ssl;", ""),
    ):
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "hansa.conf").write_text(text, encoding="utf-8")
    main = tmp_path / "nginx.conf"
    folders = " ".join(
        f"{kind}_temp_path {tmp_path / kind};"
        for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main.write_text(
        f"daemon off; master_process off; pid {tmp_path / 'nginx.pid'}; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {folders} include {tmp_path / 'hansa.conf'}; }}\n",
        encoding="utf-8",
    )
    process = subprocess.Popen(
        shlex.split(f"{program} -c {main} -p {tmp_path} -e stderr"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until = time.monotonic() + 20
        while not _listens(port):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield port, tmp_path / "tls" / "ca.crt"
    finally:
        process.terminate()
        process.communicate(timeout=20)
        behind.shutdown()
        behind.server_close()


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


class TestNginx:
    """The nginx configuration, in a real nginx."""

    def test_it_lets_through_the_fleet_and_health_alone(self, proxy: tuple[int, Path]) -> None:
        """Flower's control and runtime paths answer 404, however they are written."""
        port, ca = proxy
        for path in ("/health", "/v1/fleet/activate-node", "/v1/fleet/hansa/enrol"):
            assert ask(port, ca, path) == 200, path
        for path in (
            "/",
            "/health/",
            "/healthz",
            "/v1/fleet",
            "/v1/fleetx",
            "/v1/control/start-run",
            "/v1/runtime/acquire-task",
            "/v1/fleet/../control/start-run",
            "/v1/fleet/%2e%2e/control/start-run",
            "/v1/fleet/..%2fcontrol/start-run",
            "//v1/control/start-run",
            "/docs",
            "/openapi.json",
        ):
            assert ask(port, ca, path) in {400, 404}, path
