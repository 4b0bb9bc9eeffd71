"""Pass or fail, what that rests on, and what it does not cover."""

from collections.abc import Iterable, Mapping
from typing import Any

from audit.findings import Finding
from audit.plain import Measure, shown_epsilon, size

Report = Mapping[str, Any]

AGREEMENT = 1.02  # a second opinion above the first by more than this is worth a warning


def counts(findings: Iterable[Finding]) -> dict[str, int]:
    """Count findings by severity."""
    severities = [finding.severity for finding in findings]
    return {severity: severities.count(severity) for severity in ("fail", "warning", "note")}


def own_findings(tried: Report | None, merchants: Iterable[Report]) -> list[Finding]:
    """Return what the report itself finds: failed attacks, and its closed form."""
    return [*(_tried(tried) if tried is not None and tried["failed"] else []), *_closed(merchants)]


def _tried(tried: Report) -> list[Finding]:
    wrong = [row for row in tried["tests"] if row["passed"] is False]
    where = "hansa audit empirical"
    found = [
        Finding("mechanism-test-failed", "fail", where, f"{row['name']}: {row['sentence']}")
        for row in wrong
    ]
    if size(tried["lower_bound"]) > size(tried["claimed_epsilon"]) >= 0:
        message = (
            "An attack on the code learned more than its claimed epsilon allows: at least "
            f"{_figure(tried['lower_bound'])}, where {_figure(tried['claimed_epsilon'])} is claimed"
        )
        found.append(Finding("empirical-bound-above-claim", "fail", where, message))
    if not found:
        message = "; ".join(tried["failures"][:3]) or f"Its verdict is {tried['verdict'] or 'fail'}"
        found.append(Finding("empirical-failed", "fail", where, message))
    return found


def _figure(value: Measure) -> str:
    return "an unknown figure" if value is None else shown_epsilon(value)


def _closed(merchants: Iterable[Report]) -> list[Finding]:
    """Warn where the closed form of the listed events is well above what was recomputed."""
    return [
        Finding(
            "closed-form-differs",
            "warning",
            merchant["merchant"],
            f"The closed form of the recorded events gives a lifetime epsilon of "
            f"{shown_epsilon(merchant['closed_form'])}; the accountant of the audit found "
            f"{shown_epsilon(merchant['lifetime'])}",
        )
        for merchant in merchants
        if merchant["closed_form"] is not None
        and merchant["lifetime"] is not None
        and size(merchant["closed_form"]) > AGREEMENT * size(merchant["lifetime"])
    ]


def verdict(report: Report) -> dict[str, Any]:
    """Say pass or fail, and what that does and does not cover."""
    nothing = not (report["merchants"] or report["runs"] or report["checks"])
    failed = report["counts"]["fail"]
    outcome = "fail" if failed else "nothing" if nothing else "pass"
    headline = {
        "fail": f"{plural(failed, 'finding')} {'fails' if failed == 1 else 'fail'} this audit.",
        "nothing": "No evidence was there to check, so nothing is confirmed.",
        "pass": "Nothing was found that fails this audit.",
    }[outcome]
    return {
        "outcome": outcome,
        "passed": outcome == "pass",
        "headline": headline,
        "covers": _covers(report),
        "lacks": _lacks(report),
    }


def plural(count: int, thing: str) -> str:
    """Write a count with its noun.

    >>> plural(1, "run"), plural(1200, "run")
    ('1 run', '1,200 runs')
    """
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def every(place: Report, name: str) -> int:
    """Return how many entries a list has, with those that were left out."""
    return len(place[name]) + int(place[f"{name}_left_out"])


def _covers(report: Report) -> list[str]:
    merchants, runs, tried = every(report, "merchants"), every(report, "runs"), report["empirical"]
    told = (
        (merchants, f"{plural(merchants, 'ledger')}, recomputed from every entry"),
        (runs, f"{plural(runs, 'run')} in the coordinator's evidence"),
        (report["checks"], f"{plural(sum(report['checks'].values()), 'single check')}"),
        (tried is not None, f"{_attack(tried)} with generated customers"),
    )
    return [sentence for there, sentence in told if there]


def _attack(tried: Report | None) -> str:
    return "an attack on the code" if _attacked(tried) else "tests of the code's mechanisms"


def _attacked(tried: Report | None) -> bool:
    """Return whether a training was attacked, not only the mechanisms tested."""
    return tried is not None and tried["lower_bound"] is not None


def _lacks(report: Report) -> list[str]:
    runs, tried = report["runs"], report["empirical"]
    attacked = "" if tried is None else tried["contract_sha256"]
    contracts = {run["contract_sha256"] for run in runs}
    unmatched = sum(every(run, "matched") < every(run, "merchants") for run in runs)
    unplayed = sum(run["replayed"] is None for run in runs)
    told = (
        (not report["merchants"], "No merchant's ledger was there: what was charged is unknown."),
        (not runs, "No coordinator's evidence was there: what was asked for is unknown."),
        (
            unmatched,
            f"In {plural(unmatched, 'run')} not every merchant's own evidence was there, so that "
            "for some the coordinator's word stands alone.",
        ),
        (unplayed, f"{plural(unplayed, 'run')} could not be replayed from the recorded sums."),
        (
            tried is None,
            "The code was not attacked: no result of `hansa audit empirical` was given.",
        ),
        (
            tried is not None and not _attacked(tried),
            "No training was attacked: the result of `hansa audit empirical` has no lower bound.",
        ),
        (
            attacked and contracts and attacked not in contracts,
            "The code was attacked under another contract than that of any run here.",
        ),
    )
    return [sentence for there, sentence in told if there]
