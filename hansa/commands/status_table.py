"""The picture that `hansa server status` draws of a federation."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.statements import epsilon_text
from simulations.wording import plain

_GOOD, _BAD, _SO_SO = "green", "bold red", "yellow"
_STATES = {
    "running": _GOOD,
    "finished": _GOOD,
    "takes part": _GOOD,
    "waiting": _SO_SO,
    "starting": _SO_SO,
    "stopped": _SO_SO,
    "late": _SO_SO,
    "silent": _SO_SO,
    "failed": _BAD,
    "refused": _BAD,
    "out": _BAD,
}
_LONGEST = 160  # signs of a reason
_SOON_DAYS = 30


def picture(document: Mapping[str, Any]) -> RenderableType:
    """Return services, run and merchants, one under the other."""
    parts: list[RenderableType] = [
        Text(_time(document["at"]), style="dim"),
        _services(document["services"]),
        *_certificate(document["certificate"]),
        *_run(document["run"]),
    ]
    if document["merchants"]:
        parts.append(_merchants(document["merchants"], document["run"]))
    else:
        parts.append(Text("no merchant is on the list yet: hansa server invite"))
    parts += [Text(plain(problem, 400), style=_BAD) for problem in document["problems"]]
    return Group(*parts)


def state_of_merchant(merchant: Mapping[str, Any], run: Mapping[str, Any] | None) -> str:
    """Say in a word or two how a merchant is: in the run under way, else whether it is there."""
    if not merchant["enrolled"]:
        return "not on the list"
    if run is not None and run["alive"] and merchant["state"]:
        return str(merchant["state"])
    if merchant["connected"] is None:
        return "unknown"
    return "connected" if merchant["connected"] else "not connected"


def _services(services: Mapping[str, Any]) -> RenderableType:
    if services["pid"] is None:
        return Text("services: none run; start them: hansa server start", style=_BAD)
    table = _table("Service", "State", "Restarts", "Since", "Note")
    for child in services["children"]:
        table.add_row(
            child["name"],
            _state(child["state"]),
            f"{child['restarts']:,}",
            _time(child["since"]),
            Text(plain(child["note"], _LONGEST)),
        )
    return table


def _certificate(certificate: Mapping[str, Any]) -> Iterable[RenderableType]:
    days = certificate["days_left"]
    if days is not None and days < _SOON_DAYS:
        words = f"in {days:.0f} days" if days > 0 else "already"
        text = f"the server's certificate expires {words}: hansa server rotate --tls"
        yield Text(text, style=_BAD)


def _run(run: Mapping[str, Any] | None) -> Iterable[RenderableType]:
    if run is None:
        yield Text("no run yet: hansa server run")
        return
    going = run["state"] in {"waiting", "running"}
    line = Text.assemble(
        ("run ", "bold"),
        run["run"],
        "  ",
        _state(run["state"]),
        f"  round {run['round']:,}/{run['rounds']:,}",
        f"  epsilon {epsilon_text(run['epsilon'])}",
        f"  last sum over {run['cohort']:,} merchants" if run["cohort"] else "",
    )
    yield line
    if going and not run["alive"]:
        text = "its coordinator gives no sign of life; go on with: hansa server resume"
        yield Text(text, style=_BAD)
    told = run["message"] if going else run["reason"]
    if told:
        yield Text(plain(told, 400))
    if run["bundle"]:
        yield Text(f"bundle {plain(run['bundle'])}")


def _merchants(
    merchants: Iterable[Mapping[str, Any]], run: Mapping[str, Any] | None
) -> RenderableType:
    table = _table("Merchant", "State", "Connected", "Round", "Seen", "Last error")
    for merchant in merchants:
        connected = merchant["connected"]
        table.add_row(
            Text(plain(merchant["merchant"], 40)),
            _state(state_of_merchant(merchant, run)),
            "?" if connected is None else "yes" if connected else "no",
            "" if merchant["round"] is None else f"{merchant['round']:,}",
            _time(merchant["seen_at"]),
            Text(plain(merchant["last_error"], _LONGEST)),
        )
    return table


def _table(*headings: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _state(state: str) -> Text:
    shown = plain(state, 40)
    return Text(shown, style=_STATES.get(shown, ""))


def _time(seconds: float | None) -> str:
    """Return a moment in the operator's own time."""
    if seconds is None:
        return ""
    return f"{datetime.fromtimestamp(seconds, UTC).astimezone():%Y-%m-%d %H:%M:%S}"
