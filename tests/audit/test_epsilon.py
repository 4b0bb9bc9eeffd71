"""Tests of the auditor's own accountant."""

import math
from typing import Any

import pytest

from audit.epsilon import recompute
from common.accounting import epsilon
from common.errors import AccountingError
from common.events import GaussianSum, PoissonGaussianSum, to_document

GAUSSIAN = {"kind": "gaussian-sum", "noise_multiplier": 2.0, "sensitivity": 1.0, "count": 3}
POISSON = {**GAUSSIAN, "kind": "poisson-gaussian-sum", "sampling_rate": 0.3}


def test_agrees_with_closed_form() -> None:
    """For sums over all customers the auditor finds what the run printed."""
    events = [GaussianSum(8.0, 2.0, 20), GaussianSum(12.0, 1.0, 2)]
    printed = epsilon(events, 1e-6)
    assert recompute(map(to_document, events), 1e-6) == pytest.approx(printed, rel=1e-3)


def test_agrees_on_sampled_sums() -> None:
    """For sampled sums the auditor finds what the run printed, within Opacus' error."""
    events = [GaussianSum(8.0, 2.0), PoissonGaussianSum(3.0, 2.0, 0.2, 10)]
    printed = epsilon(events, 1e-5)
    assert recompute(map(to_document, events), 1e-5) == pytest.approx(printed, abs=0.021)


def test_nothing_costs_nothing() -> None:
    """No events, or events applied zero times, have epsilon 0."""
    assert recompute([], 1e-5) == 0.0
    assert recompute([{**GAUSSIAN, "count": 0}], 1e-5) == 0.0


def test_uses_none_of_our_accounting() -> None:
    """A fault in `common.accounting` cannot hide in the audit: it is not imported."""
    import ast
    import inspect

    import audit.epsilon

    tree = ast.parse(inspect.getsource(audit.epsilon))
    names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {n for n in names if n and n.startswith("common")} - {"common.errors"}


@pytest.mark.parametrize("kind", ["laplace", None, ["gaussian-sum"]])
def test_unknown_kind(kind: Any) -> None:
    """An event that the auditor does not know is an error, not zero."""
    with pytest.raises(AccountingError, match="does not know"):
        recompute([{**GAUSSIAN, "kind": kind}], 1e-5)


@pytest.mark.parametrize("event", [GAUSSIAN, POISSON], ids=["gaussian", "poisson"])
@pytest.mark.parametrize("value", [None, "2", True, math.nan, math.inf, -1])
def test_doctored_evidence(event: dict[str, Any], value: Any) -> None:
    """A missing, mistyped or impossible number is named, in every field that counts."""
    for name in set(event) - {"kind", "sensitivity"}:
        with pytest.raises(AccountingError, match=name):
            recompute([{**event, name: value}], 1e-5)


@pytest.mark.parametrize(("name", "value"), [("count", 1.5), ("sampling_rate", 1.1)])
def test_impossible_numbers(name: str, value: float) -> None:
    """Half an application and a chance above one are refused."""
    with pytest.raises(AccountingError, match=name):
        recompute([{**POISSON, name: value}], 1e-5)
