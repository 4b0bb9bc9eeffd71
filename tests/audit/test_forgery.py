"""Forgeries by parties that hold their own keys, and what the data at hand show of them."""

import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from audit import spending
from audit.findings import Audit
from audit.spending import MOST_KINDS
from audit.verify import verify
from common import statements
from common.events import PoissonGaussianSum
from common.identity import Identity
from tests.audit.evidence_world import (
    DAY_S,
    Document,
    Shop,
    World,
    bundled,
    small_contract,
)

Tamper = Callable[[World], None]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    """Give two finished runs with secure sums, and one with plain sums."""
    found = {}
    for name, secure in (("secure", True), ("plain", False)):
        found[name] = World.founded(small_contract(aggregation={"secure": secure}))
        for run in ("run-1", "run-2")[: 2 if secure else 1]:
            found[name].run(run, tmp_path_factory.mktemp(name))
    return found


@pytest.fixture
def world(finished: dict[str, World]) -> World:
    """Give a copy of the runs with secure sums."""
    return finished["secure"].clone()


def serious(audit: Audit) -> set[str]:
    """Return the codes of findings that are no mere notes."""
    return {finding.code for finding in audit.findings if finding.severity != "note"}


def of_shop(world: World, folder: Path) -> set[str]:
    """Return what is found in the first merchant's evidence by itself."""
    world.write_shop(world.shops[0], folder / "shop.zip")
    return serious(verify([folder / "shop.zip"]))


def of_all(world: World, folder: Path) -> set[str]:
    """Return what is found in everybody's evidence."""
    return serious(verify([world.write(folder / "evidence")]))


def anew(change: Callable[[Shop, list[Document]], list[Document]], shop: int = 0) -> Tamper:
    """Return what a merchant does that writes its ledger anew, with a witness that colludes."""

    def tamper(world: World) -> None:
        chosen = world.shops[shop]
        chosen.rewrite(change(chosen, chosen.documents))
        world.witness_anew(chosen)

    return tamper


def edited(kind: str, number: int = 0, **changes: Any) -> Tamper:
    """Return the tampering that changes fields of an entry of a kind."""

    def change(shop: Shop, found: list[Document]) -> list[Document]:
        found[shop.index(kind, number)].update(changes)
        return found

    return anew(change)


def opened_twice(shop: Shop, found: list[Document]) -> list[Document]:
    """Open one sum for two sets of merchants: their difference is one merchant's own."""
    at = shop.index("sum", 1)
    return [*found[: at + 1], {**found[at], "survivors": 3}, *found[at + 1 :]]


MERCHANT: dict[str, tuple[Tamper, set[str]]] = {
    "released without a mask": (edited("release", 1, step=""), {"step-not-joined"}),
    "opened a sum over one": (edited("sum", 1, survivors=1), {"below-threshold"}),
    "opened a sum twice": (anew(opened_twice), {"step-twice"}),
    "joined a session of one": (edited("join", members=1), {"below-threshold"}),
}


class TestMerchant:
    """What a merchant's own ledger admits, whoever else helps to hide it."""

    @pytest.mark.parametrize("name", MERCHANT)
    def test_tampering(self, world: World, tmp_path: Path, name: str) -> None:
        """Each is found in that merchant's evidence alone."""
        tamper, expected = MERCHANT[name]
        tamper(world)
        assert of_shop(world, tmp_path) >= expected

    def test_a_delta_that_says_nothing(self, world: World, tmp_path: Path) -> None:
        """With a delta of 0.9 any epsilon is small: no policy may have it."""
        shop = world.shops[0]
        documents = shop.documents
        for document in documents:
            if document["kind"] == "reserve":
                document["policy"]["delta"] = 0.9
        shop.rewrite(documents)
        world.witness_anew(shop)
        assert of_shop(world, tmp_path) == {"entry-schema"}
        world = world.clone()
        world.shops[1].policy["delta"] = 0.9
        world.write_shop(world.shops[1], tmp_path / "other.zip")
        assert serious(verify([tmp_path / "other.zip"])) == {"evidence-incomplete"}

    def test_a_period_made_up_afterwards(self, tmp_path: Path) -> None:
        """What the policy says today excuses no run that expired under an earlier one."""
        world = World.founded(small_contract(), refresh_days=30.0)
        world.run("run-1", tmp_path)
        world.now += 5 * DAY_S
        for shop in world.shops:
            world.countersign(shop)
            world.enter(shop, kind="expire", run="run-1")
        world.run("run-2", tmp_path)
        world.shops[0].policy["refresh_days"] = 0.001
        assert "expired-early" in of_shop(world, tmp_path)

    def test_older_evidence_that_holds_more(self, world: World, tmp_path: Path) -> None:
        """A ledger that was longer once, by evidence of an earlier day, was put back."""
        world.write_shop(world.shops[0], tmp_path / "earlier.zip")
        world.now += DAY_S
        shop = world.shops[0]
        last = shop.index("reserve", 1)
        shop.rewrite(shop.documents[:last])
        world.witness_anew(shop)
        world.now += DAY_S
        world.write_shop(shop, tmp_path / "later.zip")
        assert serious(verify([tmp_path])) == {"rolled-back"}

    def test_claims_to_be_older_than_a_run_that_it_knows(
        self, world: World, tmp_path: Path
    ) -> None:
        """A date before the run excuses no release that is missing from its reservation on."""
        shop = world.shops[0]
        at = shop.index("reserve", 1)
        shop.rewrite(shop.documents[: at + 1])
        shop.seen = [s for s in shop.seen if json.loads(s.body)["seq"] <= at + 1]
        world.write(tmp_path)
        now, world.now = world.now, world.records["run-2"][0]["at"] - 0.5
        world.write_shop(shop, tmp_path / "shop-0.zip")
        world.now = now
        assert "release-without-event" in serious(verify([tmp_path]))


def documents(name: str, change: Callable[[Document], Any]) -> Tamper:
    """Return the tampering that changes a document of a bundle and signs it anew."""

    def tamper(world: World) -> None:
        files = dict(world.bundles["run-1"])
        document = json.loads(files[name])
        change(document)
        files[name] = json.dumps(document).encode()
        with tempfile.TemporaryDirectory() as folder:
            world.bundles["run-1"] = bundled(files, world.server, Path(folder) / "bundle")

    return tamper


def signed_by_another(world: World) -> None:
    """Publish the very same figures, signed by somebody that nobody pinned."""
    with tempfile.TemporaryDirectory() as folder:
        files, other = world.bundles["run-1"], Identity.generate("coordinator")
        world.bundles["run-1"] = bundled(files, other, Path(folder) / "bundle")


def hide_the_profile(world: World) -> None:
    """Publish as if the last sum had never been asked for, and leave out that the run ended."""
    record = world.records["run-1"]
    world.records["run-1"] = [
        line for line in record if line["kind"] != "end" and line.get("stage") != "profile"
    ]


def other_model_in_a_failed_sum(world: World) -> None:
    """Show a merchant a model of its own, in a sum that nothing is said to have come of."""
    shop = world.shops[0]
    found = shop.documents
    at = next(
        i
        for i, d in enumerate(found)
        if d["kind"] == "release"
        and (d["round"], d["attempt"]) == (2, 0)
        and d["stage"] == "update"
    )
    found[at]["parameters"] = "ab" * 32
    shop.rewrite(found)
    world.witness_anew(shop)
    world.log = []


def starts_in_the_future(world: World) -> None:
    """Hide a sum, and date the run after all evidence: nobody's is new enough then."""
    record = world.records["run-1"]
    record[0]["at"] = world.now + 1e6
    record.remove(next(d for d in record if d.get("total", "") is None))


def segment(**changes: Any) -> Callable[[Document], None]:
    """Return what changes the first segment, as published."""
    return lambda found: found["segments"][0].update(changes)


def cell(**changes: Any) -> Callable[[Document], None]:
    """Return what changes the first cell of the first segment's profile, as published."""
    return lambda found: found["segments"][0]["profile"]["spend"].update(changes)


COORDINATOR: dict[str, tuple[Tamper, set[str]]] = {
    "profile hidden, run not ended": (hide_the_profile, {"bundle-differs"}),
    "signed by another": (signed_by_another, {"bundle-differs"}),
    "another model in a failed sum": (other_model_in_a_failed_sum, {"release-differs"}),
    "run dated after all evidence": (starts_in_the_future, {"unknown-to-server"}),
    "no colluders told": (
        documents("privacy.json", lambda d: d.pop("colluders")),
        {"privacy-differs"},
    ),
    "fewer colluders told": (
        documents("privacy.json", lambda d: d["colluders"].pop()),
        {"privacy-differs"},
    ),
    "colluders below nought": (
        documents("privacy.json", lambda d: d["colluders"][0].update(colluders=-90, epsilon=0.2)),
        {"privacy-differs"},
    ),
    "epsilon of a stage": (
        documents("privacy.json", lambda d: d["epsilon_by_stage"].update(update=0.01)),
        {"privacy-differs"},
    ),
    "epsilon of a merchant": (
        documents("privacy.json", lambda d: d["merchants"].update({"shop-0": 0.01})),
        {"privacy-differs"},
    ),
    "another unit": (
        documents("privacy.json", lambda d: d.update(unit_of_privacy="one purchase")),
        {"privacy-differs"},
    ),
    "accuracy": (
        documents("metrics.json", lambda d: d.update(accuracy=0.99)),
        {"published-differs"},
    ),
    "error of the accuracy": (
        documents("metrics.json", lambda d: d.update(accuracy_error=1e-6)),
        {"published-differs"},
    ),
    "F1": (documents("metrics.json", lambda d: d.update(macro_f1=0.99)), {"published-differs"}),
    "noise of a count": (
        documents("metrics.json", lambda d: d.update(count_stddev=0.1)),
        {"published-differs"},
    ),
}


def add_file(world: World) -> None:
    """Publish a file beside those of a bundle: it could hold anything, single vectors too."""
    files = {**world.bundles["run-1"], "vectors.json": b"[1, 2, 3]"}
    with tempfile.TemporaryDirectory() as folder:
        world.bundles["run-1"] = bundled(files, world.server, Path(folder) / "bundle")


def other_layers(world: World) -> None:
    """Publish layers that are not those of the parameters."""
    files = dict(world.bundles["run-1"])
    tensors = load(files["model.safetensors"])
    files["model.safetensors"] = save({**tensors, "layer0.bias": np.ones(2, np.float32)})
    with tempfile.TemporaryDirectory() as folder:
        world.bundles["run-1"] = bundled(files, world.server, Path(folder) / "bundle")


COORDINATOR |= {
    "another file in the bundle": (add_file, {"bundle-invalid"}),
    "layers of another model": (other_layers, {"bundle-invalid"}),
    "seeded by its own word": (
        documents("privacy.json", lambda d: d["notes"].append(statements.NOT_FOR_RELEASE)),
        {"noise-seeded"},
    ),
}


class TestCoordinator:
    """What a coordinator publishes and records, with nobody's help."""

    @pytest.mark.parametrize("name", COORDINATOR)
    def test_tampering(self, world: World, tmp_path: Path, name: str) -> None:
        """Each is found in everybody's evidence."""
        tamper, expected = COORDINATOR[name]
        tamper(world)
        assert of_all(world, tmp_path) >= expected

    def test_hidden_run_behind_an_early_date(self, world: World, tmp_path: Path) -> None:
        """Evidence that claims to be older than a hidden run is asked for anew."""
        world.write(tmp_path)
        del world.records["run-2"]
        world.bundles.pop("run-2")
        world.now = world.records["run-1"][0]["at"]
        world.log = [line for line in world.log if json.loads(line["body"])["at"] <= world.now]
        world.write_server(tmp_path / "coordinator.zip")
        found = verify([tmp_path]).findings
        told = {(f.code, f.severity) for f in found if "coordinator" in f.where + f.message}
        assert ("evidence-older", "warning") in told

    def test_an_older_log_is_remembered(self, world: World, tmp_path: Path) -> None:
        """A ledger that both sides wrote anew is held against the witness's older log too."""
        world.write_server(tmp_path / "earlier.zip")
        world.now += DAY_S
        for shop in world.shops:  # every release of the first update is gone
            shop.rewrite([d for d in shop.documents if d.get("run") != "run-2"])
        world.log = []
        del world.records["run-2"]
        del world.bundles["run-2"]
        for shop in world.shops:
            world.witness_anew(shop)
        world.write(tmp_path / "new")
        assert serious(verify([tmp_path / "new"])) <= {"advert-head-unknown", "witness-clock"}
        assert serious(verify([tmp_path])) & {"forked", "rolled-back"}


class TestHonestTrouble:
    """What happens to honest parties is no lie."""

    def test_stopped_between_the_end_and_the_profile(self, world: World, tmp_path: Path) -> None:
        """The last sum comes after the final model is recorded: a coordinator may stop there."""
        world.records["run-2"] = [
            line for line in world.records["run-2"] if line.get("stage") != "profile"
        ]
        del world.bundles["run-2"]
        assert of_all(world, tmp_path) == {"bundle-missing", "record-ends-early"}


class TestHeavy:
    """Evidence that is made to keep an auditor busy."""

    def test_many_kinds_of_sampled_sums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hundreds of different sampled sums are no way to make an audit hang."""
        composed = []

        def recompute(events: list[dict[str, Any]], _delta: float) -> float:
            composed.append(len(events))
            return 1.0

        monkeypatch.setattr(spending, "recompute", recompute)
        for kinds, expected in ((MOST_KINDS, 1.0), (MOST_KINDS + 1, math.inf)):
            events = [PoissonGaussianSum(1.0 + k / 1000, 1.0, 0.01, 3) for k in range(kinds)]
            assert spending.quick_epsilon(events, 1e-5) == expected
            assert spending.epsilon_of(events, 1e-5) == expected
        assert composed
        assert max(composed) <= MOST_KINDS

    def test_a_file_of_empty_lines(self, world: World, tmp_path: Path) -> None:
        """Lines are read one by one, not first all and then each."""
        world.write_shop(world.shops[0], tmp_path / "shop.zip", **{"ledger.jsonl": b"\n" * 10**7})
        assert serious(verify([tmp_path])) == {"ledger-unreadable"}
