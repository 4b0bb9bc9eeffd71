"""`hansa merchant budget`: what was spent, what is left, and what still fits."""

import math
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.enrolment import budget_of, pinned
from clients.evidence import stored_ledger
from clients.forecast import RunSpending, Spending
from clients.merchant import Merchant, read_merchant
from common.budget import Account
from common.chain import Entry
from common.contract import Contract, read_contract
from common.identity import read_identity
from common.statements import epsilon_text
from simulations.wording import counted, number, plain

if TYPE_CHECKING:
    from rich.console import Console

SCHEMA = "hansa/budget/1"
_BAR = 40
_REFUSALS = 5


@dataclass(frozen=True)
class Books:
    """One merchant's policy and ledger, as far as a forecast needs them."""

    merchant: Merchant
    spending: Spending
    entries: list[Entry]
    contract: Contract | None

    @property
    def refusals(self) -> list[dict[str, Any]]:
        """Return what was refused, the oldest first."""
        documents = (entry.document for entry in self.entries)
        wanted = ("at", "run", "stage", "round", "attempt", "reason")
        return [
            {name: found[name] for name in wanted}
            for found in documents
            if found["kind"] == "refuse"
        ]


def run(path: Path, contract: Path | None, picture: Path | None, json: Path | None) -> None:
    """Print a merchant's budget; draw and write it where asked.

    Raises:
        PolicyError: The merchant's file, or the picture's name, cannot be used.
        ContractError: The contract cannot be used.
        LedgerError: The ledger was changed.
    """
    from rich.console import Console

    if picture is not None:
        from hansa.commands.drawings import check_picture

        check_picture(picture)
    console = Console(stderr=str(json) == "-", highlight=False)
    with console.status("composing what was spent"):
        books = open_books(path, contract)
        document = budget_document(books)
    _print(books, document, console)
    if picture is not None:
        _draw(books, document, picture)
    if json is not None:
        from hansa.commands.choose import write_json

        write_json(document, json)


def open_books(path: Path, contract: Path | None) -> Books:
    """Read a merchant's file, its ledger if there is one, and the contract, if any."""
    path = path.absolute()
    merchant = read_merchant(path)
    account, entries = Account(budget_of(merchant)), list[Entry]()
    if merchant.ledger.path.exists():
        identity = read_identity(merchant.merchant.id, merchant.merchant.key)
        stored = stored_ledger(merchant, identity)
        account, entries = stored.account, stored.entries
    beside = pinned(path.parent, "contract.toml")
    chosen = contract or (beside if beside.is_file() else None)
    agreed = None if chosen is None else read_contract(chosen)
    return Books(merchant, Spending(account, time.time()), entries, agreed)


def budget_document(books: Books) -> dict[str, Any]:
    """Return the budget for machines."""
    spending, contract = books.spending, books.contract
    budget = spending.account.budget
    server = None
    if budget.towards_server is not None:
        server = {
            "cap": budget.towards_server,
            "epsilon": spending.epsilon(spending.counted, "server"),
        }
    fits = None
    if contract is not None:
        fits = {
            "contract": contract.sha256,
            "runs": spending.runs_left(contract),
            "rounds": spending.rounds_left(contract),
        }
    return {
        "schema": SCHEMA,
        "merchant": books.merchant.merchant.id,
        "cap": budget.epsilon,
        "delta": budget.delta,
        "refresh_days": budget.refresh_days,
        "epsilon": spending.epsilon(spending.counted),
        "left": spending.left(),
        "lifetime": spending.epsilon(spending.charged),
        "towards_server": server,
        "purposes": {
            stage: {"epsilon": value, "cap": dict(budget.purposes).get(stage)}
            for stage, value in spending.purposes().items()
        },
        "fits": fits,
        "runs": [asdict(own) for own in spending.runs()],
        "refusals": books.refusals,
    }


def _print(books: Books, document: dict[str, Any], console: "Console") -> None:
    for line in _lines(document):
        console.print(line, markup=False, soft_wrap=True)
    if document["runs"]:
        _show_runs(console, books.spending.runs())
        _show_purposes(console, document["purposes"])
    for line in _cautions(books, document):
        console.print(line, markup=False, soft_wrap=True, style="yellow")


def _lines(document: dict[str, Any]) -> list[str]:
    cap, spent = document["cap"], document["epsilon"]
    filled = min(math.ceil(_BAR * spent / cap), _BAR if spent >= cap else _BAR - 1)
    lines = [
        f"{document['merchant']}: epsilon {epsilon_text(spent)} of {epsilon_text(cap)} spent, at "
        f"delta {document['delta']:.3g}",
        f"[{'#' * filled}{'.' * (_BAR - filled)}]",
        f"left: epsilon {floor_text(document['left'])} for one further release (epsilons do not "
        "add up)",
    ]
    if fits := document["fits"]:
        lines.append(
            f"under contract {fits['contract'][:16]} this pays for "
            f"{counted(fits['runs'], 'further run')}, or for "
            f"{counted(fits['rounds'], 'training round')} alone"
        )
    else:
        lines.append("add --contract to see how many runs and rounds of it fit")
    if server := document["towards_server"]:
        lines.append(
            f"towards the server: epsilon {epsilon_text(server['epsilon'])} of "
            f"{epsilon_text(server['cap'])} spent"
        )
    if not document["runs"]:
        lines.append("nothing was ever charged")
    return lines


def _show_runs(console: "Console", runs: list[RunSpending]) -> None:
    from hansa.commands.tables import Column, show

    words = [Column(heading, figures=False) for heading in ("Run", "Contract", "Date", "State")]
    figures = [Column(heading) for heading in ("Reserved", "Released", "Counts")]
    rows = [
        (
            plain(own.run, 16),
            own.contract[:8],
            moment(own.at)[:10],
            own.state,
            epsilon_text(own.reserved),
            epsilon_text(own.released),
            "0" if own.state == "expired" else epsilon_text(own.charged),
        )
        for own in runs
    ]
    show(console, "Runs: epsilon of each alone", [*words, *figures], rows)


def _show_purposes(console: "Console", purposes: dict[str, dict[str, float | None]]) -> None:
    from hansa.commands.tables import Column, show

    columns = [Column("Purpose", figures=False), Column("Epsilon"), Column("Cap of its own")]
    rows = [
        (
            plain(stage, 20),
            epsilon_text(found["epsilon"] or 0.0),
            "none" if found["cap"] is None else epsilon_text(found["cap"]),
        )
        for stage, found in purposes.items()
    ]
    show(console, "Purposes: epsilon of each alone", columns, rows)


def _cautions(books: Books, document: dict[str, Any]) -> list[str]:
    """Say what a person should do something about, or should not forget."""
    lines = []
    if not books.merchant.ledger.path.exists():
        lines.append(
            f"There is no ledger at {plain(str(books.merchant.ledger.path))} yet. If you took part "
            "in a run before, it was moved or lost: find it before you join another."
        )
    if document["refresh_days"] is not None:
        lines.append(
            f"A run counts for {number(document['refresh_days'])} days. Customers who stay are "
            f"exposed to all of them: their lifetime epsilon is "
            f"{epsilon_text(document['lifetime'])}."
        )
    for own in document["runs"]:
        if own["state"] == "reserved":
            lines.append(
                f"Run {plain(own['run'], 40)} holds all that it reserved. If it broke off, free "
                "what it never released: hansa merchant settle"
            )
        if own["state"] == "finished":
            lines.append(
                f"Run {plain(own['run'], 40)} is over. The next run settles it; until then an "
                "audit counts all that it reserved."
            )
    refusals = document["refusals"]
    if refusals:
        lines.append(f"{counted(len(refusals), 'refusal')}; the last:")
        lines += [
            f"  {moment(found['at'])}  {plain(found['run'], 20)}: {plain(found['reason'], 200)}"
            for found in refusals[-_REFUSALS:]
        ]
    return lines


def _draw(books: Books, document: dict[str, Any], picture: Path) -> None:
    from hansa.commands.drawings import write_budget

    bars = [("everything", document["epsilon"])]
    bars += [
        (f"run {own.run[:8]}", own.charged)
        for own in books.spending.runs()[-6:]
        if own.state != "expired"
    ]
    bars += [(stage, found["epsilon"]) for stage, found in document["purposes"].items()]
    write_budget(bars, document["cap"], f"Budget of {document['merchant']}", picture)


def moment(seconds: float) -> str:
    """Write a time, UTC, to the minute.

    >>> moment(0.0)
    '1970-01-01 00:00'
    """
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


def floor_text(value: float) -> str:
    """Write an epsilon that may still be spent: rounded down, unlike one that was.

    >>> floor_text(0.123987), floor_text(3.0), floor_text(0.0)
    ('0.1239', '3', '0')
    """
    if value <= 0:
        return "0"
    step = 10.0 ** (3 - math.floor(math.log10(value)))
    return epsilon_text(math.floor(round(value * step, 6)) / step)
