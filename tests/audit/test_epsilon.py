"""Tests of the auditor's own accountant."""

import math
from types import ModuleType
from typing import Any

import pytest

import audit.epsilon
from audit.epsilon import DP_ACCOUNTING, OPACUS, OPACUS_ERROR, opinions, recompute
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

    from common import opacus_import

    def ours(module: ModuleType) -> set[str]:
        tree = ast.parse(inspect.getsource(module))
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        return {name for name in names if name and name.startswith("common")}

    assert ours(audit.epsilon) == {"common.errors", "common.opacus_import"}
    assert not ours(opacus_import)


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


def test_year_of_weekly_runs() -> None:
    """A year's ledger, run by run, is recomputed at once: equal events are merged first."""
    week = [
        GaussianSum(60.0, 2.0, 60),
        GaussianSum(40.0, 1.0, 12),
        PoissonGaussianSum(6, 1, 0.2, 60),
    ]
    year = [to_document(event) for event in week] * 52
    at_once = [{**to_document(event), "count": 52 * event.count} for event in week]
    assert recompute(year, 1e-6) == recompute(at_once[::-1], 1e-6)


class TestOpinions:
    """opinions."""

    EVENTS = (GaussianSum(8.0, 2.0, 2), PoissonGaussianSum(3.0, 2.0, 0.2, 10))

    def documents(self) -> list[dict[str, Any]]:
        """Return the events as they are stored."""
        return [to_document(event) for event in self.EVENTS]

    def test_two_libraries_agree(self) -> None:
        """Both give what the run printed, but for Opacus' error."""
        said = opinions(self.documents(), 1e-5)
        assert said[DP_ACCOUNTING] == recompute(self.documents(), 1e-5)
        assert said[OPACUS] == pytest.approx(epsilon(self.EVENTS, 1e-5), abs=OPACUS_ERROR)

    def test_nothing_costs_nothing(self) -> None:
        """No events cost nothing, in either library."""
        assert opinions([], 1e-5) == {DP_ACCOUNTING: 0.0, OPACUS: 0.0}

    @pytest.mark.parametrize("wrong", [math.nan, math.inf, -0.01])
    def test_nonsense_is_told(self, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
        """What is no epsilon is told in words; the other opinion stands."""
        monkeypatch.setattr(audit.epsilon, "_dp_accounting", lambda *_: wrong)
        said = opinions(self.documents(), 1e-5)
        assert said[DP_ACCOUNTING] == f"returned epsilon {wrong}"
        assert isinstance(said[OPACUS], float)
        with pytest.raises(AccountingError, match="the auditor has no epsilon"):
            recompute(self.documents(), 1e-5)

    def test_failure_is_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A library that raises does not stop the audit."""

        def broken(*_: Any) -> float:
            raise RuntimeError("Cannot compute epsilon")

        monkeypatch.setattr(audit.epsilon, "_opacus", broken)
        said = opinions(self.documents(), 1e-5)
        assert said[OPACUS] == "failed (RuntimeError: Cannot compute epsilon)"
        assert isinstance(said[DP_ACCOUNTING], float)

    @pytest.mark.parametrize(
        ("event", "delta", "reason"),
        [
            ({**GAUSSIAN, "noise_multiplier": 0.01}, 1e-5, "above 700"),
            ({**POISSON, "noise_multiplier": 1e4, "count": 10**8}, 1e-6, "are more than"),
            ({**POISSON, "count": 10**6}, 1e-10, "too small"),
        ],
        ids=["large", "many", "tiny"],
    )
    def test_known_limits(self, event: dict[str, Any], delta: float, reason: str) -> None:
        """Where Opacus would return nonsense, or fill the memory, it is not asked."""
        assert reason in str(opinions([event], delta)[OPACUS])

    @pytest.mark.parametrize("delta", [0.0, 1.0, math.nan])
    def test_delta(self, delta: float) -> None:
        """Delta must lie strictly between 0 and 1."""
        with pytest.raises(AccountingError, match="delta"):
            opinions([GAUSSIAN], delta)

    def test_doctored_evidence(self) -> None:
        """Evidence that cannot be read is an error, not an opinion."""
        with pytest.raises(AccountingError, match="does not know"):
            opinions([{**GAUSSIAN, "kind": "laplace"}], 1e-5)
