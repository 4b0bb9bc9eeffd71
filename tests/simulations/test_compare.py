"""All methods side by side: rows as promised, free rules exact, schema kept."""

import json
import math
from dataclasses import replace
from importlib.resources import files

import jsonschema
import numpy as np
import pytest

from common import statements
from common.contract import Contract
from common.plan import plan_of
from simulations.compare import (
    PLAIN_POOLED,
    Question,
    _size_groups,
    _stacked,
    compare,
    in_mode,
    train_centrally,
)
from simulations.datasets import Dataset, load
from simulations.documents import comparison_document
from simulations.federation import tables_of
from simulations.result import Comparison, ComparisonRow

SEEDS = 2
EPSILONS = (1.0, 4.0)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate six merchants."""
    return load("synthetic", preset="smoke", merchants=6)


@pytest.fixture(scope="module")
def contract(dataset: Dataset) -> Contract:
    """Give a contract of two rounds."""
    return dataset.contract.revised(model={"family": "linear"}, training={"rounds": 2})


@pytest.fixture(scope="module")
def steps() -> list[str]:
    """Collect what the comparison says it does."""
    return []


@pytest.fixture(scope="module")
def comparison(dataset: Dataset, contract: Contract, steps: list[str]) -> Comparison:
    """Compare once."""
    return compare(Question(dataset, contract, EPSILONS, SEEDS), steps.append)


def row(comparison: Comparison, method: str, epsilon: float | None = None) -> ComparisonRow:
    """Find one row."""
    return next(r for r in comparison.rows if (r.method, r.epsilon) == (method, epsilon))


def splits(dataset: Dataset, contract: Contract) -> list[tuple[np.ndarray, ...]]:
    """Return (labels, previous, merchant, held out) of every seed, from the tables."""
    found = []
    for seed in range(SEEDS):
        tables = tables_of(dataset, contract.revised(training={"split_seed": seed})).values()
        merchant = np.repeat(np.arange(len(tables)), [len(table.labels) for table in tables])
        labels, previous, held_out = (
            np.concatenate([getattr(table, name) for table in tables])
            for name in ("labels", "previous", "held_out")
        )
        found.append((labels, previous, merchant, held_out))
    return found


@pytest.mark.slow
def test_rows_are_every_method_at_every_epsilon(comparison: Comparison) -> None:
    """Free rules and open training once, private training once an epsilon."""
    expected = {("majority", None), ("last-period", None), ("alone", None), ("pooled", None)}
    expected |= {
        (method, epsilon)
        for method in ("alone", "local", "distributed", "pooled")
        for epsilon in EPSILONS
    }
    found = [(row.method, row.epsilon) for row in comparison.rows]
    assert len(found) == len(set(found))
    assert set(found) == expected


@pytest.mark.slow
def test_the_majority_rule_is_exact(
    comparison: Comparison, dataset: Dataset, contract: Contract
) -> None:
    """The most common training label, for every held-out customer."""
    shares = []
    for labels, _, _, held_out in splits(dataset, contract):
        common = np.bincount(labels[~held_out]).argmax()
        shares.append((labels[held_out] == common).mean())
    found = row(comparison, "majority").accuracy
    assert found.mean == pytest.approx(np.mean(shares))
    assert found.sd == pytest.approx(np.std(shares, ddof=1))
    assert row(comparison, "majority").auc.mean == 0.5


def test_the_last_period_rule_is_exact(
    comparison: Comparison, dataset: Dataset, contract: Contract
) -> None:
    """Last period's segment, for every held-out customer."""
    shares = [
        (labels[held_out] == previous[held_out]).mean()
        for labels, previous, _, held_out in splits(dataset, contract)
    ]
    assert row(comparison, "last-period").accuracy.mean == pytest.approx(np.mean(shares))


def test_pooled_training_without_privacy_beats_the_majority(comparison: Comparison) -> None:
    """Something is learned."""
    assert row(comparison, "pooled").accuracy.mean > row(comparison, "majority").accuracy.mean + 0.1


def test_merchants_are_grouped_by_size(
    comparison: Comparison, dataset: Dataset, contract: Contract
) -> None:
    """Three groups, small to large, together all merchants."""
    tables = list(tables_of(dataset, contract).values())
    merchants = _stacked(tables, contract)
    groups, ranges = _size_groups(merchants)
    sizes = np.array([int((~table.held_out).sum()) for table in tables])
    assert np.bincount(groups).tolist() == [2, 2, 2]
    for group, limits in enumerate(ranges):
        own = sizes[groups == group]
        assert limits == (own.min(), own.max())
    assert sizes[groups == 0].max() <= sizes[groups == 1].min()
    assert len(comparison.sizes) == 3
    assert all(len(found.by_size) == 3 for found in comparison.rows)


@pytest.mark.slow
def test_sizes_cover_every_split(dataset: Dataset, contract: Contract) -> None:
    """The names of the groups hold for all splits, not for the last one."""
    found = compare(Question(dataset, contract, (), 3), lambda _step: None).sizes
    for seed in range(3):
        split = contract.revised(training={"split_seed": seed})
        _, ranges = _size_groups(_stacked(list(tables_of(dataset, split).values()), split))
        for name, (low, high) in zip(found, ranges, strict=True):
            smallest, largest = map(int, name.split(" to "))
            assert smallest <= low <= high <= largest


def test_an_unknown_last_period_is_the_most_common_segment(
    dataset: Dataset, contract: Contract
) -> None:
    """Nothing is silently counted as the first segment."""
    column = contract.segments.previous_column
    merchants = {
        name: frame.assign(**{str(column): None}) for name, frame in dataset.merchants.items()
    }
    unknown = replace(dataset, merchants=merchants)
    found = {r.method: r for r in compare(Question(unknown, contract, (), 1), str).rows}
    assert found["last-period"].accuracy.mean == found["majority"].accuracy.mean


def test_groups_make_up_the_whole(
    dataset: Dataset, contract: Contract, comparison: Comparison
) -> None:
    """With one seed, the accuracies by size average to the accuracy."""
    once = compare(Question(dataset, contract, (), 1), lambda _step: None)
    labels, _, merchant, held_out = splits(dataset, contract)[0]
    tables = list(tables_of(dataset, contract.revised(training={"split_seed": 0})).values())
    groups, _ = _size_groups(_stacked(tables, contract))
    weights = np.bincount(groups[merchant[held_out]], minlength=3)
    for found in once.rows:
        parts = [spread.mean for spread in found.by_size]
        assert np.average(parts, weights=weights) == pytest.approx(found.accuracy.mean)
        assert math.isnan(found.accuracy.sd)  # one seed tells nothing about chance
    assert len(labels) == dataset.customers


def test_fewer_merchants_than_groups_make_fewer_groups() -> None:
    """Two merchants, two groups."""
    dataset = load("synthetic", preset="smoke", merchants=2)
    contract = dataset.contract
    merchants = _stacked(list(tables_of(dataset, contract).values()), contract)
    assert len(_size_groups(merchants)[1]) == 2


def test_the_json_keeps_its_schema(comparison: Comparison) -> None:
    """As `hansa compare --json` writes it."""
    schema = json.loads((files("hansa") / "schemas" / "compare.schema.json").read_text())
    document = json.loads(json.dumps(comparison_document(comparison), allow_nan=False))
    jsonschema.validate(document, schema)
    assert document["seeds"] == SEEDS
    assert document["merchants"] == 6


def test_it_says_how_its_federated_runs_summed(
    comparison: Comparison, dataset: Dataset, contract: Contract
) -> None:
    """Secure sums are a note, plain ones a flag that a caution is made of."""
    assert comparison.secure
    assert statements.MASKED_COMPARED in comparison.notes
    plain = contract.revised(aggregation={"secure": False})
    found = compare(Question(dataset, plain, (), 1), lambda _step: None)
    assert not found.secure
    assert statements.MASKED_COMPARED not in found.notes
    assert statements.NOT_MASKED_COMPARED in comparison_document(found)["notes"]


def test_what_is_trained_in_one_place_does_not_depend_on_how_sums_are_made(
    contract: Contract,
) -> None:
    """The noise of its plan is the same, whatever the ring is."""
    noise = {
        plan_of(in_mode(contract.revised(aggregation=aggregation), "distributed")).update.event
        for aggregation in ({}, {"secure": False}, {"ring_bits": 64}, {"max_customers": 10})
    }
    assert len(noise) == 1


def test_it_says_what_it_is_doing(comparison: Comparison, steps: list[str]) -> None:
    """Every split and method, in words."""
    assert len(comparison.rows) > 0
    assert steps[0] == "split 1 of 2: every merchant alone"
    assert "split 2 of 2: federated distributed, epsilon 4" in steps


def test_without_last_periods_segments_the_rule_is_left_out(
    dataset: Dataset, contract: Contract
) -> None:
    """The contract need not name a column for it."""
    contract = contract.revised(segments={"previous_column": None})
    found = compare(Question(dataset, contract, (), 1), lambda _step: None)
    assert [row.method for row in found.rows] == ["majority", "alone", "pooled"]


def test_a_start_is_told_unchanged_and_everything_open_goes_on_from_it() -> None:
    """It has a row of its own, and a few careful steps on many customers do not lose to it."""
    warm = load("synthetic", preset="small", merchants=20, warm=True, plain=True)
    found = compare(Question(warm, warm.contract, (), 1), lambda _step: None)
    methods = ["majority", "last-period", "start", "alone", "pooled"]
    assert [(r.method, r.epsilon) for r in found.rows] == [(name, None) for name in methods]
    start, pooled = row(found, "start"), row(found, "pooled")
    assert start.accuracy.mean > row(found, "majority").accuracy.mean + 0.1
    assert pooled.auc.mean > start.auc.mean
    assert any("'start' is what they tell" in note for note in found.notes)


@pytest.mark.slow
def test_a_local_contract_with_sampling_can_be_compared(
    dataset: Dataset, contract: Contract
) -> None:
    """Keys of mode 'local' do not keep the other methods from being measured."""
    only_local = {"local_steps": 2, "proximal": 0.1, "local_optimizer": "adam"}
    local = contract.revised(training={"mode": "local", **only_local})
    found = compare(Question(dataset, local, (1.0,), 1), lambda _step: None)
    assert ("distributed", 1.0) in {(row.method, row.epsilon) for row in found.rows}


@pytest.mark.slow
@pytest.mark.parametrize("training", [{}, {"mode": "local", "local_steps": 4}], ids=str)
def test_private_training_in_one_place_has_the_noise_of_its_epsilon(
    contract: Contract, training: dict[str, object]
) -> None:
    """Its steps take everybody, so sampling and steps of mode 'local' do not lessen the noise."""
    contract = contract.revised(
        training={
            "rounds": 1,
            "optimizer": "sgd",
            "learning_rate": 1.0,
            "averaging": 0.0,
            **training,
        },
        privacy={"split": {"census": 0.05, "training": 0.85, "evaluation": 0.06, "profiles": 0.04}},
    )
    event = plan_of(in_mode(contract, "distributed")).update.event
    nobody = np.zeros((0, contract.inputs)), np.zeros(0, dtype=np.int64)
    steps = []
    for _ in range(400):
        # nobody there: what moves the model is noise, divided by a census of nearly one
        theta = train_centrally(contract, *nobody, PLAIN_POOLED["linear"], private=True)
        steps.append(np.abs(theta).max())
    largest = event.noise_multiplier * event.sensitivity
    assert np.max(steps) > 2.0 * largest
    assert np.max(steps) < 6.0 * largest


def test_open_training_adds_no_noise(dataset: Dataset, contract: Contract) -> None:
    """Twice the same model."""
    merchants = _stacked(list(tables_of(dataset, contract).values()), contract)
    first, second = (
        train_centrally(contract, merchants.x, merchants.y, PLAIN_POOLED["linear"], private=False)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
