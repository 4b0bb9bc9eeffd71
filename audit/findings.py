"""What an audit found, as values that reports and commands only read."""

from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["fail", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """One thing that an auditor should know."""

    code: str  # stable, like "chain-broken"; docs/auditors.md lists all of them
    severity: Severity
    where: str  # evidence, file, entry
    message: str  # for people: what was found, what was expected, what it means


@dataclass(frozen=True)
class Spending:
    """What one merchant's ledger says was spent, recomputed by the auditor."""

    merchant: str
    delta: float  # of the merchant's policy, at which all of this is told
    cap: float
    refresh_days: float | None
    lifetime: float  # epsilon of everything that was ever charged
    by_run: dict[str, float]  # run -> epsilon of what it charged
    by_purpose: dict[str, float]  # stage -> epsilon
    timeline: tuple[tuple[float, str, float], ...]  # (seconds since 1970, run, lifetime epsilon)
    opinions: dict[str, float | str]  # accountant -> lifetime epsilon, or why it has none
    events: tuple[dict[str, Any], ...]  # of everything charged, alike ones merged
    refusals: tuple[tuple[float, str, str], ...]  # (time, run, reason)


@dataclass(frozen=True)
class AuditedRun:
    """One run, as the coordinator's evidence tells it."""

    run: str
    contract: dict[str, Any]  # the contract's document
    contract_sha256: str
    began_at: float
    merchants: tuple[str, ...]
    finished: bool
    privacy: dict[str, Any]  # the bundle's privacy.json; empty if there is none
    recomputed: float | None  # epsilon of everything asked for, at the contract's delta
    opinions: dict[str, float | str]
    replayed: bool | None  # the recorded sums give the published model; None: not checkable
    fewest: int | None  # merchants in the smallest sum
    matched: tuple[str, ...]  # merchants whose own evidence was held against the run's record


@dataclass(frozen=True)
class Audit:
    """Everything that an audit of some evidence found."""

    evidence: tuple[dict[str, Any], ...]  # name, kind, made_at, hansa, code, files of each
    findings: tuple[Finding, ...]
    spending: tuple[Spending, ...] = ()
    runs: tuple[AuditedRun, ...] = ()
    checks: dict[str, int] = field(default_factory=dict)  # what was checked -> how often

    @property
    def passed(self) -> bool:
        """Tell whether nothing was found that fails an audit."""
        return not any(finding.severity == "fail" for finding in self.findings)
