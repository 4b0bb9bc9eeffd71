"""The JSON documents and their schemas."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from common import statements
from simulations.documents import comparison_document, simulation_document
from simulations.result import Comparison, SimulationResult

SCHEMAS = Path(__file__).parents[2] / "hansa" / "schemas"


def _schema(name: str) -> dict[str, Any]:
    schema: dict[str, Any] = json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8"))
    return schema


def _checked(document: dict[str, Any], name: str) -> dict[str, Any]:
    """Send a document through strict JSON and its schema."""
    again: dict[str, Any] = json.loads(json.dumps(document, allow_nan=False))
    jsonschema.validate(again, _schema(name), cls=jsonschema.Draft202012Validator)
    return again


@pytest.mark.parametrize("name", ["simulate", "compare"])
def test_schemas_are_valid_and_closed(name: str) -> None:
    """The schemas follow draft 2020-12 and refuse keys they do not know."""
    schema = _schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(schema["properties"])


class TestSimulation:
    """The document of a simulation."""

    def test_follows_the_schema(self, small_result: SimulationResult) -> None:
        """A usual run gives the promised keys and figures."""
        document = _checked(simulation_document(small_result, Path("out/report.html")), "simulate")
        assert document["rounds"] == 40
        assert document["secure"] is False
        assert document["bundle"] == "out/bundle"
        assert document["report"] == "out/report.html"
        assert document["merchants"][2] == {
            "id": "riga",
            "customers": 57,
            "epsilon": 0.0,
            "accuracy": None,
            "refused": "its own cap of 0.5 would be passed",
        }

    def test_achieved_noise_and_colluders(self, small_result: SimulationResult) -> None:
        """As found; nothing left is null."""
        document = _checked(simulation_document(small_result), "simulate")
        assert document["achieved"] == {"epsilon": 0.981, "survivors_min": 2, "survivors_max": 3}
        assert document["colluders"] == [
            {"colluders": 0, "epsilon": 0.981},
            {"colluders": 1, "epsilon": 1.3971},
            {"colluders": 2, "epsilon": None},
        ]

    def test_masked_sums_tell_no_merchants_accuracy(self, large_result: SimulationResult) -> None:
        """It is null for everybody; plain sums have it."""
        document = _checked(simulation_document(large_result), "simulate")
        assert document["secure"] is True
        assert {merchant["accuracy"] for merchant in document["merchants"]} == {None}

    def test_plain_sums_tell_a_merchants_accuracy(self, small_result: SimulationResult) -> None:
        """From its own message."""
        document = _checked(simulation_document(small_result), "simulate")
        assert document["merchants"][0]["accuracy"] == 0.581

    @pytest.mark.parametrize("key", ["achieved", "colluders"])
    def test_a_missing_key_is_refused(self, small_result: SimulationResult, key: str) -> None:
        """The schema wants every key."""
        document = simulation_document(small_result)
        del document[key]
        with pytest.raises(jsonschema.ValidationError):
            _checked(document, "simulate")

    def test_no_report(self, large_result: SimulationResult) -> None:
        """Without a report its place is null."""
        assert _checked(simulation_document(large_result), "simulate")["report"] is None

    def test_not_finite(self, small_result: SimulationResult) -> None:
        """What is not a finite number is null, and numpy's numbers are numbers."""
        result = replace(
            small_result,
            epsilon_server=float("inf"),
            metrics={"accuracy": float("nan"), "macro_f1": np.float64(0.5)},
        )
        document = _checked(simulation_document(result), "simulate")
        assert document["epsilon_server"] is None
        assert document["metrics"] == {"accuracy": None, "macro_f1": 0.5}

    def test_unknown_key_is_refused(self, small_result: SimulationResult) -> None:
        """The schema tells a document with a key too many."""
        with pytest.raises(jsonschema.ValidationError):
            _checked(simulation_document(small_result) | {"surprise": 1}, "simulate")


class TestComparison:
    """The document of a comparison."""

    def test_follows_the_schema(self, shop_comparison: Comparison) -> None:
        """A usual comparison gives the promised keys, with null for what does not exist."""
        document = _checked(comparison_document(shop_comparison), "compare")
        assert document["rows"][0]["auc"]["mean"] is None
        assert document["rows"][6]["method"] == "distributed"
        assert document["rows"][6]["epsilon"] == 1.0
        assert document["rows"][6]["accuracy"] == {"mean": 0.587, "sd": 0.008}
        assert len(document["rows"][6]["by_size"]) == len(document["sizes"]) == 3

    def test_it_says_how_sums_were_made(self, shop_comparison: Comparison) -> None:
        """Plain sums are a note too, the first one."""
        assert _checked(comparison_document(shop_comparison), "compare")["secure"] is True
        document = _checked(comparison_document(replace(shop_comparison, secure=False)), "compare")
        assert document["secure"] is False
        assert document["notes"] == [statements.NOT_MASKED_COMPARED, *shop_comparison.notes]
