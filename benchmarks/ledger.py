"""A merchant's ledger: what a charge costs, and a file of ten thousand entries.

    python -m benchmarks.ledger --json FILE

Seconds by the clock on the wall: what is measured waits for a disk. Medians, where there are
several. What is measured:

- `charge_ms`: one release: checked, signed, appended and on the disk, over the run of a default
  contract; `reserve_ms`: the same for a reservation, accounting included; `reserve_sampled_ms`
  where some sums are sampled.
- `open_10k_s`: opening a ledger of 10,000 entries, with its chain and the account of all runs;
  `verify_10k_s`: what an auditor does, every single signature included.
- `epsilon_1y_ms`: epsilon of 52 weekly runs of the default contract; `epsilon_1y_sampled_ms`:
  of a sampled contract, cold (`..._cold_ms`: a process that composed nothing yet) and warm.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from audit.ledger import check_chain
from common import accountants, accounting
from common.accounting import epsilon
from common.budget import Budget, Charge, Occasion
from common.contract import Contract, parse_contract
from common.events import Event
from common.identity import Identity
from common.ledger import Ledger, whole_run
from common.ledger_entries import read_ledger
from common.plan import Plan, plan_of
from server.witness import Witness

_ENTRIES, _WEEKS = 10_000, 52
_PLENTY = Budget(100.0, 1e-5)
_PARAMETERS = "0" * 64


def seconds(action: Callable[[], Any]) -> float:
    """Return how long an action took."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def contract_of(**training: Any) -> Contract:
    """Return a default contract, or one with another way to train."""
    document = {
        "federation": {"name": "benchmark"},
        "features": [{"name": "a"}],
        "segments": {"names": ["x", "y"]},
        "privacy": {"epsilon": 1.0, "delta": 1e-5},
        "training": training,
    }
    return parse_contract(document, source="benchmark")


class _Shop:
    """A merchant with its witness, in step."""

    def __init__(self, folder: Path) -> None:
        self._coordinator = Identity.generate("coordinator")
        self.identity = Identity.generate("shop")
        self.path = folder / "ledger.sqlite"
        self.witness = Witness(folder / "witness.sqlite", self._coordinator)
        self.ledger = self.opened()

    def opened(self) -> Ledger:
        """Open the ledger anew."""
        return Ledger(self.path, _PLENTY, self.identity, self._coordinator.public)

    @property
    def latest(self) -> bytes:
        """Return what the witness saw last."""
        return self.witness.latest(self.identity.public)

    def reserve(self, run: str, contract: Contract, charges: tuple[Charge, ...]) -> float:
        """Reserve a run; return the seconds that the ledger took."""
        occasion, known = whole_run(run, contract.sha256), self.latest
        start = time.perf_counter()
        head = self.ledger.reserve(occasion, charges, ("update", 2**30), known)
        took = time.perf_counter() - start
        self.witness.countersign({"shop": (self.identity.public, head)})
        return took

    def release(self, run: str, contract: Contract, charge: Charge, number: int) -> float:
        """Release once; return the seconds that the ledger took."""
        occasion = Occasion(run, charge.stage, number, 0, contract.sha256)
        known = self.latest
        start = time.perf_counter()
        self.ledger.release(occasion, charge, _PARAMETERS, "", known)
        return time.perf_counter() - start


def one_year(folder: Path, contract: Contract, releases: int) -> dict[str, float]:
    """Measure weekly runs of one contract: reservations and releases."""
    shop, plan = _Shop(folder), plan_of(contract)
    charges = plan.charges(contract.exposed_contributors)
    update = next(charge for charge in charges if charge.stage == "update")
    once = Charge(
        update.stage,
        replace(update.event, count=plan.update.event.count),
        replace(update.towards_server, count=plan.update.event.count),
    )
    reserved, released = [], []
    for week in range(_WEEKS):
        run = f"week {week}"
        reserved.append(shop.reserve(run, contract, charges))
        released += [shop.release(run, contract, once, number) for number in range(releases)]
    shop.ledger.close()
    return {
        "reserve_ms": 1e3 * statistics.median(reserved),
        "reserve_last_ms": 1e3 * reserved[-1],
        "charge_ms": 1e3 * statistics.median(released or [0.0]),
        "charge_max_ms": 1e3 * max(released or [0.0]),
        "entries": float(len(shop.ledger.entries())),
    }


def ten_thousand(folder: Path, repeats: int) -> dict[str, float]:
    """Measure opening and verifying a ledger of 10,000 entries."""
    shop, contract = _Shop(folder), contract_of()
    charges = plan_of(contract).charges(contract.exposed_contributors)
    with shop.ledger._transaction("OFF") as connection:  # whole runs, without waiting for a disk
        missing = _ENTRIES - len(shop.ledger._stored)
        for number in range(missing):
            run = f"run {number // 40}"
            entry = shop.ledger._reservation(whole_run(run, contract.sha256), charges[:1], ("x", 1))
            if number % 40:
                what = {"stage": "update", "round": number, "attempt": 0, "step": f"r/{number}"}
                entry = {
                    "kind": "release", "run": run, "contract": contract.sha256,
                    **charges[1].document, **what, "parameters": _PARAMETERS,
                }  # fmt: skip
            shop.ledger._append(connection, entry)
    shop.ledger.close()
    public, key = shop.identity.public, shop.identity

    def verify() -> None:
        entries = read_ledger(shop.path, _PLENTY, public).entries
        if len(entries) != _ENTRIES or check_chain(entries, key.public) is not None:
            raise SystemExit("the ledger does not verify")

    opening = [seconds(lambda: shop.opened().close()) for _ in range(repeats)]
    return {
        "verify_10k_s": statistics.median(seconds(verify) for _ in range(repeats)),
        "open_10k_s": statistics.median(opening),
        "file_bytes": float(shop.path.stat().st_size),
    }


def weekly(plan: Plan) -> list[Event]:
    """Return everything that 52 weekly runs release."""
    return list(plan.events()) * _WEEKS


def forget() -> None:
    """Empty every cache of what was composed before."""
    for module in (accountants, accounting):
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def accounted(repeats: int) -> dict[str, float]:
    """Measure epsilon of a year, in a process whose libraries are loaded."""
    plain = weekly(plan_of(contract_of()))
    sampled = weekly(plan_of(contract_of(mode="local", sampling_rate=0.05)))
    epsilon(plain, 1e-5)
    epsilon(sampled, 1e-5)
    cold = []
    for _ in range(repeats):
        forget()
        cold.append(seconds(lambda: epsilon(sampled, 1e-5)))
    warm = [seconds(lambda: epsilon(sampled, 1e-5)) for _ in range(repeats)]
    return {
        "epsilon_1y_ms": 1e3
        * statistics.median(seconds(lambda: epsilon(plain, 1e-5)) for _ in range(repeats)),
        "epsilon_1y_sampled_cold_ms": 1e3 * statistics.median(cold),
        "epsilon_1y_sampled_ms": 1e3 * statistics.median(warm),
    }


def measure(folder: Path, repeats: int) -> dict[str, Any]:
    """Measure everything and return the document that is printed."""
    places = {name: folder / name for name in ("plain", "sampled", "large")}
    for place in places.values():
        place.mkdir()
    plain = one_year(places["plain"], contract_of(), 4 * repeats)
    local = contract_of(mode="local", sampling_rate=0.05)
    sampled = one_year(places["sampled"], local, 0)
    large = ten_thousand(places["large"], repeats)
    return {
        "verify_10k_s": large["verify_10k_s"],
        "open_10k_s": large["open_10k_s"],
        "charge_ms": plain["charge_ms"],
        "reserve_ms": plain["reserve_ms"],
        "reserve_sampled_ms": sampled["reserve_ms"],
        **accounted(repeats),
        "year": plain,
        "sampled_year": sampled,
        "large": large,
        "repeats": repeats,
    }


def main() -> None:
    """Measure, and print or write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the document here, too")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the files are made, for its disk")
    choices = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=choices.folder) as folder:
        text = json.dumps(measure(Path(folder), choices.repeats), indent=2)
    if choices.json:
        choices.json.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
