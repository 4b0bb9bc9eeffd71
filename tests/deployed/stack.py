"""A whole federation of real processes over real TLS on loopback, as tests start and hurt it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from common.budget import Account, Budget
from common.contract import contract_toml, read_contract
from common.identity import read_members
from common.ledger_entries import read_ledger
from server.settings import read_settings
from tests.deployed.cable import Cable

BIN = Path(sys.executable).parent
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
lengthy = pytest.mark.skipif(
    "HANSA_LENGTHY" not in os.environ,
    reason="takes minutes, and others test nearly the same; HANSA_LENGTHY=1 runs it",
)
SEED = 7  # of the merchants' noise: what is compared with a simulation must be repeatable


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii")
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


def until(what: Callable[[], Any], seconds: float, told: str) -> Any:
    """Return the first true value of a question, asked again and again; fail after a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = what()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError(f"{told}: not within {seconds:g} s")


@dataclass
class Stack:
    """An operator's folder, merchants' folders, and the processes that run them."""

    folder: Path
    merchants: int = 3
    started: list[subprocess.Popen[str]] = field(default_factory=list)
    runs: dict[int, str] = field(default_factory=dict)  # process of `hansa server run` -> name

    @property
    def operator(self) -> Path:
        """The operator's folder."""
        return self.folder / "coordinator"

    def shop(self, number: int) -> Path:
        """Return a merchant's folder."""
        return self.folder / "shops" / "merchants" / self.name(number)

    @staticmethod
    def name(number: int) -> str:
        """Return a merchant's id."""
        return f"merchant-{number:04d}"

    @property
    def names(self) -> list[str]:
        """All merchants' ids."""
        return [self.name(number) for number in range(self.merchants)]

    def hansa(
        self,
        *arguments: str | Path,
        code: int | None = 0,
        timeout: float = 300,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and check its exit code."""
        done = subprocess.run(
            [str(BIN / "hansa"), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, **OFFLINE, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"{arguments}\n{done.stdout}{done.stderr}"
        return done

    def begin(
        self, *arguments: str | Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start a command in the background."""
        process = subprocess.Popen(
            [str(BIN / "hansa"), *map(str, arguments)],
            cwd=self.folder,
            env={**os.environ, **OFFLINE, "COLUMNS": "200", **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.started.append(process)
        return process

    def make(
        self,
        *,
        epsilon: float = 100.0,
        rounds: int = 3,
        database: str = "",
        **sections: dict[str, Any],
    ) -> None:
        """Generate customers and a contract that is quick to run, and make the operator."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.hansa(
            "data", "generate", "shops", "--preset", "smoke", "--merchants", str(self.merchants),
            "--seed", str(SEED),
        )  # fmt: skip
        path = self.folder / "shops" / "contract.toml"
        changes: dict[str, dict[str, Any]] = {
            "federation": {"round_timeout_s": 30.0},
            "model": {"family": "linear"},
            "training": {"rounds": rounds, "spare_rounds": 4},
            "publication": {"evaluate_every": 1000, "profiles": False},
        }
        for name, section in sections.items():
            changes[name] = {**changes.get(name, {}), **section}
        path.write_text(contract_toml(read_contract(path).revised(**changes)), encoding="utf-8")
        for number in range(self.merchants):
            self.allow(number, epsilon)
        gateway, superlink, metrics = free_ports(3)
        self.hansa(
            "server", "init", "coordinator", "--contract", "shops/contract.toml", "--port",
            str(gateway), "--superlink-port", str(superlink), "--metrics-port", str(metrics),
            *(("--database", database) if database else ()),
        )  # fmt: skip

    def allow(self, number: int, epsilon: float) -> None:
        """Set a merchant's cap."""
        path = self.shop(number) / "merchant.toml"
        lines = path.read_text(encoding="utf-8").splitlines()
        changed = [
            f"epsilon = {float(epsilon)}"
            if line.startswith("epsilon =")
            else "min_cohort = 2"
            if line.startswith("min_cohort =")
            else line
            for line in lines
        ]
        path.write_text("\n".join(changed) + "\n", encoding="utf-8")

    def start(self) -> None:
        """Start the operator's services."""
        self.hansa("server", "start", self.operator, "--background")

    def enrol(self, numbers: Sequence[int] | None = None) -> None:
        """Let merchants make keys and enrol."""
        numbers = range(self.merchants) if numbers is None else numbers
        shops = [self.shop(number) for number in numbers]
        tokens = self.folder / "tokens" / str(time.monotonic_ns())
        self.hansa("merchant", "init", *shops)
        self.hansa(
            "server", "invite", self.operator, *[shop.name for shop in shops], "--out", tokens
        )
        self.hansa("merchant", "enrol", *sorted(tokens.iterdir()), "--in", shops[0].parent, "--yes")

    def lead(self, number: int, port: int) -> None:
        """Have an enrolled merchant reach the gateway by another port."""
        path = self.shop(number) / "enrolment.json"
        document = json.loads(path.read_text(encoding="utf-8"))
        changed = {**document, "url": f"https://127.0.0.1:{port}"}
        path.write_text(json.dumps(changed), encoding="utf-8")

    def join(self, numbers: Sequence[int] | None = None) -> None:
        """Let merchants' processes run."""
        numbers = range(self.merchants) if numbers is None else numbers
        shops = [self.shop(number) for number in numbers]
        options = ("--accept-members", "--rehearsal", "--background")
        self.hansa("merchant", "join", *shops, *options)

    def up(self, **contract: Any) -> None:
        """Make, start, enrol, join: ready to run."""
        self.make(**contract)
        self.start()
        self.enrol()
        self.join()

    def run(self, *options: str) -> subprocess.Popen[str]:
        """Begin a run and wait until it has a name; what it prints is read by `verdict`."""
        process = self.begin("server", "run", self.operator, *options)
        assert process.stdout is not None
        first = process.stdout.readline()
        assert first.startswith("run "), first + process.communicate()[0]
        self.runs[process.pid] = first.split()[1]
        return process

    @staticmethod
    def verdict(run: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
        """Wait for a run to end; return its exit code and what it printed."""
        printed, _ = run.communicate(timeout=timeout)
        return run.returncode, printed

    def status(self) -> dict[str, Any]:
        """Return what `hansa server status` tells."""
        printed = self.hansa("server", "status", self.operator, "--json", "-", code=None).stdout
        found: dict[str, Any] = json.loads(printed[printed.index("{") :])
        return found

    def children(self, folder: Path) -> dict[str, int]:
        """Return the processes under a supervisor by name."""
        state = json.loads((folder / "run" / "state.json").read_text(encoding="utf-8"))
        return {name: child["pid"] for name, child in state["children"].items() if child["pid"]}

    def pid(self, folder: Path, child: str) -> int:
        """Return the process of one child, when it is there."""

        def find() -> int | None:
            pid = self.children(folder).get(child)
            return pid if pid and alive(pid) else None

        found: int = until(find, 30, f"{folder.name}: {child}")
        return found

    def coordinator_pid(self) -> int:
        """Return the process of the run that is under way."""
        superexec = self.pid(self.operator, "superexec")

        def find() -> int | None:
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    command = (process / "cmdline").read_bytes()
                    parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
                except OSError:
                    continue
                if b"flwr-serverapp" in command and int(parent) == superexec:
                    return int(process.name)
            return None

        found: int = until(find, 30, "the coordinator's process")
        return found

    def kill(self, pid: int, sign: int = signal.SIGKILL) -> None:
        """Send a signal to a process of this stack."""
        os.kill(pid, sign)

    def ledgers(self) -> dict[str, Account]:
        """Read and check every merchant's ledger."""
        found = {}
        for number in range(self.merchants):
            path = self.shop(number) / "ledger.sqlite"
            if path.exists():
                members = read_members(self.shop(number) / "members.toml")
                key = members.keys[self.name(number)]
                found[self.name(number)] = read_ledger(path, Budget(100.0, 1e-5), key).account
        return found

    def evidence(self) -> Path:
        """Write everybody's evidence into one folder."""
        out = self.folder / "evidence"
        shutil.rmtree(out, ignore_errors=True)
        (out / "merchants").mkdir(parents=True)
        self.hansa("server", "evidence", self.operator, "--out", out / "server.zip")
        for number in range(self.merchants):
            if (self.shop(number) / "ledger.sqlite").exists():
                target = out / "merchants" / f"{self.name(number)}.zip"
                self.hansa(
                    "merchant", "evidence", self.shop(number) / "merchant.toml", "--out", target
                )
        return out

    def audit(self) -> str:
        """Audit everything; it must pass."""
        return self.hansa("audit", "verify", self.evidence()).stdout

    def rounds(self, run: subprocess.Popen[str], wanted: int, seconds: float = 120) -> None:
        """Wait until a run has finished so many rounds."""

        def reached() -> bool:
            found = self.status()["run"]
            begun = found is not None and found["run"] == self.runs[run.pid]
            return run.poll() is not None or (begun and found["round"] >= wanted)

        until(reached, seconds, f"round {wanted}")
        assert run.poll() is None, run.communicate()[0]

    def down(self) -> None:
        """End every process that was started."""
        shops = [self.shop(number) for number in range(self.merchants)]
        joined = [shop for shop in shops if (shop / "run").is_dir()]
        if joined:
            self.hansa("merchant", "leave", *joined, code=None)
        if (self.operator / "run").is_dir():
            self.hansa("server", "stop", self.operator, code=None)
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


@contextmanager
def stack(folder: Path, merchants: int = 3) -> Iterator[Stack]:
    """Give a stack, and end all of its processes."""
    found = Stack(folder, merchants)
    try:
        yield found
    finally:
        found.down()


@contextmanager
def wired_stack(folder: Path, **contract: Any) -> Iterator[tuple[Stack, Cable]]:
    """Give four merchants that joined, the last one behind a cable; a sum needs three."""
    with stack(folder, 4) as found:
        found.make(aggregation={"min_survivors": 3}, **contract)
        found.start()
        found.enrol()
        cable = Cable(read_settings(found.operator).port)
        found.lead(3, cable.port)
        found.join()
        try:
            yield found, cable
        finally:
            cable.close()
