"""The empirical audit: tests of the mechanism, then one training with canaries, one verdict.

Both must pass. Canaries alone miss what does not help to guess them, like noise that is drawn
once and used again in every round; tests of the mechanism alone miss what comes of a whole run.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from audit.bench import FALSE_ALARM, Check
from audit.mechanism import mechanism_tests
from audit.one_run import OneRun, canaries_for, one_run_audit
from audit.subject import Subject
from common.contract import Contract
from common.versions import code_sha256, hansa_version

FORMAT = 1
KIND = "empirical audit"
LIMITS = (
    "An audit gives a lower bound: it can show that a claim is wrong, never that it is right. "
    "Generated customers were used and nobody's budget was spent."
)
SEEDED = (
    "Noise was seeded so that the audit can be repeated; the operating system's source of "
    "noise was not tested."
)

Stage = Callable[[str], None]  # told what begins


@dataclass(frozen=True)
class Empirical:
    """What an empirical audit found.

    Attributes:
        contract: The contract that was audited.
        checks: Tests of the mechanism.
        one_run: The training with canaries; None where it was left out.
        seeded: Whether the noise was repeatable.
        seconds: How long the mechanism tests took, and the whole.
    """

    contract: Contract
    checks: tuple[Check, ...]
    one_run: OneRun | None
    seeded: bool
    seconds: tuple[float, float]

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that speaks against the claim, for people."""
        found = [f"{check.name}: {check.sentence}" for check in self.checks if not check.passed]
        claimed = self.contract.privacy.epsilon
        if self.one_run is not None and self.one_run.bound.epsilon > claimed:
            found.append(
                f"canaries: epsilon is at least {self.one_run.bound.epsilon:.3g}, with confidence "
                f"{self.one_run.confidence:.0%}; claimed is {claimed:.4g}."
            )
        if self.one_run is not None and self.one_run.charged > claimed * 1.01 + 0.01:
            found.append(
                f"ledger: the training was charged epsilon {self.one_run.charged:.4g}, recomputed; "
                f"claimed is {claimed:.4g}."
            )
        return tuple(found)

    @property
    def verdict(self) -> Literal["PASS", "FAIL"]:
        """FAIL where anything speaks against the claim."""
        return "FAIL" if self.failures else "PASS"


def empirical_audit(
    subject: Subject,
    contract: Contract,
    canaries: int | None = None,
    *,
    mechanism_only: bool = False,
    seed: int | None = None,
    on_stage: Stage = lambda _: None,
) -> Empirical:
    """Audit the code that a merchant runs under a contract.

    Args:
        subject: The code.
        contract: What it claims.
        canaries: How many to plant; default 1,000, or 2,000 from epsilon 6 on.
        mechanism_only: Leave the training with canaries out.
        seed: Makes everything repeatable, the noise included.
        on_stage: Told what begins.

    Raises:
        ContractError: There is no room for so many canaries.
        HansaError: The code refused what an honest coordinator asks.
    """
    began = time.monotonic()
    on_stage("testing the mechanism")
    checks = mechanism_tests(subject, contract, seed)
    between = time.monotonic() - began
    one_run = None
    if not mechanism_only:
        on_stage("training with canaries")
        number = canaries_for(contract.privacy.epsilon) if canaries is None else canaries
        one_run = one_run_audit(subject, contract, number, seed)
    seconds = (between, time.monotonic() - began)
    return Empirical(contract, checks, one_run, seed is not None, seconds)


def document_of(audit: Empirical) -> dict[str, Any]:
    """Return what `hansa audit empirical --json` writes."""
    privacy, one_run = audit.contract.privacy, audit.one_run
    return {
        "format": FORMAT,
        "kind": KIND,
        "verdict": audit.verdict,
        "failures": list(audit.failures),
        "hansa": hansa_version(),
        "code": code_sha256(),
        "contract_sha256": audit.contract.sha256,
        "claimed_epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "lower_bound": None if one_run is None else one_run.bound.epsilon,
        "lower_bound_distribution_free": (
            None if one_run is None else one_run.bound.distribution_free
        ),
        "confidence": None if one_run is None else one_run.confidence,
        "canaries": None if one_run is None else one_run.canaries,
        "guesses": None if one_run is None else one_run.bound.guesses,
        "right_guesses": None if one_run is None else one_run.bound.right,
        "rounds": None if one_run is None else one_run.rounds,
        "charged_epsilon": None if one_run is None else one_run.charged,
        "mechanism_tests": [_row(check) for check in audit.checks],
        "false_alarm_rate": FALSE_ALARM,
        "seeded": audit.seeded,
        "seconds": {"mechanism": audit.seconds[0], "whole": audit.seconds[1]},
        "limits": [LIMITS, *([SEEDED] if audit.seeded else [])],
    }


def _row(check: Check) -> dict[str, Any]:
    return {
        "name": check.name,
        "passed": check.passed,
        "statistic": check.statistic,
        "expected": check.expected,
        "p_value": check.p_value,
        "false_alarm_rate": check.false_alarm_rate,
        "sentence": check.sentence,
    }
