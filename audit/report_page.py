"""An audit's report as one self-contained HTML page, made from its JSON document alone.

The page asks for nothing from anywhere: style and pictures are in the file, there is no script,
and a content security policy forbids the rest. Names and messages come from strangers: Jinja2
escapes every value, and control characters are stripped once more on their way into the page.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from audit.filing import MISSING
from audit.plain import Measure, shown_epsilon, size, words
from audit.report_pictures import budget_picture
from common import statements

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_ROWS = 200  # of a table
MOST_PICTURES = 12
MOST_RUNS = 40  # told one by one
MOST_NAMES = 12  # of merchants in a line

Report = Mapping[str, Any]


def report_html(document: Report) -> str:
    """Return the page of a document that `report_document` made."""
    template = _environment().get_template("audit.html.j2")
    return template.render(
        report=document,
        title=_title(document),
        worst=document["findings"][:3] if document["counts"]["fail"] else [],
        odds=_odds(document),
        pictures=_pictures(document),
        accountants=_accountants(document["merchants"]),
        silent=_silent(document["merchants"]),
        groups=_alike(document["merchants"], _charged),
        unfiled=_unfiled(document),
        missing=MISSING,
        most=MOST_ROWS,
        most_runs=MOST_RUNS,
    )


def _title(document: Report) -> str:
    """Name what was audited: as filed, or as the contracts call it."""
    filed = document["filing"].get("product", {}).get("name")
    federations = dict.fromkeys(run["federation"] for run in document["runs"] if run["federation"])
    return filed or ", ".join(list(federations)[:3]) or "Private learning"


def _odds(document: Report) -> str:
    """Say in plain words what the largest lifetime epsilon means."""
    told = [
        m for m in document["merchants"] if m["lifetime"] is not None and 0 < (m["delta"] or 0) < 1
    ]
    if not told:
        return ""
    worst = max(told, key=lambda m: size(m["lifetime"]))
    return statements.odds_statement(size(worst["lifetime"]), worst["delta"])


def _pictures(document: Report) -> list[dict[str, Any]]:
    """Draw the budgets of the merchants that spent most, one picture for those that are alike."""
    groups = _alike(document["merchants"], _spent)[:MOST_PICTURES]
    drawn = [{**group, "picture": budget_picture(group["merchant"])} for group in groups]
    return [group for group in drawn if group["picture"]]


def _spent(merchant: Report) -> list[Any]:
    days = [(p["at"] or "")[:10] for p in merchant["timeline"]]
    told = [[p["run"], p["epsilon"]] for p in merchant["timeline"]]
    reasons = [refusal["reason"] for refusal in merchant["refusals"]]
    caps = [merchant[name] for name in ("cap", "refresh_days", "delta", "lifetime")]
    return [days, told, reasons, caps, merchant["by_run"], merchant["by_purpose"]]


def _charged(merchant: Report) -> list[Any]:
    return [merchant["events"], merchant["delta"]]


def _accountants(merchants: list[Report]) -> list[str]:
    names = (opinion["accountant"] for m in merchants for opinion in m["opinions"])
    return list(dict.fromkeys(names))[:6]


def _opinion(merchant: Report, accountant: str) -> Measure:
    told = (o["epsilon"] for o in merchant["opinions"] if o["accountant"] == accountant)
    return next(told, None)


def _silent(merchants: list[Report]) -> list[str]:
    """Tell why accountants have no opinion, each reason once."""
    told = (
        f"{opinion['accountant']}: {opinion['why']}"
        for m in merchants
        for opinion in m["opinions"]
        if opinion["why"]
    )
    return list(dict.fromkeys(told))[:MOST_NAMES]


def _alike(
    merchants: list[Report], features: Callable[[Report], list[Any]]
) -> list[dict[str, Any]]:
    """Put merchants that are alike together: in a federation most are."""
    found: dict[str, dict[str, Any]] = {}
    for merchant in merchants:
        key = json.dumps(features(merchant), sort_keys=True)
        group = found.setdefault(key, {"merchant": merchant, "names": []})
        group["names"].append(merchant["merchant"])
    return list(found.values())


def _unfiled(document: Report) -> int:
    fields = {
        field["field"]: field["filed"]
        for record in document["records"]
        for field in record["fields"]
    }
    return sum(not text for text in fields.values())


def _number(value: float | None, digits: int = 6) -> str:
    """Write a number that is no epsilon.

    >>> _number(1e-05), _number(4), _number(None), _number(12345.0)
    ('1e-5', '4', '\u2013', '12,345')
    """
    if value is None:
        return "\u2013"
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:.{digits}g}".replace("e-0", "e-").replace("e+0", "e")


def _names(names: list[str], left_out: int = 0) -> str:
    """List a few names, and how many more there are."""
    more = len(names) - MOST_NAMES + left_out if len(names) > MOST_NAMES else left_out
    shown = ", ".join(words(name, 60) for name in names[:MOST_NAMES])
    return f"{shown} and {more:,} more" if more and shown else shown


def _counted(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def _share(value: Measure, whole: Measure) -> float:
    """Return a part in percent of the whole, for a bar."""
    if not isinstance(value, int | float) or not isinstance(whole, int | float) or whole <= 0:
        return 100.0 if value is not None else 0.0
    return max(0.0, min(100.0, 100.0 * value / whole))


def _day(at: str | None) -> str:
    return at.replace("T", " ").replace("Z", " UTC") if at else "unknown time"


def _sentence(text: str) -> str:
    """Begin with a capital letter, unless with the name of a file, and end with a full stop."""
    named = any(sign in text.partition(" ")[0].rstrip(".:") for sign in "./_")
    start = text if named else text[:1].upper() + text[1:]
    return start if start.endswith((".", "!", "?")) else start + "."


def _coded(text: str) -> str:
    """Set what stands between backticks as code; everything is escaped before."""
    from markupsafe import Markup, escape

    escaped = str(escape(words(text)))
    return Markup(re.sub(r"`([^`<>]{1,80})`", r"<code>\1</code>", escaped))  # noqa: S704


@lru_cache(maxsize=1)
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: words(value, 4000) if type(value) is str else value,
    )
    environment.filters.update(
        coded=_coded,
        counted=_counted,
        day=_day,
        epsilon=shown_epsilon,
        names=_names,
        number=_number,
        opinion=_opinion,
        sentence=_sentence,
        svg=Markup,  # our own pictures, which escape the names in them
    )
    environment.globals.update(share=_share)
    return environment
