"""Every kind of finding, and the notebook that an audit writes them into.

Codes are stable: scripts may compare them. docs/auditors.md says what each means and what to do.
"""

from collections import Counter
from dataclasses import dataclass, field

from audit.findings import Finding, Severity

CODES: dict[str, Severity] = {
    # evidence as such
    "evidence-invalid": "fail",
    "evidence-incomplete": "fail",
    "not-enrolled": "fail",
    "members-differ": "fail",
    "contract-differs": "fail",
    # a ledger's chain
    "ledger-unreadable": "fail",
    "chain-gap": "fail",
    "chain-broken": "fail",
    "entry-signature": "fail",
    "entry-schema": "fail",
    "ledger-foreign": "fail",
    # keys that were rotated
    "rekey-invalid": "fail",
    "rekey-missing": "fail",
    "key-given-up": "fail",
    # rules of a ledger
    "open-rule": "fail",
    "reserve-twice": "fail",
    "entry-without-reserve": "fail",
    "release-without-reserve": "fail",
    "release-after-close": "fail",
    "release-twice": "fail",
    "step-twice": "fail",
    "step-not-joined": "fail",
    "release-not-covered": "fail",
    "release-not-planned": "fail",
    "contract-switched": "fail",
    "sum-without-release": "fail",
    "close-twice": "fail",
    "expired-early": "fail",
    "cap-exceeded": "fail",
    "epsilon-differs": "fail",
    # the witness
    "countersignature-invalid": "fail",
    "not-witnessed": "fail",
    "truncated": "fail",
    "forked": "fail",
    "rolled-back": "fail",
    "anchor-missing": "fail",
    # the coordinator's record
    "record-schema": "fail",
    "record-rewritten": "fail",
    "start-differs": "fail",
    "session-differs": "fail",
    "advert-invalid": "fail",
    "below-threshold": "fail",
    "sum-differs": "fail",
    "sum-repeated": "fail",
    "replay-differs": "fail",
    "bundle-invalid": "fail",
    "bundle-differs": "fail",
    "privacy-differs": "fail",
    "published-differs": "fail",
    # both against each other
    "release-without-event": "fail",
    "release-differs": "fail",
    "survivors-overstated": "fail",
    "unknown-to-server": "fail",
    "advert-head-unknown": "fail",
    # worth a question
    "code-differs": "warning",
    "unit-differs": "warning",
    "refresh-period": "warning",
    "witness-clock": "warning",
    "witness-log-short": "warning",
    "run-unknown-to-server": "warning",
    "record-ends-early": "warning",
    "survivors-understated": "warning",
    "evidence-older": "warning",
    "contract-missing": "warning",
    "bundle-missing": "warning",
    "noise-seeded": "warning",
    # good to know
    "key-rotated": "note",
    "policy-raised": "note",
    "anchor-unknown": "note",
    "no-evidence-of-merchant": "note",
    "no-evidence-of-server": "note",
    "not-evidence": "note",
}


@dataclass
class Notebook:
    """Collects what an audit finds and how much it checked."""

    findings: list[Finding] = field(default_factory=list)
    checks: Counter[str] = field(default_factory=Counter)

    def add(self, code: str, where: str, message: str) -> None:
        """Write down a finding."""
        told = (text.encode(errors="replace").decode() for text in (where, message))
        self.findings.append(Finding(code, CODES[code], *told))

    def count(self, check: str, times: int = 1) -> None:
        """Write down that something was checked."""
        self.checks[check] += times

    def check(self, holds: bool, code: str, where: str, message: str) -> bool:
        """Write down a finding unless something holds; return whether it does."""
        if not holds:
            self.add(code, where, message)
        return holds


class Flaw(Exception):
    """Something that cannot be read or relied on, with the code of its finding."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
