"""The parts of a report's document, each from one value of an audit.

What is in evidence may be anything: numbers are read as numbers or not at all, texts are made
harmless, lists are cut with the number of what was left out.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from audit.advice import advice_on
from audit.findings import AuditedRun, Finding, Spending
from audit.person import composed, epsilon_of
from audit.plain import (
    MAX_NAME,
    UNBOUNDED,
    Measure,
    listed,
    mapping,
    measure,
    moment,
    number,
    sequence,
    size,
    truth,
    whole,
    words,
)

MOST = 2000  # entries of a list in the document
MOST_INNER = 200  # entries of a list within such an entry

Part = dict[str, Any]


def finding_part(finding: Finding) -> Part:
    """Return a finding with what to do about it."""
    return {
        "code": words(finding.code, MAX_NAME),
        "severity": finding.severity,
        "where": words(finding.where, MAX_NAME),
        "message": words(finding.message),
        "advice": advice_on(finding),
    }


def evidence_part(item: Mapping[str, Any], own_code: str) -> Part:
    """Return what an evidence says of itself, and whether it was made by the same code."""
    code = words(item.get("code"), MAX_NAME)
    files = [
        {"name": words(name, MAX_NAME), "sha256": words(sha256, 64)}
        for name, sha256 in mapping(item.get("files")).items()
    ]
    return {
        "name": words(item.get("name"), MAX_NAME),
        "kind": words(item.get("kind"), MAX_NAME),
        "made_at": moment(item.get("made_at")),
        "hansa": words(item.get("hansa"), MAX_NAME),
        "code": code,
        "same_code": code == own_code if code else None,
        "key": words(item.get("key"), MAX_NAME),
        "head": words(item.get("head"), 2 * MAX_NAME),
        **listed("files", files, MOST_INNER),
    }


def checks_part(checks: Mapping[str, int]) -> dict[str, int]:
    """Return what was checked how often."""
    pairs = [(words(name, MAX_NAME), whole(count) or 0) for name, count in checks.items()]
    return dict(pairs[:MOST])


def spent_most_first(spending: Iterable[Spending]) -> list[Spending]:
    """Sort merchants by how much of their cap they have used, the most first."""

    def weight(entry: Spending) -> float:
        spent, cap = size(measure(entry.lifetime)), number(entry.cap)
        return -(spent / cap if cap else spent)

    return sorted(spending, key=weight)


def merchant_part(entry: Spending) -> Part:
    """Return what a merchant spent, with the closed form of its events."""
    events = [_event(event) for event in entry.events]
    delta = number(entry.delta)
    mu = composed(events)
    return {
        "merchant": words(entry.merchant, MAX_NAME),
        "delta": delta,
        "cap": measure(entry.cap),
        "refresh_days": number(entry.refresh_days),
        "lifetime": measure(entry.lifetime),
        "mu": mu,
        "closed_form": None if mu is None else epsilon_of(mu, delta),
        "opinions": _opinions(entry.opinions),
        **listed("by_run", _named("run", entry.by_run), MOST_INNER),
        **listed("by_purpose", _named("purpose", entry.by_purpose), MOST_INNER),
        **listed("timeline", (_point(point) for point in entry.timeline), MOST),
        **listed("events", events, MOST_INNER),
        **listed("refusals", (_refusal(told) for told in entry.refusals), MOST_INNER),
    }


def _named(name: str, values: Mapping[str, float]) -> list[Part]:
    return [
        {name: words(key, MAX_NAME), "epsilon": measure(value)} for key, value in values.items()
    ]


def _point(point: tuple[float, str, float]) -> Part:
    at, run, epsilon = point
    return {"at": moment(at), "run": words(run, MAX_NAME), "epsilon": measure(epsilon)}


def _refusal(told: tuple[float, str, str]) -> Part:
    at, run, reason = told
    return {"at": moment(at), "run": words(run, MAX_NAME), "reason": words(reason)}


def _opinions(opinions: Mapping[str, float | str]) -> list[Part]:
    """Tell each accountant's epsilon, or why it has none."""
    found = []
    for accountant, opinion in list(opinions.items())[:MOST_INNER]:
        epsilon = measure(opinion)
        why = words(opinion) if isinstance(opinion, str) and epsilon is None else ""
        found.append({"accountant": words(accountant, MAX_NAME), "epsilon": epsilon, "why": why})
    return found


def _event(event: Any) -> Part:
    told = mapping(event)
    return {
        "kind": words(told.get("kind"), MAX_NAME),
        "noise_multiplier": number(told.get("noise_multiplier")),
        "sensitivity": number(told.get("sensitivity")),
        "sampling_rate": number(told.get("sampling_rate")),
        "count": whole(told.get("count")),
    }


def run_part(entry: AuditedRun) -> Part:
    """Return a run: what was agreed, asked for, claimed and recomputed."""
    contract, privacy = mapping(entry.contract), mapping(entry.privacy)
    achieved = mapping(privacy.get("achieved"))
    stages = mapping(privacy.get("events"))
    alone = mapping(privacy.get("epsilon_by_stage"))
    events = [
        {"stage": words(stage, MAX_NAME), **_event(event)}
        for stage, told in stages.items()
        for event in sequence(told)
    ]
    return {
        "run": words(entry.run, MAX_NAME),
        "contract_sha256": words(entry.contract_sha256, MAX_NAME),
        **_agreed(contract),
        "began_at": moment(entry.began_at),
        "finished": bool(entry.finished),
        **listed("merchants", (words(name, MAX_NAME) for name in entry.merchants), MOST_INNER),
        **listed("matched", (words(name, MAX_NAME) for name in entry.matched), MOST_INNER),
        "fewest": whole(entry.fewest),
        "replayed": truth(entry.replayed),
        "claimed": _claim(privacy, "epsilon"),
        "claimed_towards_server": _claim(privacy, "epsilon_towards_server"),
        "claimed_delta": number(privacy.get("delta")),
        "achieved": measure(achieved.get("epsilon")),
        "noise_contributors": whole(privacy.get("noise_contributors")),
        "recomputed": measure(entry.recomputed),
        "opinions": _opinions(entry.opinions),
        **listed("colluders", map(_colluders, sequence(privacy.get("colluders"))), MOST_INNER),
        "by_stage": _named("purpose", dict(list(alone.items())[:MOST_INNER])),
        **listed("events", events, MOST_INNER),
        **listed("notes", (words(note) for note in sequence(privacy.get("notes"))), MOST_INNER),
    }


def _claim(privacy: Mapping[Any, Any], name: str) -> Measure:
    """Read an epsilon of `privacy.json`, where null stands for one without a bound."""
    if name not in privacy:
        return None
    return UNBOUNDED if privacy[name] is None else measure(privacy[name])


def _colluders(row: Any) -> Part:
    told = mapping(row)
    return {"colluders": whole(told.get("colluders")), "epsilon": _claim(told, "epsilon")}


def _agreed(contract: Mapping[Any, Any]) -> Part:
    """Read what a report tells of a contract."""
    training, privacy = mapping(contract.get("training")), mapping(contract.get("privacy"))
    aggregation, federation = (mapping(contract.get(key)) for key in ("aggregation", "federation"))
    features = [
        words(mapping(feature).get("name"), MAX_NAME)
        for feature in sequence(contract.get("features"))
    ]
    return {
        "federation": words(federation.get("name"), MAX_NAME),
        "mode": words(training.get("mode"), MAX_NAME),
        "masked": truth(aggregation.get("secure")),
        "rounds": whole(training.get("rounds")),
        "clip_norm": number(privacy.get("clip_norm")),
        "cap": measure(privacy.get("epsilon")),
        "delta": number(privacy.get("delta")),
        "min_merchants": whole(federation.get("min_merchants")),
        "min_survivors": whole(aggregation.get("min_survivors")),
        **listed("features", features, MOST_INNER),
    }


def empirical_part(told: Mapping[str, Any] | None) -> Part | None:
    """Return what an empirical audit found, if there was one."""
    if told is None:
        return None
    claimed, bound = measure(told.get("claimed_epsilon")), measure(told.get("lower_bound"))
    tests = [_tested(mapping(row)) for row in sequence(told.get("mechanism_tests"))]
    verdict = told.get("verdict")
    return {
        "contract_sha256": words(told.get("contract_sha256"), MAX_NAME),
        "claimed_epsilon": claimed,
        "lower_bound": bound,
        "canaries": whole(told.get("canaries")),
        "seeded": truth(told.get("seeded")),
        "failures": [words(text) for text in sequence(told.get("failures"))[:MOST_INNER]],
        "limits": [words(text) for text in sequence(told.get("limits"))[:MOST_INNER]],
        "confidence": number(told.get("confidence")),
        "verdict": words(verdict, MAX_NAME),
        "failed": _has_failed(verdict, claimed, bound, tests),
        **listed("tests", sorted(tests, key=lambda row: row["passed"] is not False), MOST_INNER),
    }


def _tested(row: Mapping[Any, Any]) -> Part:
    return {
        "name": words(row.get("name"), MAX_NAME),
        "passed": truth(row.get("passed")),
        "statistic": number(row.get("statistic")),
        "expected": number(row.get("expected")),
        "p_value": number(row.get("p_value")),
        "sentence": words(row.get("sentence")),
    }


def _has_failed(verdict: Any, claimed: Measure, bound: Measure, tests: list[Part]) -> bool:
    said = words(verdict, MAX_NAME).lower()
    refuted = bound is not None and claimed is not None and size(bound) > size(claimed)
    wrong = any(row["passed"] is False for row in tests)
    return refuted or wrong or verdict is False or said.startswith(("fail", "refut"))
