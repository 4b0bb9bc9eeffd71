"""Tests of the verdict, its JSON and the command."""

import json
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import typer
from typer.testing import CliRunner

from audit.bench import Check
from audit.empirical import Empirical, document_of, empirical_audit
from audit.one_run import Bound, OneRun
from benchmarks.audit_faults import DISTRIBUTED, FAULTS, audited, contract_of
from common.contract import contract_toml
from common.errors import ContractError
from hansa.commands.empirical import empirical
from simulations.audited import RealSubject

GOOD = Check("noise", 1.0, 1.0, 0.5, True, "well.")
RUN = OneRun(1000, 0.95, Bound(1.3, 0.9, 200, 150), 3.9, 60)
AUDIT = Empirical(DISTRIBUTED, (GOOD,), RUN, False, (1.0, 2.0))
SMALL = contract_of(
    model={"family": "linear"}, training={"rounds": 4}, publication={"profiles": False}
)


class TestVerdict:
    """Empirical.verdict and .failures."""

    def test_pass(self) -> None:
        """All tests passed and the bound is below the claim."""
        assert AUDIT.verdict == "PASS"
        assert AUDIT.failures == ()

    def test_a_test_failed(self) -> None:
        """One failed test is enough, whatever the canaries say."""
        bad = Check("noise", 0.5, 1.0, 0.0, False, "too little.")
        found = replace(AUDIT, checks=(GOOD, bad))
        assert found.verdict == "FAIL"
        assert found.failures == ("noise: too little.",)

    def test_canaries_refute(self) -> None:
        """A bound above the claim is enough, whatever the tests say."""
        found = replace(AUDIT, one_run=replace(RUN, bound=Bound(8.2, 5.0, 1000, 1000)))
        assert found.verdict == "FAIL"
        assert "at least 8.2" in found.failures[0]

    def test_ledger_paid_more(self) -> None:
        """A training that was charged more than is claimed fails."""
        assert replace(AUDIT, one_run=replace(RUN, charged=4.2)).verdict == "FAIL"

    def test_mechanism_only(self) -> None:
        """Without canaries there is a verdict and no bound."""
        found = replace(AUDIT, one_run=None)
        assert found.verdict == "PASS"
        assert document_of(found)["lower_bound"] is None


class TestDocument:
    """document_of."""

    def test_holds_what_is_promised(self) -> None:
        """Claim, bound, confidence, every test and the verdict are there, as JSON."""
        document = json.loads(json.dumps(document_of(AUDIT), allow_nan=False))
        assert document["claimed_epsilon"] == 4.0
        assert document["lower_bound"] == 1.3
        assert document["confidence"] == 0.95
        assert document["verdict"] == "PASS"
        assert [row["name"] for row in document["mechanism_tests"]] == ["noise"]
        assert "never that it is right" in document["limits"][0]

    @pytest.mark.parametrize("one_run", [RUN, None], ids=["canaries", "quick"])
    def test_keeps_its_schema(self, one_run: OneRun | None) -> None:
        """With and without a training."""
        path = files("hansa") / "schemas" / "empirical.schema.json"
        jsonschema.validate(
            document_of(replace(AUDIT, one_run=one_run)), json.loads(path.read_text())
        )

    def test_says_that_noise_was_seeded(self) -> None:
        """A repeatable audit did not test the real source."""
        limits = document_of(replace(AUDIT, seeded=True))["limits"]
        assert any("source of noise was not tested" in limit for limit in limits)


class TestCommand:
    """hansa audit empirical."""

    APP = typer.Typer()
    APP.command()(empirical)

    @pytest.mark.slow
    def test_quick(self, tmp_path: Path) -> None:
        """It prints and writes the verdict, and leaves nothing beside the JSON."""
        (tmp_path / "contract.toml").write_text(contract_toml(SMALL), encoding="utf-8")
        target = tmp_path / "audit.json"
        arguments = [str(tmp_path / "contract.toml"), "--quick", "--json", str(target)]
        done = CliRunner().invoke(self.APP, [*arguments, "--epsilon", "2", "--seed", "3"])
        assert done.exit_code == 0, done.output
        assert "PASS" in done.output
        document = json.loads(target.read_text(encoding="utf-8"))
        assert document["claimed_epsilon"] == 2.0
        rows = document["mechanism_tests"]
        assert len({row["name"] for row in rows}) == len(rows)
        assert sum(row["false_alarm_rate"] for row in rows) <= document["false_alarm_rate"]
        assert {path.name for path in tmp_path.iterdir()} == {"contract.toml", "audit.json"}

    def test_contract_and_merchant(self, tmp_path: Path) -> None:
        """Only one of them can say which contract it is."""
        done = CliRunner().invoke(
            self.APP, [str(tmp_path / "c"), "--merchant", str(tmp_path / "m")]
        )
        assert isinstance(done.exception, ContractError)

    def test_too_few_canaries(self) -> None:
        """Ten canaries show nothing."""
        assert CliRunner().invoke(self.APP, ["--canaries", "10"]).exit_code == 2

    @pytest.mark.slow
    def test_fail(self) -> None:
        """A planted fault ends in FAIL and exit code 1."""
        with FAULTS[0].plant():
            done = CliRunner().invoke(self.APP, ["--quick"])
        assert done.exit_code == 1
        assert "FAIL" in done.output


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 8.0])
def test_whole_verdict(epsilon: float) -> None:
    """The code as it is passes both layers."""
    found = audited(contract_of(epsilon), whole=True)
    assert found.verdict == "PASS", found.failures
    assert found.one_run is not None


@pytest.mark.slow
def test_stages_are_told() -> None:
    """Who waits is told what for."""
    told: list[str] = []
    with RealSubject() as subject:
        empirical_audit(subject, SMALL, 100, seed=2, on_stage=told.append)
    assert told == ["testing the mechanism", "training with canaries"]


def test_audit_needs_no_torch() -> None:
    """The audit's own modules import neither torch nor the rooms that it audits."""
    for name in ("audit.mechanism", "audit.one_run", "audit.empirical"):
        assert "torch" not in vars(sys.modules[name])
