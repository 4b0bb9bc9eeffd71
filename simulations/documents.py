"""A simulation and a comparison as JSON documents, for machines.

`hansa/schemas/simulate.schema.json` and `compare.schema.json` say what each key means. A number
that is not finite is null.
"""

import math
from pathlib import Path
from typing import Any

from simulations.result import (
    Collusion,
    Comparison,
    ComparisonRow,
    MerchantRecord,
    SimulationResult,
    Spread,
)
from simulations.wording import comparison_caution


def simulation_document(result: SimulationResult, report: Path | None = None) -> dict[str, Any]:
    """Turn a finished run into the document that `hansa simulate --json` prints."""
    return {
        "schema": "hansa/simulate/1",
        "run": result.run,
        "data": result.data,
        "seed": result.seed,
        "rounds": len(result.rounds),
        "secure": result.secure,
        "epsilon": _finite(result.epsilon),
        "epsilon_server": _finite(result.epsilon_server),
        "epsilon_recomputed": _finite(result.epsilon_recomputed),
        "epsilon_opacus": _finite(result.epsilon_opacus),
        "delta": _finite(result.delta),
        "achieved": {
            "epsilon": _finite(result.achieved.epsilon),
            "survivors_min": int(result.achieved.survivors_min),
            "survivors_max": int(result.achieved.survivors_max),
        },
        "colluders": [_collusion(collusion) for collusion in result.colluders],
        "merchants": [_merchant(merchant) for merchant in result.merchants],
        "metrics": {name: _finite(value) for name, value in result.metrics.items()},
        "bundle": str(result.bundle),
        "report": None if report is None else str(report),
        "seconds": _finite(result.seconds),
        "peak_mib": _finite(result.peak_mib),
        "notes": list(result.notes),
    }


def comparison_document(comparison: Comparison) -> dict[str, Any]:
    """Turn a comparison into the document that `hansa compare --json` prints."""
    caution = comparison_caution(comparison)
    return {
        "schema": "hansa/compare/1",
        "data": comparison.data,
        "partition": comparison.partition,
        "label": comparison.label,
        "seeds": comparison.seeds,
        "merchants": comparison.merchants,
        "customers": int(comparison.customers),
        "delta": _finite(comparison.delta),
        "secure": comparison.secure,
        "sizes": list(comparison.sizes),
        "rows": [_row(row) for row in comparison.rows],
        "notes": [*([] if caution is None else [caution.text]), *comparison.notes],
    }


def _merchant(merchant: MerchantRecord) -> dict[str, Any]:
    return {
        "id": merchant.id,
        "customers": int(merchant.customers),
        "epsilon": _finite(merchant.epsilon),
        "accuracy": _finite(merchant.accuracy),
        "refused": merchant.refused,
    }


def _collusion(collusion: Collusion) -> dict[str, Any]:
    return {"colluders": int(collusion.colluders), "epsilon": _finite(collusion.epsilon)}


def _row(row: ComparisonRow) -> dict[str, Any]:
    return {
        "method": row.method,
        "epsilon": _finite(row.epsilon),
        "accuracy": _spread(row.accuracy),
        "macro_f1": _spread(row.macro_f1),
        "auc": _spread(row.auc),
        "by_size": [_spread(spread) for spread in row.by_size],
    }


def _spread(spread: Spread) -> dict[str, float | None]:
    return {"mean": _finite(spread.mean), "sd": _finite(spread.sd)}


def _finite(value: float | None) -> float | None:
    """Return a plain float, which a numpy scalar is not; null where JSON has no word."""
    return None if value is None or not math.isfinite(value) else float(value)
