"""A real federation on this machine, beside the same exchanges with Flower's defaults.

    python -m benchmarks.deployment --json FILE [--merchants 3] [--rounds 8]

Real processes, real TLS, both systems up at the same time, measured in turns. A round is one
secure sum in three exchanges (update, confirm, reveal); Flower's is three `send_and_receive` with
a client that imports torch and answers with what it got. What is measured:

- `seconds_per_round`: wall time from one finished round to the next, median; `flower_seconds_
  per_round` the same of Flower's defaults; `speedup_over_flower_defaults`: their ratio, median
  over the turns.
- `merchant_cpu_s_per_round`: CPU of all merchants' processes together, supervisors included, per
  round; `flower_merchant_cpu_s_per_round`: of all SuperNodes and what they start.
- `stage_s`, `message_ms`: a round divided by its exchanges, and a merchant's CPU by its messages.
- `operator_cpu_s_per_round`, `merchant_mib`: for the arithmetic on larger federations in
  docs/operators.md.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.flower_defaults import Defaults, flower_defaults
from common.contract import read_contract
from common.network import network_of
from server.runs import RunState, RunStore, sqlite_url
from tests.deployed.stack import Stack, free_ports, stack

_STAGES = 3
_PATIENCE_S = 6.0  # of a stage, per merchant: all of them share this machine
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20


def descendants(pids: Iterable[int]) -> set[int]:
    """Return processes and all that they started, directly or not."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        parents[int(entry.name)] = int(stat.rpartition(")")[2].split()[1])
    found, size = set(pids), -1
    while len(found) != size:
        size = len(found)
        found |= {pid for pid, parent in parents.items() if parent in found}
    return found


def cpu_s(pids: Iterable[int]) -> float:
    """Return the CPU seconds of processes, with their children that ended."""
    total = 0
    for pid in descendants(pids):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))
    return total / _TICKS


def resident_mib(pids: Iterable[int]) -> float:
    """Return the resident memory of processes; what they share is counted more than once."""
    pages = 0
    for pid in descendants(pids):
        try:
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        except OSError:
            continue
    return pages * _PAGE_MIB


def supervisor(folder: Path) -> int:
    """Return the process of a supervisor."""
    return int(json.loads((folder / "run" / "state.json").read_text())["pid"])


def one_run(found: Stack) -> dict[str, list[float]]:
    """Carry out a run; return seconds and CPU of each round but the first, which sets things up."""
    store = RunStore(sqlite_url(found.operator / "runs.sqlite"))
    merchants = [supervisor(found.shop(number)) for number in range(found.merchants)]
    operator = [supervisor(found.operator)]
    run = found.run()
    before = {row.run for row in store.rows()}
    marks: list[tuple[float, float, float]] = []
    last = 0
    while run.poll() is None:
        rows = [row for row in store.rows() if row.run not in before]
        if rows and rows[0].round > last:
            last = rows[0].round
            marks.append((time.monotonic(), cpu_s(merchants), cpu_s(operator)))
        time.sleep(0.02)
    code, printed = found.verdict(run)
    if code or store.rows()[0].state is not RunState.FINISHED:
        raise SystemExit(printed)
    steps = list(itertools.pairwise(marks))
    return {
        "seconds": [b[0] - a[0] for a, b in steps],
        "merchants": [b[1] - a[1] for a, b in steps],
        "operator": [b[2] - a[2] for a, b in steps],
    }


def flower_run(found: Defaults, rounds: int, numbers: int) -> dict[str, list[float]]:
    """Carry out a run with Flower's defaults."""
    start = cpu_s(found.nodes)
    seconds = found.run(rounds, numbers)
    return {"seconds": seconds, "merchants": [(cpu_s(found.nodes) - start) / rounds]}


def measure(merchants: int, rounds: int, turns: int, *, beside: bool) -> dict[str, Any]:
    """Measure both systems in turns."""
    with (
        tempfile.TemporaryDirectory(prefix="hansa-") as scratch,
        stack(Path(scratch) / "ours", merchants) as ours,
    ):
        patience = max(30.0, _PATIENCE_S * merchants)
        ours.up(rounds=rounds, federation={"round_timeout_s": patience})
        numbers = network_of(read_contract(ours.operator / "contract.toml")).size
        if not beside:
            return _summary(ours, [(one_run(ours), None) for _ in range(turns)])
        theirs = Stack(Path(scratch) / "theirs", merchants)
        theirs.make()
        folder = Path(scratch) / "flower"
        folder.mkdir()
        with flower_defaults(folder, theirs.operator, free_ports(merchants)) as defaults:
            flower_run(defaults, 1, numbers)
            pairs = [(one_run(ours), flower_run(defaults, 2, numbers)) for _ in range(turns)]
            return _summary(ours, pairs)


def _summary(
    ours: Stack, pairs: list[tuple[dict[str, list[float]], dict[str, list[float]] | None]]
) -> dict[str, Any]:
    def median(name: str) -> float:
        return statistics.median(value for own, _ in pairs for value in own[name])

    merchants = [supervisor(ours.shop(number)) for number in range(ours.merchants)]
    seconds, cpu = (
        median("seconds"),
        statistics.mean(value for own, _ in pairs for value in own["merchants"]),
    )
    found: dict[str, Any] = {
        "merchants": ours.merchants,
        "seconds_per_round": seconds,
        "stage_s": seconds / _STAGES,
        "merchant_cpu_s_per_round": cpu,
        "message_ms": 1000 * cpu / (_STAGES * ours.merchants),
        "operator_cpu_s_per_round": median("operator"),
        "merchant_mib": resident_mib(merchants) / ours.merchants,
    }
    theirs = [their for _, their in pairs if their is not None]
    if theirs:
        ratios = [
            statistics.median(their["seconds"]) / statistics.median(own["seconds"])
            for own, their in pairs
            if their is not None
        ]
        found |= {
            "speedup_over_flower_defaults": statistics.median(ratios),
            "speedup_min": min(ratios),
            "speedup_max": max(ratios),
            "flower_seconds_per_round": statistics.median(
                value for their in theirs for value in their["seconds"]
            ),
            "flower_merchant_cpu_s_per_round": statistics.mean(
                their["merchants"][0] for their in theirs
            ),
        }
    return found


def main() -> None:
    """Measure, print, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--merchants", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--alone", action="store_true", help="without Flower's defaults beside it")
    chosen = parser.parse_args()
    found = measure(chosen.merchants, chosen.rounds, chosen.turns, beside=not chosen.alone)
    text = json.dumps(found, indent=1)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
