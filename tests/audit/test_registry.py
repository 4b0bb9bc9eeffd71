"""The entry for the OpenDP deployment registry."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from audit.filing import FIELDS
from audit.registry import TO_BE_FILLED, registry_entry, registry_gaps, registry_yaml
from audit.report import report_document
from tests.audit.audits import BEGAN, EMPIRICAL, FILING, audit, failing, run, spending

SCHEMA = json.loads(
    (Path(__file__).parent / "opendp-deployments.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft7Validator(
    SCHEMA, format_checker=jsonschema.Draft7Validator.FORMAT_CHECKER
)


def _errors(entry: Any) -> list[str]:
    return [
        f"{'.'.join(map(str, error.path))}: {error.message}"
        for error in VALIDATOR.iter_errors(entry)
    ]


def _full() -> dict[str, Any]:
    return report_document(audit(), EMPIRICAL, FILING, BEGAN)


class TestEntry:
    """What the registry is given."""

    def test_fits_the_registry(self) -> None:
        """With everything filed the entry is valid and nothing is left to fill in."""
        entry = registry_entry(_full())
        assert _errors(entry) == []
        assert registry_gaps(_full()) == []
        assert entry["deployment"]["basic"]["data_product_sector"] == "Technology"
        assert entry["deployment"]["deployment_model"]["data_source_type"] == "Dynamic"

    def test_the_schema_would_notice(self) -> None:
        """The copied schema refuses a wrong word, a wrong date and an unknown key."""
        entry = registry_entry(_full())
        entry["deployment"]["basic"]["publication_date"] = "2 November"
        entry["deployment"]["dp_variant"]["variant_name"] = "Very private"
        entry["deployment"]["surprise"] = 1
        assert len(_errors(entry)) == 3

    def test_nothing_is_invented(self) -> None:
        """What nobody filed is marked; fixed words and dates are left out and listed."""
        report = report_document(audit(), None, {}, BEGAN)
        gaps, errors = registry_gaps(report), _errors(registry_entry(report))
        assert "deployment.basic.publication_date" in gaps
        assert "deployment.basic.data_curators.0.data_curator_type" in gaps
        assert "deployment.implementation.justification" in gaps
        assert len(errors) == 2
        assert all("is a required property" in error for error in errors)

    def test_words_that_the_registry_does_not_know(self) -> None:
        """A sector, a kind or a date that it would refuse counts as not filed."""
        wrong = {
            "product": {"sector": "Retail", "publication_date": "soon"},
            "controller": {"kind": "Guild"},
        }
        gaps = registry_gaps(report_document(audit(), None, wrong, BEGAN))
        for name in ("publication_date", "data_product_sector"):
            assert f"deployment.basic.{name}" in gaps
        assert "deployment.basic.data_curators.0.data_curator_type" in gaps

    def test_the_largest_epsilon_is_told_rounded_up(self) -> None:
        """Of several merchants the weakest protection counts."""
        found = replace(
            audit(), spending=(spending(), replace(spending("b"), lifetime=2.00001, cap=9.0))
        )
        entry = registry_entry(report_document(found, None, {}, BEGAN))
        assert entry["deployment"]["privacy_loss"]["privacy_parameters"] == {
            "epsilon": 2.001,
            "delta": 1e-5,
        }

    def test_unbounded_loss(self) -> None:
        """An epsilon without a bound is told in words, never as a number."""
        found = replace(audit(), spending=(replace(spending(), lifetime=float("inf")),))
        report = report_document(found, None, FILING, BEGAN)
        loss = registry_entry(report)["deployment"]["privacy_loss"]
        assert "epsilon" not in loss["privacy_parameters"]
        assert "unbounded" in loss["privacy_parameters_details"]
        assert "deployment.privacy_loss.privacy_parameters.epsilon" in registry_gaps(report)
        assert _errors(registry_entry(report)) == []

    def test_nothing_audited(self) -> None:
        """Without a ledger no epsilon is claimed."""
        report = report_document(replace(audit(), spending=(), runs=()), None, FILING, BEGAN)
        loss = registry_entry(report)["deployment"]["privacy_loss"]
        assert loss["privacy_parameters"] == {}
        assert "no epsilon is confirmed" in loss["privacy_parameters_details"]

    def test_runs_that_were_not_masked(self) -> None:
        """They are told to the registry too."""
        plain = replace(run(), contract={**run().contract, "aggregation": {"secure": False}})
        report = report_document(replace(audit(), runs=(plain,)), None, FILING, BEGAN)
        model = registry_entry(report)["deployment"]["deployment_model"]
        assert "not masked" in model["model_name_details"]
        assert model["release_type"] == "One release"


class TestYaml:
    """The file."""

    def test_reads_back(self) -> None:
        """YAML that any reader understands, dates as texts."""
        assert yaml.safe_load(registry_yaml(_full())) == registry_entry(_full())

    def test_quoting_as_the_registry_wants_it(self) -> None:
        """Its own checks refuse folded texts: they would lose line breaks."""
        styles = {getattr(token, "style", None) for token in yaml.scan(registry_yaml(_full()))}
        assert ">" not in styles
        assert "|" in styles

    def test_gaps_stand_on_top(self) -> None:
        """Whoever hands the entry in sees first what is missing, and that the audit failed."""
        text = registry_yaml(report_document(failing(), None, {}, BEGAN))
        head = text.partition("url_slug")[0]
        assert "To be filled in" in head
        assert "#   deployment.basic.publication_date" in head
        assert "The audit did not pass" in head
        assert "To be filled in" not in registry_yaml(_full()).partition("url_slug")[0]

    def test_a_placeholder_is_no_fact(self) -> None:
        """Each text that nobody filed is the same mark, so that it can be searched for."""
        text = registry_yaml(report_document(audit(), None, {}, BEGAN))
        assert text.count(TO_BE_FILLED) > 5

    @settings(max_examples=25)
    @given(text=st.text(max_size=60))
    def test_any_filed_text(self, text: str) -> None:
        """Whatever is filed, the file reads back and the entry keeps its form."""
        filed = {"product": {"name": text, "description": text}, "controller": {"name": text}}
        report = report_document(audit(), None, filed, BEGAN)
        assert yaml.safe_load(registry_yaml(report)) == registry_entry(report)
        assert re.fullmatch(r"[a-z0-9-]+", registry_entry(report)["url_slug"])


def test_every_registry_field_can_be_filed() -> None:
    """No field of the entry waits for a fact that the file has no place for."""
    filed: dict[str, dict[str, str]] = {}
    for field in FIELDS:
        filed.setdefault(field.section, {})[field.name] = "told"
    filed["product"] |= {"publication_date": "2026-11-02", "sector": "Finance"}
    filed["product"]["data_source"] = "Static"
    filed["controller"]["kind"] = "Nonprofit"
    assert registry_gaps(report_document(audit(), None, filed, BEGAN)) == []
