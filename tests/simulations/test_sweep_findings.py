"""What is said and drawn of a sweep."""

import csv
import io
import json
import math
from functools import cache
from importlib.resources import files
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.accounting import epsilon
from common.contract import Contract
from common.events import GaussianSum, PoissonGaussianSum, to_document
from simulations.datasets import load
from simulations.sweep import Axes, grid
from simulations.sweep_cell import Cell, Origin, Record, failed
from simulations.sweep_findings import (
    Sweep,
    cautions,
    columns,
    comma_separated,
    epsilon_together,
    headline,
    parquet,
    rows,
    sweep_document,
    sweep_of,
)
from simulations.sweep_picture import picture

SVG = "{http://www.w3.org/2000/svg}"
GAUSSIAN = to_document(GaussianSum(4.0, 1.0, 2))


@pytest.fixture(scope="module")
def contract() -> Contract:
    """Give the contract of three synthetic merchants."""
    return load("synthetic", preset="smoke", merchants=3).contract


def grid_of(
    contract: Contract, axes: Axes, name: str = "synthetic", seed: int | None = None
) -> tuple[Cell, ...]:
    """Return cells over customers of a data set; none are read."""
    return grid([(Origin(name, None, None, None, 3, 0), contract)], axes, seed)


def found(cells: tuple[Cell, ...], **changes: Any) -> Sweep:
    """Return a sweep whose runs all finished, better the larger their epsilon."""
    records = [
        cell.record(
            **{
                "status": "done",
                "accuracy": 0.5 + cell.contract.privacy.epsilon / 100 + number / 1000,
                "accuracy_error": 0.02,
                "macro_f1": 0.4,
                "epsilon_spent": 0.9 * cell.contract.privacy.epsilon,
                "epsilon_server": 0.9 * cell.contract.privacy.epsilon,
                "epsilon_achieved": 0.8 * cell.contract.privacy.epsilon,
                "rounds": 60,
                "refused": 0,
                "seconds": 2.5,
                "peak_mib": 430.0,
                "events": [GAUSSIAN],
                **changes,
            }
        )
        for number, cell in enumerate(cells)
    ]
    return sweep_of(cells, records, "Made up.")


class TestGroups:
    """Repetitions put together."""

    def test_mean_and_spread_are_over_the_repetitions(self, contract: Contract) -> None:
        """Of every configuration by itself."""
        sweep = found(grid_of(contract, Axes((1.0, 2.0), repetitions=3)))
        assert [group.any.epsilon for group in sweep.groups] == [1.0, 2.0]
        for group in sweep.groups:
            values = [record.accuracy for record in group.records]
            assert len(values) == 3
            assert group.accuracy.mean == pytest.approx(np.mean(values))
            assert group.accuracy.sd == pytest.approx(np.std(values, ddof=1))

    def test_a_single_run_has_the_error_of_its_noise(self, contract: Contract) -> None:
        """Nothing is known of the spread."""
        (group,) = found(grid_of(contract, Axes((1.0,)))).groups
        assert (group.accuracy.mean, group.accuracy.sd) == (0.51, 0.02)

    def test_failed_runs_are_counted_and_in_no_mean(self, contract: Contract) -> None:
        """They have no figures."""
        cells = grid_of(contract, Axes((1.0,), repetitions=2))
        records = [*found(cells[:1]).records, failed(cells[1], "why\nnot")]
        sweep = sweep_of(cells, records, "")
        (group,) = sweep.groups
        assert (len(group.done), len(group.failed), group.measured) == (1, 1, 1)
        assert [record.reason for record in sweep.failed] == ["why not"]

    def test_runs_of_other_settings_are_in_the_tables_only(self, contract: Contract) -> None:
        """A picture shows what differs in its axes alone."""
        cells = grid_of(contract, Axes((1.0,)))
        longer = grid_of(contract.revised(training={"rounds": 7}), Axes((1.0,)))
        sweep = sweep_of(cells, [*found(cells).records, *found(longer).records], "")
        assert len(sweep.groups) == 1
        assert len(rows(sweep)) == 2

    def test_earlier_values_of_an_axis_are_shown(self, contract: Contract) -> None:
        """A grid that grows stays one picture."""
        earlier, later = (grid_of(contract, Axes((value,))) for value in (1.0, 2.0))
        sweep = sweep_of(later, [*found(earlier).records, *found(later).records], "")
        assert [group.any.epsilon for group in sweep.groups] == [1.0, 2.0]
        assert sweep.asked == {later[0].key}


class TestTogether:
    """What all runs cost."""

    @given(
        st.lists(st.floats(0.5, 50), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 5)
    )
    def test_it_is_the_composition_of_every_attempt(
        self, sigmas: list[float], attempts: int, count: int
    ) -> None:
        """Of sums over all customers exactly, and never less than one run alone."""
        records = [_with(GaussianSum(sigma, 1.0, count), attempts) for sigma in sigmas]
        told = epsilon_together(records, 1e-5)
        events = [GaussianSum(sigma, 1.0, count * attempts) for sigma in sigmas]
        assert told == pytest.approx(epsilon(events, 1e-5))
        assert told is not None
        assert all(told >= epsilon([event], 1e-5) - 1e-9 for event in events)

    def test_sampled_sums_are_bounded_from_above(self) -> None:
        """By no less than what two accountants find."""
        events = [PoissonGaussianSum(2.0, 1.0, 0.1, 30), PoissonGaussianSum(3.0, 1.0, 0.2, 20)]
        told = epsilon_together([_with(event, 1) for event in events], 1e-5)
        exact = epsilon(events, 1e-5)
        assert told is not None
        assert exact <= told < 1.5 * exact

    def test_one_whole_plan_costs_the_contract_s_epsilon(self, contract: Contract) -> None:
        """And two cost more, but less than twice as much."""
        cells = grid_of(contract, Axes((1.0,), repetitions=2))
        records = [failed(cell, "why not") for cell in cells]
        delta = contract.privacy.delta
        assert epsilon_together(records[:1], delta) == pytest.approx(1.0, rel=1e-3)
        assert 1.2 < (epsilon_together(records, delta) or math.nan) < 2.0

    def test_what_has_no_bound_has_none(self) -> None:
        """No number is made up."""
        assert epsilon_together([_with(GaussianSum(1e-5, 1.0, 9), 9)], 1e-5) is None


def _with(event: Any, attempts: int) -> Record:
    return _blank().model_copy(update={"events": [to_document(event)], "attempts": attempts})


@cache
def _blank() -> Record:
    shop = load("synthetic", preset="smoke", merchants=3).contract
    return Cell(Origin("synthetic", None, None, None, 3, 0), shop, None).record()


class TestCautions:
    """What must be read before anything is chosen."""

    def test_real_customers_cost_what_all_runs_cost(self, contract: Contract) -> None:
        """In red, with the epsilon of all of them together, rounded up."""
        sweep = found(grid_of(contract, Axes((1.0, 2.0), repetitions=2), "cdnow"))
        (caution,) = cautions(sweep)
        together = epsilon([GaussianSum(4.0, 1.0, 8)], contract.privacy.delta)
        assert caution.grave
        assert "all of the 4 runs" in caution.text
        stated = float(caution.text.partition("epsilon of at most ")[2].split()[0])
        assert together <= stated < 1.001 * together

    def test_runs_of_other_settings_count_too(self, contract: Contract) -> None:
        """They read the same customers."""
        cells = grid_of(contract, Axes((1.0,)), "cdnow")
        longer = grid_of(contract.revised(training={"rounds": 7}), Axes((1.0,)), "cdnow")
        sweep = sweep_of(cells, [*found(cells).records, *found(longer).records], "")
        assert "all of the 2 runs" in cautions(sweep)[0].text

    def test_seeded_runs_over_real_customers_claim_nothing(self, contract: Contract) -> None:
        """Whoever knows the seed subtracts the noise."""
        sweep = found(grid_of(contract, Axes((1.0,)), "cdnow", seed=3))
        text = cautions(sweep)[0].text
        assert "no epsilon holds" in text
        assert "at most" not in text
        assert any("not for release" in caution.text for caution in cautions(sweep))

    def test_nobody_stands_behind_synthetic_customers(self, contract: Contract) -> None:
        """Which is said calmly."""
        (caution,) = cautions(found(grid_of(contract, Axes((1.0,)))))
        assert not caution.grave
        assert "Nobody stands behind a row" in caution.text

    def test_sums_without_masks_are_told_first(self, contract: Contract) -> None:
        """As everywhere."""
        plain = contract.revised(aggregation={"secure": False})
        first = cautions(found(grid_of(plain, Axes((1.0,)))))[0]
        assert first.grave
        assert "not masked" in first.title


class TestTables:
    """Parquet and CSV."""

    def test_parquet_has_the_promised_columns(self, contract: Contract) -> None:
        """Axes, privacy, quality, costs, and how it went, whatever is unknown."""
        cells = grid_of(contract, Axes((1.0,), repetitions=2))
        records = [*found(cells[:1]).records, failed(cells[1], "why not")]
        table = pyarrow.parquet.read_table(
            pyarrow.BufferReader(parquet(sweep_of(cells, records, "")))
        )
        kinds = {field.name: str(field.type) for field in table.schema}
        whole = ("merchants", "data_seed", "split_seed", "seed", "attempts", "rounds", "refused")
        figures = (
            *("epsilon", "delta", "clip_norm", "sampling_rate"),
            *("epsilon_spent", "epsilon_server", "epsilon_achieved"),
            *("accuracy", "accuracy_error", "macro_f1", "seconds", "peak_mib"),
        )
        texts = ("key", "version", "data", "partition", "label", "preset", "mode")
        expected = {
            **dict.fromkeys(whole, "int64"),
            **dict.fromkeys(figures, "double"),
            **dict.fromkeys((*texts, "status", "reason", "notes"), "string"),
            "secure": "bool",
        }
        assert kinds == expected
        assert table.column("status").to_pylist() == ["done", "failed"]
        assert table.column("reason").to_pylist() == [None, "why not"]
        assert table.column("accuracy").to_pylist() == [0.51, None]

    def test_csv_says_the_same(self, contract: Contract) -> None:
        """What is unknown is empty."""
        sweep = found(grid_of(contract, Axes((1.0, 2.0))), macro_f1=None)
        read = list(csv.DictReader(io.StringIO(comma_separated(sweep).decode())))
        assert list(read[0]) == list(columns())
        assert [float(row["accuracy"]) for row in read] == [0.51, 0.521]
        assert {row["macro_f1"] for row in read} == {""}

    def test_the_document_fits_its_schema(self, contract: Contract) -> None:
        """Also where runs failed and nothing is known."""
        schema = json.loads((files("hansa") / "schemas" / "sweep.schema.json").read_text())
        cells = grid_of(contract, Axes((1.0, 2.0)))
        records = [*found(cells[:1]).records, failed(cells[1], "why not")]
        document = sweep_document(sweep_of(cells, records, "Made up."))
        jsonschema.validate(json.loads(json.dumps(document, allow_nan=False)), schema)
        assert [row["done"] for row in document["rows"]] == [1, 0]
        assert document["failed"][0]["reason"] == "why not"
        assert document["notes"][0] == "Made up."


class TestPicture:
    """Accuracy against epsilon."""

    def test_a_png_shows_every_line_in_its_colour(self, contract: Contract) -> None:
        """It is not blank: two lines of two colours, with bars."""
        shown = _pixels(found(grid_of(contract, Axes((1.0, 2.0, 4.0), (1.0, 2.0), repetitions=2))))
        nothing = _pixels(found(grid_of(contract, Axes((1.0,))), accuracy=None))
        for colour in ("#0b66a8", "#b5490a"):
            wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            near = [(abs(p.astype(int) - wanted).max(axis=2) < 12).sum() for p in (shown, nothing)]
            assert near[0] > 500
            assert near[1] == 0

    def test_lines_and_axes_are_named(self, contract: Contract) -> None:
        """By what tells them apart; what they share is in the title."""
        words = _words(found(grid_of(contract, Axes((1.0, 2.0), (1.0, 2.0)))))
        assert {"clip norm 1", "clip norm 2", "Noisy accuracy, %", "1", "2"} <= set(words)
        title = " ".join(words).replace("\u00a0", " ")
        assert "3 merchants" in title
        assert "sums masked" in title

    def test_many_lines_get_panels(self, contract: Contract) -> None:
        """One for each number of merchants."""
        cells = grid_of(contract, Axes((1.0, 2.0), (0.5, 1.0, 2.0, 4.0)))
        more = grid_of(
            contract.revised(federation={"min_merchants": 9}), Axes((1.0,), (0.5, 1.0, 2.0, 4.0))
        )
        records = [*found(cells).records, *found(more).records]
        words = _words(sweep_of(cells, records, ""))
        assert {"3 merchants", "9 merchants"} <= set(words)
        assert words.count("clip norm 0.5") == 2

    def test_a_sweep_without_an_accuracy_says_so(self, contract: Contract) -> None:
        """Instead of empty axes."""
        words = _words(found(grid_of(contract, Axes((1.0,))), accuracy=None))
        assert "no run has an accuracy to show" in words

    def test_the_same_sweep_gives_the_same_bytes(self, contract: Contract) -> None:
        """Neither date nor chance is in the file."""
        sweep = found(grid_of(contract, Axes((0.1, 8.0), (1.0, 2.0))))
        assert picture(sweep, "svg") == picture(sweep, "svg")
        assert picture(sweep, "png") == picture(sweep, "png")

    def test_the_headline_tells_plain_sums(self, contract: Contract) -> None:
        """Whoever finds the picture alone must know."""
        plain = contract.revised(aggregation={"secure": False})
        assert "sums not masked" in headline(found(grid_of(plain, Axes((1.0,)))))


def _words(sweep: Sweep) -> list[str]:
    root = ElementTree.fromstring(picture(sweep, "svg"))  # noqa: S314
    return [text.text or "" for text in root.iter(f"{SVG}text")]


def _pixels(sweep: Sweep) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(io.BytesIO(picture(sweep, "png")))[:, :, :3] * 255).astype(np.uint8)
