"""The operator's processes: SuperLink, SuperExec and gateway, and how their health shows.

    superlink   Flower's hub, on 127.0.0.1 only, TLS, nodes must prove their keys
    superexec   starts the coordinator when a run is asked for
    gateway     all that the outside sees: /v1/fleet/* and /health

Nothing of Flower's is written outside of the operator's folder.
"""

import json
import os
import socket
import ssl
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import SettingsError
from common.supervision import Child
from server.certificates import trusted
from server.settings import Settings

SUPERLINK, SUPEREXEC, GATEWAY = "superlink", "superexec", "gateway"
NAMES = (SUPERLINK, SUPEREXEC, GATEWAY)
LOOPBACK = "127.0.0.1"
PYTHON = (sys.executable, "-P")  # a folder named `server` where we happen to be is not imported
FLOWER_ENVIRONMENT: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_TASK_POLL_S = "0.5"  # Flower's default of a second is a second more before every run
_SECRETS = ("password", "sslpassword")
_ITS_OWN = "/v1/fleet/hansa/ca"  # answered by the gateway, even where the SuperLink is down
_PROBE_S = 3.0
_HANG_S = 30.0  # a busy machine is slow to answer; killing what works costs more than waiting
_STILL_S = 45.0  # Flower's SuperExec sleeps up to 20 s between its tries to reach the SuperLink


@dataclass(frozen=True)
class Places:
    """Where things are in the operator's folder."""

    folder: Path

    @property
    def run(self) -> Path:
        """Return the folder of the supervisor's lock and state."""
        return self.folder / "run"

    @property
    def tls(self) -> Path:
        """Return the folder of certificates."""
        return self.folder / "tls"

    @property
    def ca(self) -> Path:
        """Return the certificate that everybody trusts here."""
        return self.tls / "ca.crt"

    @property
    def certificate(self) -> Path:
        """Return the certificate of SuperLink and gateway."""
        return self.tls / "server.crt"

    @property
    def key(self) -> Path:
        """Return the private key of that certificate."""
        return self.tls / "server.key"

    @property
    def superexec_secret(self) -> Path:
        """Return the secret that SuperLink and SuperExec share."""
        return self.folder / "superlink" / "superexec.secret"

    @property
    def flower_state(self) -> Path:
        """Return the SuperLink's database."""
        return self.folder / "superlink" / "state.db"

    @property
    def contract(self) -> Path:
        """Return the contract."""
        return self.folder / "contract.toml"

    @property
    def identity(self) -> Path:
        """Return the coordinator's own private key."""
        return self.folder / "server" / "identity.key"

    def log(self, name: str) -> Path:
        """Return the file that collects what a process prints."""
        return self.folder / "logs" / f"{name}.log"


def services(folder: Path, settings: Settings) -> tuple[Child, ...]:
    """Return the processes to be supervised, in the order in which they need each other."""
    places = Places(folder.absolute())
    return (
        _superlink(places, settings),
        _superexec(places, settings),
        _gateway(places, settings),
    )


def flower_environment(folder: Path) -> dict[str, str]:
    """Return what every Flower process has in its environment.

    FLWR_HOME keeps Flower's files inside the operator's folder; the own folder of programs comes
    first on the path, because Flower starts its helpers by name.
    """
    own = str(Path(sys.executable).parent)
    return {
        **FLOWER_ENVIRONMENT,
        "FLWR_HOME": str(folder.absolute() / "run" / "flower"),
        "PATH": own + os.pathsep + os.environ.get("PATH", os.defpath),
        "PYTHONUNBUFFERED": "1",
    }


def _program(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _superlink(places: Places, settings: Settings) -> Child:
    command = (
        _program("flower-superlink"),
        *("--ssl-ca-certfile", str(places.ca)),
        *("--ssl-certfile", str(places.certificate)),
        *("--ssl-keyfile", str(places.key)),
        "--enable-supernode-auth",
        *("--database", str(places.flower_state)),
        *("--host", LOOPBACK),
        *("--port", str(settings.superlink_port)),
        "--disable-runtime-dependency-installation",
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(places.superexec_secret)),
    )
    return Child(
        name=SUPERLINK,
        command=command,
        log=places.log(SUPERLINK),
        env=flower_environment(places.folder),
        healthy=lambda: answers((LOOPBACK, settings.superlink_port), places.tls),
        hang_s=_HANG_S,
    )


def _superexec(places: Places, settings: Settings) -> Child:
    command = (
        _program("flower-superexec"),
        *("--runtime-api-address", f"{LOOPBACK}:{settings.superlink_port}"),
        *("--root-certificates", str(places.ca)),
        *("--superexec-auth-secret-file", str(places.superexec_secret)),
    )
    environment = flower_environment(places.folder)
    environment["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = _TASK_POLL_S
    environment |= store_environment(settings)  # for the coordinator that it starts
    return Child(
        name=SUPEREXEC,
        command=command,
        log=places.log(SUPEREXEC),
        env=environment,
        healthy=Moves(lambda: pid_of(places.run, SUPEREXEC)),
        after=(SUPERLINK,),
    )


def _gateway(places: Places, settings: Settings) -> Child:
    return Child(
        name=GATEWAY,
        command=(*PYTHON, "-m", "server.gateway", str(places.folder)),
        log=places.log(GATEWAY),
        env=flower_environment(places.folder),
        healthy=lambda: answers(_gateway_address(settings), settings.tls, _ITS_OWN),
        hang_s=_HANG_S,
        after=(SUPERLINK,),
    )


def gateway_answers(settings: Settings) -> bool:
    """Ask over TLS whether the gateway is well, and the SuperLink behind it."""
    return answers(_gateway_address(settings), settings.tls)


def _gateway_address(settings: Settings) -> tuple[str, int]:
    return reached_at(settings.bind), settings.port


def reached_at(bind: str) -> str:
    """Return the address under which this machine reaches a listener of its own.

    >>> reached_at("0.0.0.0"), reached_at("::"), reached_at("192.0.2.7")
    ('127.0.0.1', '::1', '192.0.2.7')
    """
    return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(bind, bind)  # noqa: S104


def answers(address: tuple[str, int], tls: Path, path: str = "/health") -> bool:
    """Ask over TLS, verified by our authorities; every certificate of ours names 127.0.0.1."""
    question = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    try:
        context = ssl.create_default_context(cadata=trusted(tls))
        with (
            socket.create_connection(address, timeout=_PROBE_S) as raw,
            context.wrap_socket(raw, server_hostname=LOOPBACK) as wrapped,
        ):
            wrapped.sendall(question.encode())
            with wrapped.makefile("rb") as answer:
                return answer.readline(64).split()[1:2] == [b"200"]
    except (OSError, SettingsError):  # refused, silent for too long, no valid certificate: not well
        return False


def pid_of(run: Path, name: str) -> int | None:
    """Return the process that the supervisor's state file names for a service."""
    try:
        state = json.loads((run / "state.json").read_text(encoding="utf-8"))
        return int(state["children"][name]["pid"])
    except (OSError, ValueError, KeyError, TypeError):  # not written yet, or not started yet
        return None


@dataclass
class Moves:
    """Says whether a process still moves: its main thread went to sleep and woke up again.

    Flower's SuperExec offers no health over TLS, but asks for work several times a second. A
    stopped or blocked one counts no more voluntary context switches.
    """

    pid: Callable[[], int | None]
    clock: Callable[[], float] = time.monotonic
    _seen: tuple[int, str] | None = field(default=None, init=False)
    _moved_at: float | None = field(default=None, init=False)

    def __call__(self) -> bool:
        """Return whether it moved since the last time, or not long ago."""
        pid = self.pid()
        switches = None if pid is None else _switches(pid)
        if pid is None or switches is None:
            self._seen = self._moved_at = None
            return False
        if self._seen is None or self._seen[0] != pid:
            self._seen, self._moved_at = (pid, switches), None
            return False
        if self._seen[1] != switches:
            self._seen, self._moved_at = (pid, switches), self.clock()
        return self._moved_at is not None and self.clock() - self._moved_at < _STILL_S


def _switches(pid: int) -> str | None:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return None
    found = (line for line in status.splitlines() if line.startswith("voluntary_ctxt_switches"))
    return next(found, None)


def store_for_run(settings: Settings) -> str:
    """Return the run store's URL as a run's configuration may hold it: without a password.

    Flower shows a run's configuration to every node. The coordinator gets the password from its
    environment, as PostgreSQL's programs do (`store_environment`).
    """
    from sqlalchemy.engine import URL, make_url

    url = make_url(settings.store_url).difference_update_query(_SECRETS)
    bare = URL.create(
        url.drivername, url.username, None, url.host, url.port, url.database, url.query
    )
    return bare.render_as_string(hide_password=False)


def store_environment(settings: Settings) -> dict[str, str]:
    """Return the run store's password as an environment variable of PostgreSQL's own library."""
    from sqlalchemy.engine import make_url

    url = make_url(settings.store_url)
    password = url.password or url.query.get("password")
    return {"PGPASSWORD": str(password)} if password else {}
