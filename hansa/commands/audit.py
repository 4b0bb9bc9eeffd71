"""`hansa audit`: check evidence, recompute epsilon, write the report, attack the code."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hansa.commands.empirical import empirical

if TYPE_CHECKING:
    from rich.console import Console

    from audit.findings import Audit, Finding, Spending

app = typer.Typer(
    help="Check evidence of what was spent and published; trust nobody's word.",
    no_args_is_help=True,
)
app.command("empirical")(empirical)

SCHEMA = "hansa/audit/1"
_MOST = 40  # findings that the terminal shows
_STYLES = {"fail": "bold red", "warning": "yellow", "note": "dim"}
_OF_EPSILON = frozenset(
    {
        "cap-exceeded",
        "closed-form-differs",
        "epsilon-differs",
        "privacy-differs",
        "release-after-close",
        "release-differs",
        "release-not-covered",
        "release-not-planned",
        "release-twice",
        "release-without-event",
        "release-without-reserve",
        "unknown-to-server",
    }
)

EvidenceArgument = Annotated[
    list[Path],
    typer.Argument(help="Zip files or folders of evidence, or a folder that holds several."),
]
AnchorOption = Annotated[
    list[Path] | None,
    typer.Option(help="A file of `hansa head` lines that you kept; may be repeated."),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write it as JSON; - for the terminal.")
]


@app.command()
def verify(
    evidence: EvidenceArgument, anchor: AnchorOption = None, json: JsonOption = None
) -> None:
    """Check every signature, chain, rule and figure; hold merchants and coordinator together.

    Exit code 0: nothing fails the audit, 1: something does, 2: wrong use.
    """
    from rich.console import Console

    console = Console(stderr=str(json) == "-", highlight=False)
    audit = _audited(evidence, anchor, console)
    _tell_findings(audit, list(audit.findings), console)
    _tell_verdict(audit, console)
    if json is not None:
        _write(_document(audit), json)
    if not audit.passed:
        raise typer.Exit(1)


@app.command()
def epsilon(
    evidence: EvidenceArgument, anchor: AnchorOption = None, json: JsonOption = None
) -> None:
    """Compose the raw events anew with other accountants; flag releases without an event.

    Exit code 0: every figure holds and the evidence passes, 1: not so, 2: wrong use.
    """
    from rich.console import Console

    console = Console(stderr=str(json) == "-", highlight=False)
    audit = _audited(evidence, anchor, console)
    if audit.spending:
        _show_merchants(audit, console)
    if audit.runs:
        _show_runs(audit, console)
    chosen = [finding for finding in audit.findings if finding.code in _OF_EPSILON]
    _tell_findings(audit, chosen, console)
    if not chosen:
        _line(console, _no_such_finding(audit))
    _tell_verdict(audit, console)
    if json is not None:
        _write(_document(audit), json)
    if not audit.passed:
        raise typer.Exit(1)


@app.command()
def report(
    evidence: EvidenceArgument,
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    empirical: Annotated[
        Path | None, typer.Option(help="What `hansa audit empirical --json` wrote.")
    ] = None,
    filing: Annotated[
        Path | None, typer.Option(help="A TOML file of facts that only people know.")
    ] = None,
    anchor: AnchorOption = None,
) -> None:
    """Write the audit as a page, as JSON and as an entry for the deployment registry.

    Exit code 0: nothing fails the audit, 1: something does (it is in the report), 2: wrong use.
    """
    from rich.console import Console

    from audit.filing import read_filing
    from audit.report import report_document, write_report

    console = Console(highlight=False)
    filed = {} if filing is None else read_filing(filing)
    tried = None if empirical is None else _read_json(empirical)
    audit = _audited(evidence, anchor, console)
    document = report_document(audit, tried, filed)
    for path in write_report(document, out):
        _line(console, str(path))
    _line(console, document["verdict"]["headline"])
    if document["verdict"]["outcome"] != "pass":
        raise typer.Exit(1)


def _no_such_finding(audit: "Audit") -> str:
    """Say what it means that no finding touches epsilon; never more than was looked at."""
    if not audit.passed:
        return "no figure could be held against all of the evidence; hansa audit verify says why"
    if not audit.spending:
        return "no merchant's ledger was there: what was charged is not known"
    if not audit.runs:
        return "every release in the ledgers was charged; no coordinator's evidence was there"
    return "every release that either side tells of has its event, and its charge"


def _audited(paths: list[Path], anchors: list[Path] | None, console: "Console") -> "Audit":
    """Check the evidence.

    Raises:
        EvidenceError: There is none, or a file of anchors cannot be used.
    """
    with console.status("checking evidence"):
        from audit.verify import verify as check
        from audit.witness import read_anchors

        known = [head for path in anchors or () for head in read_anchors(path)]
        return check(paths, known)


def _tell_findings(audit: "Audit", findings: "list[Finding]", console: "Console") -> None:
    """List findings, the gravest first, each kind with what to do about it."""
    from rich.text import Text

    from audit.advice import ADVICE, advice_on
    from simulations.wording import plain

    order = list(_STYLES)
    shown = sorted(findings, key=lambda finding: order.index(finding.severity))[:_MOST]
    for place, finding in enumerate(shown):
        style = _STYLES[finding.severity]
        head = Text.assemble((f"{finding.severity.upper():<8}", style), (finding.code, "bold"))
        told = f"  {plain(finding.where, 120)}: {plain(finding.message, 400)}"
        console.print(head, Text(told), sep="", soft_wrap=True)
        last = place + 1 == len(shown) or shown[place + 1].code != finding.code
        if last and finding.code in ADVICE:
            console.print(Text(f"        {advice_on(finding)}", style="dim"), soft_wrap=True)
    if len(findings) > len(shown):
        _line(console, f"and {len(findings) - len(shown):,} more; --json has all of them")


def _tell_verdict(audit: "Audit", console: "Console") -> None:
    from simulations.wording import counted

    count = {"fail": 0, "warning": 0, "note": 0}
    for finding in audit.findings:
        count[finding.severity] += 1
    _line(
        console,
        f"checked {counted(len(audit.spending), 'ledger')} and "
        f"{counted(len(audit.runs), 'run')}: {sum(audit.checks.values()):,} single checks, "
        f"{count['fail']:,} failed, {counted(count['warning'], 'warning')}",
    )
    if audit.passed:
        _line(console, "PASS: nothing was found that fails this audit")
    else:
        verb = "fails" if count["fail"] == 1 else "fail"
        _line(console, f"FAIL: {counted(count['fail'], 'finding')} {verb} this audit")


def _show_merchants(audit: "Audit", console: "Console") -> None:
    from hansa.commands.tables import Column, show
    from simulations.wording import plain

    rows = [
        (
            plain(spent.merchant, 24),
            f"{spent.delta:.3g}",
            _figure(spent.cap),
            _figure(_own_epsilon(spent)),
            *(_figure(spent.opinions.get(name)) for name in _accountants(audit)),
        )
        for spent in audit.spending
    ]
    headings = ("Delta", "Cap", "Hansa", *_accountants(audit))
    columns = [Column("Merchant", figures=False), *map(Column, headings)]
    show(console, "Ledgers: everything ever charged", columns, rows)


def _show_runs(audit: "Audit", console: "Console") -> None:
    from hansa.commands.tables import Column, show
    from simulations.wording import plain

    rows = [
        (
            plain(run.run, 24),
            f"{run.contract['privacy']['delta']:.3g}",
            _figure(run.privacy.get("epsilon")),
            *(_figure(run.opinions.get(name)) for name in _accountants(audit)),
        )
        for run in audit.runs
    ]
    headings = ("Delta", "Published", *_accountants(audit))
    columns = [Column("Run", figures=False), *map(Column, headings)]
    show(console, "Runs: everything asked for", columns, rows)


def _accountants(audit: "Audit") -> list[str]:
    named = [spent.opinions for spent in audit.spending]
    named += [run.opinions for run in audit.runs]
    return list(dict.fromkeys(name for opinions in named for name in opinions))


def _own_epsilon(spent: "Spending") -> float | None:
    """Return what the merchant's own accountant makes of the events."""
    from common.accounting import epsilon as composed
    from common.errors import AccountingError
    from common.events import from_document

    try:
        return composed([from_document(event) for event in spent.events], spent.delta)
    except AccountingError:
        return None


def _figure(value: object) -> str:
    """Write an epsilon; a sentence in its place is why there is none."""
    from common.statements import epsilon_text

    if isinstance(value, bool) or not isinstance(value, int | float):
        return "none"
    return epsilon_text(float(value))


def _line(console: "Console", text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _document(audit: "Audit") -> dict[str, Any]:
    """Return an audit for machines."""
    return {
        "schema": SCHEMA,
        "passed": audit.passed,
        "findings": [asdict(finding) for finding in audit.findings],
        "checks": dict(sorted(audit.checks.items())),
        "evidence": list(audit.evidence),
        "ledgers": [
            {
                "merchant": spent.merchant,
                "cap": spent.cap,
                "delta": spent.delta,
                "lifetime": _finite(spent.lifetime),
                "hansa": _finite(_own_epsilon(spent)),
                "opinions": {name: _finite(said) for name, said in spent.opinions.items()},
            }
            for spent in audit.spending
        ],
        "runs": [
            {
                "run": run.run,
                "contract": run.contract_sha256,
                "delta": run.contract["privacy"]["delta"],
                "published": _finite(run.privacy.get("epsilon")),
                "recomputed": _finite(run.recomputed),
                "opinions": {name: _finite(said) for name, said in run.opinions.items()},
                "finished": run.finished,
                "replayed": run.replayed,
            }
            for run in audit.runs
        ],
    }


def _finite(value: Any) -> Any:
    """Return a value that JSON has; null for an epsilon without a bound."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write(document: dict[str, Any], path: Path) -> None:
    from hansa.commands.choose import write_json

    write_json(document, path)


def _read_json(path: Path) -> dict[str, Any]:
    """Read what `hansa audit empirical` wrote.

    Raises:
        EvidenceError: The file cannot be read, or holds something else.
    """
    import json

    from audit.empirical import KIND
    from common.errors import EvidenceError

    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EvidenceError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(document, dict) or document.get("kind") != KIND:
        raise EvidenceError(f"{path}: is not what `hansa audit empirical --json` writes")
    return document
