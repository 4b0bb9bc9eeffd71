"""From noisy sums to the bundle: figures by hand, error bars by drawing, nothing exact."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import load_file

from audit.epsilon import recompute
from clients.worker import confusion_counts, profile_sums
from common import statements
from common.accounting import epsilon, gaussian_epsilon
from common.bundle import read_bundle
from common.contract import Contract, parse_contract, read_contract
from common.events import GaussianSum, from_document
from common.network import initial_parameters
from common.plan import plan_of
from common.session import threshold
from server.outcome import NoisySum, Outcome
from server.publishing import (
    accuracy_of,
    achieved_epsilon,
    colluder_counts,
    macro_f1_of,
    metrics_document,
    privacy_document,
    publish,
    segments_document,
)
from simulations.members import Federation

Federate = Callable[..., Federation]
RunOverGrid = Callable[..., Outcome]

only_plain = pytest.mark.parametrize("contract", ["plain"], indirect=True)
only_secure = pytest.mark.parametrize("contract", ["secure"], indirect=True)

COUNTS = np.array([[50.0, 10.0, 0.0], [5.0, 80.0, 15.0], [0.0, 20.0, 20.0]])


@pytest.fixture
def shop() -> Contract:
    """Give a contract with every kind of feature and two segments."""
    return parse_contract(
        {
            "federation": {"name": "Shops"},
            "features": [
                {"name": "spend", "high": 1000.0, "transform": "log1p", "unit": "EUR"},
                {"name": "age", "low": 18.0, "high": 98.0, "unit": "years", "missing": "indicator"},
                {"name": "member", "kind": "flag"},
                {"name": "plan", "kind": "category", "categories": ["a", "b"]},
            ],
            "segments": {"names": ["low", "high"], "actions": ["call", "thank"]},
            "privacy": {"epsilon": 1.0, "delta": 1e-5},
        },
        source="test",
    )


def profile_of(total: np.ndarray, stddev: float) -> NoisySum:
    """Wrap a profile vector."""
    return NoisySum("profile", 1, total, stddev, ("a", "b"), {})


@pytest.fixture
def outcome(contract: Contract, federate: Federate, run_over_grid: RunOverGrid) -> Outcome:
    """Run a small federation whose noise nobody can guess."""
    return run_over_grid(federate(contract, seed=None))


@pytest.fixture
def published(outcome: Outcome, contract: Contract, tmp_path: Path) -> Path:
    """Publish the run."""
    publish(outcome, contract, tmp_path / "bundle", Ed25519PrivateKey.generate())
    return tmp_path / "bundle"


class TestAccuracy:
    """Accuracy and its error from noisy counts."""

    def test_value_by_hand(self) -> None:
        """The trace over the total."""
        found = accuracy_of(COUNTS, 1.0)
        assert found is not None
        assert found[0] == pytest.approx(150 / 200)

    @pytest.mark.parametrize(("segments", "accuracy"), [(2, 0.9), (4, 0.6), (4, 0.3), (10, 0.95)])
    def test_error_is_the_real_deviation_of_the_noise(self, segments: int, accuracy: float) -> None:
        """Drawn again and again, accuracy spreads as its error says (within 5 %)."""
        stddev, total = 20.0, 20000.0
        wrong = total * (1 - accuracy) / (segments**2 - segments)
        counts = np.full((segments, segments), wrong)
        np.fill_diagonal(counts, total * accuracy / segments)
        random = np.random.default_rng(11)
        drawn = [
            accuracy_of(counts + random.normal(0, stddev, counts.shape), stddev)
            for _ in range(4000)
        ]
        values = np.array([pair[0] for pair in drawn if pair is not None])
        errors = np.array([pair[1] for pair in drawn if pair is not None])
        assert len(values) == 4000
        ratio = values.std() / errors.mean()
        assert ratio == pytest.approx(1.0, abs=0.05)
        assert values.mean() == pytest.approx(accuracy, abs=4 * values.std() / 60)

    def test_noise_larger_than_the_counts_gives_no_accuracy(self) -> None:
        """A total below four standard deviations of its own noise is not divided by."""
        assert accuracy_of(COUNTS, 200 / (4.0 * 3) * 1.01) is None
        assert accuracy_of(COUNTS, 200 / (4.0 * 3) * 0.99) is not None

    @pytest.mark.parametrize("trace", [-30.0, 2000.0])
    def test_it_stays_between_nothing_and_all(self, trace: float) -> None:
        """Noise may push the ratio out of [0, 1]; what is told is not."""
        counts = np.full((2, 2), 400.0)
        counts[0, 1] = counts[1, 0] = 800.0 - trace if trace < 0 else -600.0
        counts[0, 0] = counts[1, 1] = trace / 2
        found = accuracy_of(counts, 1.0)
        assert found is not None
        assert 0.0 <= found[0] <= 1.0


class TestMacroF1:
    """Mean F1 from noisy counts."""

    def test_value_by_hand(self) -> None:
        """2 hits / (true + predicted), averaged."""
        by_hand = np.mean([100 / (60 + 55), 160 / (100 + 110), 40 / (40 + 35)])
        assert macro_f1_of(COUNTS) == pytest.approx(by_hand)

    def test_negative_counts_are_read_as_none(self) -> None:
        """A count cannot be negative."""
        counts = np.array([[10.0, -5.0], [-3.0, 10.0]])
        assert macro_f1_of(counts) == 1.0

    def test_a_segment_without_customers_counts_as_nothing(self) -> None:
        """No division by zero."""
        assert macro_f1_of(np.array([[10.0, 0.0], [0.0, 0.0]])) == 0.5


class TestMetrics:
    """metrics.json."""

    def test_it_says_how_noisy_it_is(self, shop: Contract) -> None:
        """Counts, their deviation, and figures that follow from them."""
        found = metrics_document(
            NoisySum("evaluation", 1, np.array([90.0, 10.0, 20.0, 80.0]), 2.0, ("a",), {}), shop
        )
        assert found["confusion"] == [[90.0, 10.0], [20.0, 80.0]]
        assert found["count_stddev"] == 2.0
        assert found["accuracy"] == pytest.approx(0.85)
        assert found["macro_f1"] == pytest.approx(np.mean([180 / 210, 160 / 190]))

    def test_too_noisy_figures_are_null(self, shop: Contract) -> None:
        """Nothing is claimed from noise."""
        found = metrics_document(
            NoisySum("evaluation", 1, np.array([9.0, 1, 2, 8]), 99.0, ("a",), {}), shop
        )
        assert found["accuracy"] is found["accuracy_error"] is found["macro_f1"] is None


class TestSegments:
    """segments.json."""

    rows = np.random.default_rng(0).uniform(-1, 1, (4000, 6))

    def total(self, share: float = 0.25) -> np.ndarray:
        """Return the exact profile sums of customers, the first ones in segment 0."""
        predicted = (np.arange(len(self.rows)) >= share * len(self.rows)).astype(int)
        return profile_sums(self.rows, predicted, 2)

    def test_shares_are_those_of_the_customers(self, shop: Contract) -> None:
        """With little noise the share is right."""
        found = segments_document(profile_of(self.total(0.25), 1e-6), shop)["segments"]
        assert [segment["share"] for segment in found] == pytest.approx([0.25, 0.75])
        assert [segment["action"] for segment in found] == ["call", "thank"]

    @pytest.mark.slow
    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
    def test_share_error_is_the_real_deviation_of_the_noise(
        self, shop: Contract, share: float
    ) -> None:
        """Drawn again and again, a share spreads as its error says (within 10 %)."""
        random, exact, stddev = np.random.default_rng(2), self.total(share), 20.0
        found = [
            segments_document(
                profile_of(exact + random.normal(0, stddev, exact.shape), stddev), shop
            )["segments"][0]
            for _ in range(600)
        ]
        shares = np.array([segment["share"] for segment in found])
        errors = np.array([segment["share_error"] for segment in found])
        assert shares.std() / errors.mean() == pytest.approx(1.0, abs=0.1)

    def test_intervals_cover_as_they_say(self, shop: Contract) -> None:
        """About 95 % of the intervals hold the value without noise."""
        random, exact, stddev = np.random.default_rng(3), self.total(0.4), 8.0
        truth = segments_document(profile_of(exact, 1e-9), shop)["segments"][0]["profile"]
        held = []
        for _ in range(300):
            noisy = exact + random.normal(0, stddev, exact.shape)
            profile = segments_document(profile_of(noisy, stddev), shop)["segments"][0]["profile"]
            held += [
                profile[name]["low"] <= truth[name]["typical"] <= profile[name]["high"]
                for name in ("spend", "member", "plan = a", "age (missing)")
            ]
        assert np.mean(held) == pytest.approx(0.95, abs=0.025)

    def test_values_are_in_natural_units(self, shop: Contract) -> None:
        """A scaled mean of zero is the middle of the transformed range, a share is a half."""
        rows = np.zeros((1000, 6))
        rows[:, 2] = -1.0  # nobody's age is missing
        predicted = np.zeros(1000, dtype=int)
        profile = segments_document(profile_of(profile_sums(rows, predicted, 2), 1e-6), shop)[
            "segments"
        ][0]["profile"]
        assert profile["spend"]["typical"] == pytest.approx(np.sqrt(1001.0) - 1)
        assert profile["age"]["typical"] == pytest.approx(58.0)
        assert profile["member"]["typical"] == pytest.approx(0.5)
        assert profile["age (missing)"]["typical"] == pytest.approx(0.0)
        assert profile["spend"]["unit"] == "EUR"

    def test_small_segments_are_suppressed(self, shop: Contract) -> None:
        """Fewer customers than four deviations of the count's noise: no share, no profile."""
        found = segments_document(profile_of(self.total(0.01), 10.0), shop)["segments"]
        assert found[0]["share"] is found[0]["share_error"] is None
        assert found[0]["profile"] == {}
        assert found[1]["share"] is not None

    def test_vague_cells_are_suppressed(self, shop: Contract) -> None:
        """A mean that noise moves by half the scale is not printed; the share still is."""
        found = segments_document(profile_of(self.total(0.1), 60.0), shop)["segments"][0]
        assert found["share"] is not None
        assert {cell["typical"] for cell in found["profile"].values()} == {None}

    def test_without_profile_only_names_and_actions(self, shop: Contract) -> None:
        """Nothing is invented."""
        found = segments_document(None, shop)["segments"]
        assert found == [
            {"id": 0, "name": "low", "action": "call"},
            {"id": 1, "name": "high", "action": "thank"},
        ]

    def test_noise_alone_is_suppressed(self, shop: Contract) -> None:
        """A negative total does not make shares."""
        found = segments_document(profile_of(np.full(14, -50.0), 10.0), shop)["segments"]
        assert [segment["share"] for segment in found] == [None, None]


class TestPrivacy:
    """privacy.json."""

    def test_epsilon_is_that_of_all_events(self, outcome: Outcome, contract: Contract) -> None:
        """Composed together, and close to what the auditor finds from the same file."""
        found = privacy_document(outcome, contract)
        events = [event for stage in found["events"].values() for event in stage]
        assert sum(event["count"] for event in events) == len(outcome.events)
        assert found["epsilon"] == epsilon(map(from_document, events), found["delta"])
        assert recompute(events, found["delta"]) == pytest.approx(found["epsilon"], rel=0.02)

    def test_a_failed_attempt_is_among_the_events(
        self, outcome: Outcome, contract: Contract
    ) -> None:
        """Every charge is told, counted or not."""
        before = privacy_document(outcome, contract)
        update = next(item for item in outcome.events if item[0] == "update")
        outcome.events.append(update)
        outcome.survivors.append(None)
        after = privacy_document(outcome, contract)
        assert after["events"]["update"][0]["count"] == before["events"]["update"][0]["count"] + 1
        assert after["epsilon"] > before["epsilon"]

    @only_plain
    def test_towards_the_server_less_noise_is_counted(
        self, outcome: Outcome, contract: Contract
    ) -> None:
        """Unmasked, a message holds one share of the noise: sigma over sqrt(m)."""
        found = privacy_document(outcome, contract)
        shares = [
            GaussianSum(event.noise_multiplier / np.sqrt(3), event.sensitivity, event.count)
            for _, event in outcome.events
        ]
        assert found["epsilon_towards_server"] == pytest.approx(epsilon(shares, found["delta"]))
        assert found["epsilon_towards_server"] > found["epsilon"]

    @only_secure
    def test_towards_the_server_secure_sums_cost_no_more(
        self, outcome: Outcome, contract: Contract
    ) -> None:
        """The server sees what everybody may see."""
        found = privacy_document(outcome, contract)
        assert found["epsilon_towards_server"] == found["epsilon"]

    @only_secure
    def test_it_does_not_say_of_masked_sums_that_they_were_not(
        self, outcome: Outcome, contract: Contract
    ) -> None:
        """Neither in the field nor in a note."""
        found = privacy_document(outcome, contract)
        assert found["secure_aggregation"] is True
        assert not set(found["notes"]) & set(statements.NOT_MASKED.values())
        assert found["notes"] == [
            statements.sums_statement("distributed", secure=True, merchants=5)
        ]
        assert set(statements.MASKED_ASSUMPTIONS) <= set(found["assumptions"])

    @only_plain
    def test_it_says_that_sums_were_not_masked(self, outcome: Outcome, contract: Contract) -> None:
        """And nothing about seeds where there was none."""
        found = privacy_document(outcome, contract)
        assert found["notes"] == [statements.NOT_MASKED[contract.training.mode]]
        assert found["secure_aggregation"] is False
        assert not set(statements.MASKED_ASSUMPTIONS) & set(found["assumptions"])

    def test_a_seeded_run_is_not_for_release(
        self, contract: Contract, federate: Federate, run_over_grid: RunOverGrid
    ) -> None:
        """One seeded merchant is enough."""
        found = privacy_document(run_over_grid(federate(contract, seed=1)), contract)
        assert statements.NOT_FOR_RELEASE in found["notes"]

    @only_secure
    @pytest.mark.parametrize("stages", [("census",), ("update", "profile")])
    def test_stages_are_told_alone_too(
        self, outcome: Outcome, contract: Contract, stages: tuple[str, ...]
    ) -> None:
        """Each below the whole."""
        found = privacy_document(outcome, contract)
        for stage in stages:
            assert 0 < found["epsilon_by_stage"][stage] < found["epsilon"]


class TestColluders:
    """What noise was there, and what is left of it where merchants tell theirs."""

    def outcome(self, contract: Contract, survivors: list[int | None]) -> Outcome:
        """Give a run with one sum for every number of survivors."""
        events = [("update", plan_of(contract).update.event)] * len(survivors)
        parameters = initial_parameters(contract)
        return Outcome("run", parameters, 9.0, events=list(events), survivors=survivors)

    def by_hand(self, contract: Contract, *shares: float) -> float:
        """Return epsilon by mu^2 = sum of 1 / (sigma^2 * honest shares / counted on)."""
        sigma = plan_of(contract).update.event.noise_multiplier
        mu = math.sqrt(sum(1 / (sigma**2 * share) for share in shares))
        return gaussian_epsilon(mu, contract.privacy.delta)

    def test_table_by_hand(self, contract: Contract) -> None:
        """Of 5, 4 and (failed) 3 merchants where the plan counts on 3: sigma^2 n / m, less f."""
        found = privacy_document(self.outcome(contract, [5, 4, None]), contract)
        assert contract.noise_contributors == 3
        claimed = self.by_hand(contract, 1, 1, 1)
        assert found["epsilon"] == pytest.approx(claimed, rel=1e-9)
        assert found["achieved"] == {
            "epsilon": pytest.approx(self.by_hand(contract, 5 / 3, 4 / 3, 3 / 3), rel=1e-9),
            "survivors_min": 3,
            "survivors_max": 5,
        }
        assert [entry["colluders"] for entry in found["colluders"]] == [0, 1]
        assert [entry["epsilon"] for entry in found["colluders"]] == pytest.approx(
            [
                self.by_hand(contract, 5 / 3, 4 / 3, 3 / 3),
                self.by_hand(contract, 4 / 3, 3 / 3, 2 / 3),
            ],
            rel=1e-9,
        )

    @pytest.mark.parametrize(
        ("merchants", "counts"),
        [(1, [0, 1]), (2, [0, 1]), (5, [0, 1]), (10, [0, 1, 3]), (106, [0, 1, 11, 35])],
    )
    def test_counts_are_none_one_a_tenth_and_below_a_third(
        self, merchants: int, counts: list[int]
    ) -> None:
        """Without doubles; never as many as would break the masks."""
        assert colluder_counts(merchants) == counts
        if merchants > 1:
            assert all(merchants + f < 2 * threshold(merchants) for f in counts)

    def test_nothing_is_left_of_a_sum_of_colluders(self, contract: Contract) -> None:
        """Unbounded, in JSON null."""
        run = self.outcome(contract, [5, 2])
        assert achieved_epsilon(run, contract, 1) < math.inf
        assert achieved_epsilon(run, contract, 2) == math.inf
        alone = privacy_document(self.outcome(contract, [1]), contract)
        assert alone["colluders"][1] == {"colluders": 1, "epsilon": None}

    @pytest.mark.parametrize("survivors", [[3, 3], [4, 5], [None, 200]], ids=str)
    def test_enough_survivors_never_exceed_the_claim(
        self, contract: Contract, survivors: list[int | None]
    ) -> None:
        """The claim counts on the fewest; more noise only helps."""
        found = privacy_document(self.outcome(contract, survivors), contract)
        assert found["achieved"]["epsilon"] <= found["epsilon"] * (1 + 1e-12)

    def test_colluders_that_the_contract_allows_are_within_the_claim(
        self, contract: Contract
    ) -> None:
        """With aggregation.colluders = 1 one colluder leaves what was promised."""
        contract = contract.revised(aggregation={"colluders": 1})
        run = self.outcome(contract, [3])
        assert achieved_epsilon(run, contract, 1) == pytest.approx(
            self.by_hand(contract, 1), rel=1e-9
        )

    def test_own_noise_is_not_lessened(self, contract: Contract) -> None:
        """In mode local every merchant's own noise is the whole."""
        contract = contract.revised(training={"mode": "local"})
        run = self.outcome(contract, [5, None])
        found = {achieved_epsilon(run, contract, colluders) for colluders in (0, 1, 5, 99)}
        assert found == {epsilon([event for _, event in run.events], contract.privacy.delta)}

    def test_a_run_tells_how_many_took_part(self, outcome: Outcome, contract: Contract) -> None:
        """Five of five, so that less is achieved than was claimed."""
        found = privacy_document(outcome, contract)
        assert found["achieved"]["survivors_min"] == found["achieved"]["survivors_max"] == 5
        assert found["achieved"]["epsilon"] < found["epsilon"]


class TestBundle:
    """The files together."""

    def test_the_files_are_those_of_a_bundle(self, published: Path) -> None:
        """Everything is there, and the manifest fits."""
        assert sorted(path.name for path in published.iterdir()) == [
            "MODEL_CARD.md",
            "contract.toml",
            "manifest.json",
            "metrics.json",
            "model.onnx",
            "model.safetensors",
            "privacy.json",
            "segments.json",
        ]
        read_bundle(published)

    def test_the_parameters_are_those_of_the_run(
        self, published: Path, outcome: Outcome, contract: Contract
    ) -> None:
        """As one vector, and as layers."""
        tensors = load_file(published / "model.safetensors")
        flat = outcome.parameters.astype(np.float32)
        np.testing.assert_array_equal(tensors["parameters"], flat)
        layer = flat.reshape(4, contract.inputs + 1)
        np.testing.assert_array_equal(tensors["layer0.weight"], layer[:, :-1])
        np.testing.assert_array_equal(tensors["layer0.bias"], layer[:, -1])

    def test_the_contract_is_the_same(self, published: Path, contract: Contract) -> None:
        """Same hash, read back from the bundle."""
        assert read_contract(published / "contract.toml").sha256 == contract.sha256

    def test_no_exact_figure_is_in_it(
        self, published: Path, outcome: Outcome, contract: Contract, federate: Federate
    ) -> None:
        """Neither confusion counts nor the number of customers are the merchants' exact ones."""
        bundle = read_bundle(published)
        workers = [member.worker for member in federate(contract, ledgers="again").members]
        exact = sum(
            confusion_counts(
                worker._test[1], bundle.network.predictions(bundle.parameters, worker._test[0]), 4
            )
            for worker in workers
        )
        assert not np.any(outcome.evaluations[-1].total == exact)
        assert outcome.customers != sum(len(worker._train[1]) for worker in workers)
        told = json.loads((published / "metrics.json").read_text())["confusion"]
        np.testing.assert_allclose(np.ravel(told), outcome.evaluations[-1].total, atol=0.005)

    @only_plain
    def test_no_merchants_own_message_is_in_it(self, published: Path, outcome: Outcome) -> None:
        """Only sums are published."""
        text = "".join(
            path.read_text() for path in published.iterdir() if path.suffix in {".json", ".md"}
        )
        sums = [outcome.evaluations[-1], outcome.profile]
        parts = [part for total in sums if total is not None for part in total.parts.values()]
        assert len(parts) == 2 * len(outcome.merchants)
        assert not any(repr(float(value)) in text for part in parts for value in part)
        confusion = np.array(json.loads((published / "metrics.json").read_text())["confusion"])
        for part in outcome.evaluations[-1].parts.values():
            assert np.abs(part - confusion.ravel()).max() > 1.0

    def test_json_is_standard(self, published: Path) -> None:
        """No NaN, no infinity."""

        def refuse(word: str) -> Any:
            raise AssertionError(word)

        for path in published.glob("*.json"):
            json.loads(path.read_text(), parse_constant=refuse)

    def test_a_model_that_is_not_finite_is_not_published(
        self, outcome: Outcome, contract: Contract, tmp_path: Path
    ) -> None:
        """Nothing is written."""
        outcome.parameters[0] = np.nan
        with pytest.raises(Exception, match=r"model\.onnx"):
            publish(outcome, contract, tmp_path / "b", Ed25519PrivateKey.generate())
        assert not (tmp_path / "b").exists()
