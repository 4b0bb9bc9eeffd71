"""Findings that look like real ones, for the tests of what is written about them."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from common.contract import Contract, parse_contract
from simulations.result import (
    Achieved,
    Collusion,
    Comparison,
    ComparisonRow,
    MerchantRecord,
    RoundRecord,
    SegmentRecord,
    SimulationResult,
    Spread,
)

HOSTILE = "<script>alert(1)</script>$x^{\x1b[31m\u202e[red]&\"'客"


@pytest.fixture
def shop_contract() -> Contract:
    """Hold a small contract with plain sums, four segments and one feature of each kind."""
    return parse_contract(
        {
            "federation": {"name": "Hanseatic shops", "min_merchants": 2},
            "features": [
                {"name": "spend", "high": 5000, "transform": "log1p", "unit": "EUR"},
                {"name": "purchases", "high": 200},
                {"name": "recency_days", "high": 270, "unit": "days"},
                {"name": "member", "kind": "flag"},
                {"name": "channel", "kind": "category", "categories": ["shop", "web"]},
            ],
            "segments": {
                "names": ["Lapsing", "Occasional", "Regular", "Champion"],
                "actions": ["Win back with a voucher", "", "Thank", "Invite to the club"],
            },
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
            "aggregation": {"secure": False},
        },
        source="test",
    )


@pytest.fixture
def small_result(shop_contract: Contract) -> SimulationResult:
    """Hold a run of three merchants with plain sums; one merchant refused."""
    rounds = tuple(
        RoundRecord(
            round=number,
            cohort=2,
            epsilon=0.94 * (number / 40) ** 0.5,
            accuracy=0.59 - 0.3 / number if number % 5 == 0 else None,
            accuracy_error=0.018 if number % 5 == 0 else None,
        )
        for number in range(1, 41)
    )
    return SimulationResult(
        run="2026-03-01-a1b2",
        data="complete-journey",
        contract=shop_contract,
        seed=None,
        rounds=rounds,
        merchants=(
            MerchantRecord("lubeck", 412, 0.982, 1.41, 0.581, 0.031, None),
            MerchantRecord("bremen", 1290, 0.982, 1.41, 0.602, 0.012, None),
            MerchantRecord("riga", 57, 0.0, 0.0, None, None, "its own cap of 0.5 would be passed"),
        ),
        confusion=(
            (88.2, 12.9, 3.1, -1.4),
            (25.7, 61.0, 18.4, 2.2),
            (4.9, 20.2, 55.8, 19.6),
            (0.3, 2.8, 22.5, 71.9),
        ),
        metrics={"accuracy": 0.587, "accuracy_error": 0.018, "macro_f1": 0.561},
        segments=shop_segments(),
        epsilon=0.982,
        epsilon_server=1.413,
        epsilon_recomputed=0.9818,
        epsilon_opacus=0.9918,
        achieved=Achieved(0.981, 2, 3),
        colluders=(Collusion(0, 0.981), Collusion(1, 1.3971), Collusion(2, math.inf)),
        delta=1e-5,
        spent={"census": 0.11, "update": 0.9, "evaluation": 0.21, "profile": 0.17},
        secure=False,
        bundle=Path("out/bundle"),
        seconds=8.26,
        peak_mib=611.5,
        notes=("One merchant refused, so the sums hold two merchants.",),
    )


def shop_segments() -> tuple[SegmentRecord, ...]:
    """Make four segments, the last of which is suppressed."""
    rows = [
        ("Lapsing", 0.31, 84.0, 3.1, 160.0, 0.12, "shop", "Win back with a voucher"),
        ("Occasional", 0.34, 310.0, 8.4, 71.0, 0.3, "shop", ""),
        ("Regular", 0.35, 940.0, 31.0, 18.0, 0.55, "web", "Thank"),
    ]
    segments = []
    for index, (name, share, spend, purchases, recency, member, channel, action) in enumerate(rows):
        profile: dict[str, dict[str, float | str | None]] = {
            "spend": {"typical": spend, "low": spend - 20, "high": spend + 20, "unit": "EUR"},
            "purchases": {"typical": purchases, "low": None, "high": None, "unit": ""},
            "recency_days": {"typical": recency, "low": recency - 9, "high": None, "unit": "days"},
            "member": {"typical": member, "low": None, "high": None, "unit": ""},
            "channel": {"typical": channel, "low": None, "high": None, "unit": ""},
        }
        segments.append(SegmentRecord(index, name, share, 0.014, action, profile))
    nothing: dict[str, float | str | None] = {"typical": None, "low": None, "high": None}
    empty = {name: dict(nothing) for name in segments[0].profile}
    segments.append(SegmentRecord(3, "Champion", None, None, "Invite to the club", empty))
    return tuple(segments)


@pytest.fixture
def masked_result(small_result: SimulationResult) -> SimulationResult:
    """Hold the same run with masked sums."""
    return replace(
        small_result,
        contract=small_result.contract.revised(aggregation={"secure": True}),
        merchants=tuple(
            replace(merchant, epsilon_server=merchant.epsilon, accuracy=None, accuracy_error=None)
            for merchant in small_result.merchants
        ),
        epsilon_server=small_result.epsilon,
        secure=True,
        notes=(),
    )


@pytest.fixture
def large_result(masked_result: SimulationResult) -> SimulationResult:
    """Hold a seeded, masked run of a thousand merchants, forty of which refused."""
    merchants = tuple(
        MerchantRecord(
            id=f"merchant-{index:04d}",
            customers=10 + index,
            epsilon=0.9 + index % 83 / 1000,
            epsilon_server=0.9 + index % 83 / 1000,
            accuracy=None,
            accuracy_error=None,
            refused="budget" if index % 25 == 0 else None,
        )
        for index in range(1000)
    )
    return replace(masked_result, merchants=merchants, seed=11)


@pytest.fixture
def hostile_result(small_result: SimulationResult) -> SimulationResult:
    """Hold a run in which everybody that may choose a name chose a hostile one."""
    document = small_result.contract.model_dump(mode="json")
    document["segments"]["names"] = [f"{index}{HOSTILE}" for index in range(4)]
    document["federation"]["name"] = HOSTILE
    first = small_result.merchants[0]
    segments = tuple(
        replace(segment, name=f"{segment.id}{HOSTILE}", action=HOSTILE)
        for segment in small_result.segments
    )
    return replace(
        small_result,
        run=HOSTILE,
        data=HOSTILE,
        contract=parse_contract(document, source="test"),
        merchants=(replace(first, id=HOSTILE, refused=HOSTILE), *small_result.merchants[1:]),
        segments=segments,
        notes=(HOSTILE,),
    )


@pytest.fixture
def shop_comparison() -> Comparison:
    """Hold a comparison in which private-together wins at epsilon 1, with one unknown cell."""

    def row(method: str, epsilon: float | None, *means: float) -> ComparisonRow:
        accuracy, macro_f1, auc = (Spread(mean, 0.008) for mean in means)
        sizes = tuple(Spread(means[0] + step, 0.015) for step in (-0.04, 0.0, 0.03))
        return ComparisonRow(method, epsilon, accuracy, macro_f1, auc, sizes)

    majority = row("majority", None, 0.271, 0.107, float("nan"))
    return Comparison(
        data="complete-journey",
        partition="by store",
        label="value segment of the next quarter",
        seeds=5,
        merchants=106,
        customers=4346,
        delta=1e-5,
        sizes=("under 50", "50 to 199", "200 and more"),
        rows=(
            replace(majority, by_size=(Spread(float("nan"), float("nan")), *majority.by_size[1:])),
            row("last-period", None, 0.544, 0.541, 0.704),
            row("alone", None, 0.511, 0.498, 0.756),
            row("alone", 8.0, 0.478, 0.46, 0.712),
            row("local", 1.0, 0.536, 0.52, 0.77),
            row("distributed", 0.5, 0.548, 0.541, 0.79),
            row("distributed", 1.0, 0.587, 0.58, 0.811),
            row("distributed", None, 0.599, 0.593, 0.821),
            row("pooled", None, 0.604, 0.6, 0.826),
        ),
        secure=True,
        notes=("Stores with fewer than 10 customers were left out.",),
    )
