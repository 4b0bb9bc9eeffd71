"""Audits made by hand, for the tests of the report."""

import math
from dataclasses import replace
from typing import Any

from audit.findings import Audit, AuditedRun, Finding, Spending
from audit.person import composed, epsilon_of

DAY = 86_400.0
BEGAN = 1_789_000_000.0
CODE = "c0de" * 16
EVENTS: tuple[dict[str, Any], ...] = (
    {"kind": "gaussian-sum", "noise_multiplier": 26.4, "sensitivity": 1.0, "count": 3},
    {"kind": "gaussian-sum", "noise_multiplier": 30.73, "sensitivity": 2.0, "count": 186},
    {"kind": "gaussian-sum", "noise_multiplier": 37.3, "sensitivity": 1.0, "count": 21},
)
CONTRACT: dict[str, Any] = {
    "format": 1,
    "federation": {"name": "North Sea shops", "version": 2, "min_merchants": 20},
    "features": [
        {"name": "recency_days", "kind": "number", "low": 0, "high": 270},
        {"name": "spend", "kind": "number", "low": 0, "high": 5000},
        {"name": "member", "kind": "flag"},
    ],
    "training": {"mode": "distributed", "rounds": 60},
    "privacy": {"epsilon": 1.0, "delta": 1e-5, "clip_norm": 2.0},
    "aggregation": {"secure": True, "min_survivors": 18, "colluders": 0},
}
PRIVACY: dict[str, Any] = {
    "format": "hansa/privacy/1",
    "epsilon": 0.9812,
    "delta": 1e-5,
    "epsilon_towards_server": 0.9812,
    "noise_contributors": 18,
    "achieved": {"epsilon": 0.9301, "survivors_min": 18, "survivors_max": 20},
    "colluders": [
        {"colluders": 0, "epsilon": 0.9301},
        {"colluders": 1, "epsilon": 0.9577},
        {"colluders": 5, "epsilon": 1.1204},
        {"colluders": 18, "epsilon": None},
    ],
    "epsilon_by_stage": {"census": 0.11, "update": 0.91, "evaluation": 0.21, "profile": 0.16},
    "events": {"census": [EVENTS[0]], "update": [EVENTS[1]], "evaluation": [EVENTS[2]]},
    "notes": ["The sums of this run were masked: the coordinator saw sums only."],
}
FILING = {
    "product": {
        "name": "North Sea segments",
        "description": "A model that tells customers of 20 shops apart by what they may spend.",
        "intended_use": "Newsletters; not prices, and not credit.",
        "region": "European Union",
        "sector": "technology",
        "publication_date": "2026-11-02",
        "justification": "The data protection officers chose epsilon 2 for ever.",
        "utility": "Accuracy 0.587, noisy, on held-out customers.",
        "tuning": "Defaults; no search on customers.",
        "further_releases": "Monthly, within the cap.",
        "data_source": "dynamic",
    },
    "controller": {
        "name": "North Sea Retail Association",
        "contact": "privacy@example.org",
        "kind": "Industry",
        "officer": "J. Hanse",
    },
    "processing": {
        "purposes": "Offers that fit",
        "lawful_basis": "Article 6(1)(f): direct marketing to own customers",
        "people": "Customers of the 20 shops",
        "data": "Sums over purchases of the last nine months",
        "recipients": "The 20 shops",
        "third_countries": "None",
        "retention": "Rows: as in each shop; model: 24 months",
        "security": "Access by two people of each shop",
        "rights": "Objection in the account settings",
        "automated_decisions": "None",
    },
    "registry": {"authors": "J. Hanse", "sources": "Internal report 12"},
}
EMPIRICAL: dict[str, Any] = {
    "claimed_epsilon": 0.9812,
    "lower_bound": 0.412,
    "confidence": 0.95,
    "verdict": "PASS",
    "failures": [],
    "canaries": 1000,
    "seeded": False,
    "limits": ["An audit gives a lower bound; generated customers were used."],
    "mechanism_tests": [
        {
            "name": name,
            "passed": True,
            "statistic": 1.0003,
            "expected": 1.0,
            "p_value": 0.41,
            "sentence": "One merchant's noise is 1.0003 of what is accounted for.",
        }
        for name in (
            "update: noise scale",
            "update: noise shape",
            "update: fresh noise",
            "update: merchants apart",
            "update: sensitivity",
            "ring: sums",
        )
    ],
}


def spending(merchant: str = "shop-01", scale: float = 1.0) -> Spending:
    """Return what one merchant spent in three runs."""
    runs = ("3f0a9c11d2e4b587", "88b1e0d4c7a29f36", "c4d2a7f09e6b1835")
    events = tuple(
        {**event, "noise_multiplier": event["noise_multiplier"] / scale} for event in EVENTS
    )
    mu = composed(events)
    assert mu is not None
    told = [float(epsilon_of(mu * math.sqrt(n / 3), 1e-5) or 0.0) for n in (1, 2, 3)]
    return Spending(
        merchant=merchant,
        delta=1e-5,
        cap=2.0,
        refresh_days=None,
        lifetime=told[-1],
        by_run=dict.fromkeys(runs, told[0]),
        by_purpose={"census": 0.2, "update": 1.62, "evaluation": 0.38, "profile": 0.3},
        timeline=tuple(
            (BEGAN + 30 * DAY * place, run, epsilon)
            for place, (run, epsilon) in enumerate(zip(runs, told, strict=True))
        ),
        opinions={
            "privacy-loss distributions": told[-1] * 1.0008,
            "Opacus PRV": told[-1] + 0.01,
            "RDP": told[-1] * 1.19,
        },
        events=events,
        refusals=((BEGAN + 95 * DAY, "d00d", "the cap of 2 would be passed: 2.11"),),
    )


def run(name: str = "c4d2a7f09e6b1835") -> AuditedRun:
    """Return one run of 20 merchants."""
    merchants = tuple(f"shop-{number:02}" for number in range(1, 21))
    return AuditedRun(
        run=name,
        contract=CONTRACT,
        contract_sha256="ab12" * 16,
        began_at=BEGAN + 60 * DAY,
        merchants=merchants,
        finished=True,
        privacy=PRIVACY,
        recomputed=0.98135,
        opinions={"Opacus PRV": 0.9912, "RDP": "no opinion: sampled events only"},
        replayed=True,
        fewest=18,
        matched=merchants[:3],
    )


def evidence(name: str, kind: str = "merchant") -> dict[str, Any]:
    """Return one piece of evidence."""
    return {
        "name": name,
        "kind": kind,
        "made_at": BEGAN + 100 * DAY,
        "hansa": "0.1.0",
        "code": CODE,
        "key": "5a" * 32,
        "head": f"{'5a' * 32}:412:{'b7' * 32}",
        "files": {"ledger.jsonl": "ee" * 32, "witness.jsonl": "ff" * 32},
    }


def audit() -> Audit:
    """Return an audit that passes, with a warning and a note."""
    return Audit(
        evidence=(evidence("coordinator", "server"), evidence("shop-01"), evidence("shop-02")),
        findings=(
            Finding(
                "run-unknown-to-server",
                "warning",
                "run c4d2a7f0",
                "17 merchants gave no evidence of it",
            ),
            Finding("no-evidence-of-merchant", "note", "shop-04", "gave no evidence"),
        ),
        spending=(spending(), spending("shop-02", 0.7), spending("shop-03", 0.55)),
        runs=(run("3f0a9c11d2e4b587"), run("88b1e0d4c7a29f36"), run()),
        checks={
            "ledger entries": 612,
            "heads countersigned": 9,
            "heads in the witness's log": 9,
            "releases": 540,
            "sums replayed": 70,
        },
    )


def failing() -> Audit:
    """Return an audit that fails for two reasons, with a merchant above its cap."""
    over = replace(spending("shop-02", 1.4), refresh_days=365.0)
    return replace(
        audit(),
        findings=(
            *audit().findings,
            Finding(
                "cap-exceeded",
                "fail",
                "shop-02, entry 412",
                "The ledger charges epsilon 2.526 within 365 days; the policy allows 2",
            ),
            Finding(
                "chain-broken",
                "fail",
                "shop-03, entry 97",
                "The link is not the hash of the entry before it: an entry was changed or removed",
            ),
        ),
        spending=(spending(), over, spending("shop-03", 0.55)),
    )
