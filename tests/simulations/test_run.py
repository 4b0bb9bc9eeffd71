"""Contract and merchants to a finished run: seeds, books, assignments, folders."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from flwr.app import Message

from audit.epsilon import recompute
from clients.features import encode
from common import statements
from common.accounting import epsilon
from common.bundle import read_bundle
from common.contract import Contract
from common.errors import DataError, RunError
from common.events import merged, to_document
from simulations.datasets import Dataset, load, write_federation
from simulations.federation import assemble, open_federation
from simulations.members import Federation
from simulations.result import RoundRecord, SimulationResult
from simulations.run import prepare_folder, simulate
from simulations.tables import summary_lines
from tests.witnessed import charges_of

MERCHANTS = 4

RunSmall = Callable[..., SimulationResult]


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate four merchants."""
    return load("synthetic", preset="smoke", merchants=MERCHANTS)


@pytest.fixture(scope="module")
def contract(dataset: Dataset) -> Contract:
    """Give a contract of three rounds; three of four merchants are enough."""
    return dataset.contract.revised(
        federation={"round_timeout_s": 0.02},
        training={"rounds": 3},
        model={"hidden": [4]},
        publication={"evaluate_every": 2},
    )


@pytest.fixture
def run_small(dataset: Dataset, contract: Contract, tmp_path: Path) -> RunSmall:
    """Give the function that runs a new small federation in a folder of its own."""

    def run(
        name: str = "out",
        *,
        seed: int | None = 1,
        contract: Contract = contract,
        change: Callable[[Federation], Federation] = lambda federation: federation,
        fault: Callable[[Message], str | None] | None = None,
    ) -> SimulationResult:
        out = tmp_path / name
        prepare_folder(out, overwrite=False)
        federation = change(assemble(dataset, contract, out, seed))
        return simulate(federation, out, lambda _record, _rounds: None, fault)

    return run


def model_of(result: SimulationResult) -> bytes:
    """Read the published model's bytes."""
    return (result.bundle / "model.safetensors").read_bytes()


class TestSeeds:
    """What repeats, and what must not."""

    @pytest.mark.slow
    @pytest.mark.parametrize("mode", ["distributed", "local"])
    def test_a_seed_gives_the_same_model_twice(
        self, run_small: RunSmall, contract: Contract, mode: str
    ) -> None:
        """To the last byte; so are the noisy figures."""
        contract = contract.revised(training={"mode": mode})
        first, second = (run_small(name, contract=contract) for name in ("a", "b"))
        assert model_of(first) == model_of(second)
        assert first.confusion == second.confusion
        assert first.segments == second.segments

    @pytest.mark.slow
    def test_merchants_in_another_order_give_the_same_model(self, run_small: RunSmall) -> None:
        """Noise belongs to the merchant, not to its node."""
        first = run_small("a")
        second = run_small("b", change=lambda f: replace(f, members=f.members[::-1]))
        assert model_of(first) == model_of(second)

    @pytest.mark.slow
    def test_another_seed_gives_another_model(self, run_small: RunSmall) -> None:
        """The seed is used."""
        assert model_of(run_small("a", seed=1)) != model_of(run_small("b", seed=2))

    @pytest.mark.slow
    def test_without_a_seed_no_two_models_are_alike(self, run_small: RunSmall) -> None:
        """The operating system keys the noise."""
        assert model_of(run_small("a", seed=None)) != model_of(run_small("b", seed=None))

    @pytest.mark.slow
    def test_a_seeded_result_says_so_everywhere(self, run_small: RunSmall) -> None:
        """In the result, the closing lines, the card and privacy.json."""
        result = run_small(seed=1)
        assert statements.NOT_FOR_RELEASE in result.notes
        privacy = json.loads((result.bundle / "privacy.json").read_text())
        assert statements.NOT_FOR_RELEASE in privacy["notes"]
        assert statements.NOT_FOR_RELEASE in (result.bundle / "MODEL_CARD.md").read_text()
        assert any("not for release" in line.plain for line in summary_lines(result))

    @pytest.mark.slow
    def test_an_unseeded_result_does_not(self, run_small: RunSmall) -> None:
        """Nowhere."""
        result = run_small(seed=None)
        assert statements.NOT_FOR_RELEASE not in result.notes
        assert statements.NOT_FOR_RELEASE not in (result.bundle / "MODEL_CARD.md").read_text()

    @pytest.mark.slow
    def test_a_seed_gives_the_same_model_in_two_processes(self, tmp_path: Path) -> None:
        """Nothing depends on hash seeds, threads or memory."""
        code = (
            "import sys; from pathlib import Path; import hansa;"
            "d = hansa.load('synthetic', preset='smoke', merchants=4);"
            "c = d.contract.revised(training={'rounds': 3}); o = Path(sys.argv[1]); o.mkdir();"
            "hansa.simulate(hansa.assemble(d, c, o, 5), o, lambda *_: None)"
        )
        models = []
        for number in ("1", "2"):
            out = tmp_path / number
            environment = {**os.environ, "PYTHONHASHSEED": number, "OMP_NUM_THREADS": number}
            subprocess.run([sys.executable, "-c", code, str(out)], check=True, env=environment)
            models.append((out / "bundle/model.safetensors").read_bytes())
        assert models[0] == models[1]


class TestBooks:
    """Epsilon printed is what was spent."""

    @pytest.mark.parametrize(
        "training",
        [
            {"mode": "distributed"},
            {"mode": "local"},
            {"mode": "local", "local_optimizer": "adam", "local_learning_rate": 0.01},
            pytest.param(
                {"mode": "local", "sampling_rate": 0.3, "local_steps": 2}, marks=pytest.mark.slow
            ),
        ],
        ids=["distributed", "local", "local adam", "sampled"],
    )
    @pytest.mark.parametrize("secure", [True, False], ids=["secure", "plain"])
    def test_epsilon_is_that_of_all_ledger_entries(
        self, run_small: RunSmall, contract: Contract, training: dict[str, object], secure: bool
    ) -> None:
        """Composed here, confirmed by the auditor, and never above the contract's."""
        seen: list[Federation] = []
        contract = contract.revised(training=training, aggregation={"secure": secure})
        result = run_small(contract=contract, change=lambda f: seen.append(f) or f)
        for member in seen[0].members:
            ledger = member.worker.ledger
            events = merged(charge.event for charge in charges_of(ledger, result.run).values())
            assert result.epsilon == epsilon(events, result.delta)
            audited = recompute([to_document(event) for event in events], result.delta)
            assert result.epsilon == pytest.approx(audited, rel=0.02)
            member.worker.ledger.close()
        assert result.epsilon_recomputed == pytest.approx(result.epsilon, rel=0.02)
        assert 0 < result.epsilon <= contract.privacy.epsilon
        privacy = json.loads((result.bundle / "privacy.json").read_text())
        assert privacy["epsilon"] == result.epsilon
        assert privacy["epsilon_towards_server"] == pytest.approx(result.epsilon_server)
        whole_shares = secure or contract.training.mode == "local"
        assert (result.epsilon_server == result.epsilon) == whole_shares

    def test_rounds_tell_what_was_spent_so_far(self, run_small: RunSmall) -> None:
        """Rising, and evaluated where the contract says."""
        result = run_small()
        spent = [record.epsilon for record in result.rounds]
        assert spent == sorted(spent)
        assert spent[-1] < result.epsilon
        assert [record.round for record in result.rounds] == [1, 2, 3]

    @pytest.mark.parametrize("secure", [True, False], ids=["secure", "plain"])
    def test_in_local_mode_the_server_learns_no_more(
        self, run_small: RunSmall, contract: Contract, secure: bool
    ) -> None:
        """Each message is private by itself."""
        sections = {"training": {"mode": "local"}, "aggregation": {"secure": secure}}
        result = run_small(contract=contract.revised(**sections))
        assert result.epsilon_server == result.epsilon

    def test_every_merchant_knows_whose_noise_was_in_a_secure_sum(
        self, run_small: RunSmall, contract: Contract
    ) -> None:
        """Its own ledger says for each charge how many merchants the sum held."""
        seen: list[Federation] = []
        result = run_small(change=lambda f: seen.append(f) or f)
        for member in seen[0].members:
            account = member.worker.ledger.account().runs[result.run]
            assert account.released
            assert account.survivors == dict.fromkeys(account.released, MERCHANTS)
            assert account.settled
            member.worker.ledger.close()

    @pytest.mark.parametrize(("secure", "cohorts"), [(False, [3, 4, 4]), (True, [3, 3, 3])])
    def test_a_merchant_that_misses_a_round_is_told_and_pays_less(
        self, run_small: RunSmall, contract: Contract, secure: bool, cohorts: list[int]
    ) -> None:
        """The result's epsilon is the most of any merchant; a session goes on without it."""
        fate = iter(["silent"])

        def fault(message: Message) -> str | None:
            lost = message.metadata.dst_node_id == 3
            return next(fate, None) if lost and "update" in message.metadata.message_type else None

        contract = contract.revised(aggregation={"secure": secure})
        result = run_small(contract=contract, fault=fault)
        spent = {merchant.id: merchant.epsilon for merchant in result.merchants}
        assert spent["merchant-0001"] < result.epsilon == spent["merchant-0000"]
        assert any("merchant-0001: no answer" in note for note in result.notes)
        assert [record.cohort for record in result.rounds] == cohorts

    def test_a_private_model_without_profiles_has_a_result(
        self, run_small: RunSmall, contract: Contract
    ) -> None:
        """Segments have names and nothing else."""
        result = run_small(contract=contract.revised(publication={"profiles": False}))
        assert [(s.share, s.profile) for s in result.segments] == [(None, {})] * 4
        assert "profile" not in result.spent


class TestAssignments:
    """What every merchant gets for its own customers."""

    @pytest.fixture
    def result(self, run_small: RunSmall) -> SimulationResult:
        """Run once."""
        return run_small()

    def test_both_files_say_the_same(self, result: SimulationResult) -> None:
        """One row a customer, in the table's order, the numbers to the last digit."""
        for number in range(MERCHANTS):
            folder = result.bundle.parent / "merchants" / f"merchant-{number:04d}"
            parquet = pd.read_parquet(folder / "assignments.parquet")
            text = pd.read_csv(folder / "assignments.csv", dtype=str)
            assert len(parquet) == 50
            assert list(parquet.columns) == list(text.columns)
            for column in parquet.columns:
                ours, theirs = parquet[column].to_numpy(), text[column].to_numpy()
                kind = ours.dtype if ours.dtype.kind in "if" else object
                assert (ours == theirs.astype(kind)).all(), column

    def test_probabilities_are_the_published_models(
        self, result: SimulationResult, dataset: Dataset, contract: Contract, tmp_path: Path
    ) -> None:
        """The same as onnxruntime finds on encoded rows; sums, margins and names fit."""
        bundle = read_bundle(result.bundle)
        session = onnxruntime.InferenceSession(
            str(result.bundle / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        federation = assemble(dataset, contract, tmp_path / "again", 1)
        for member in federation.members:
            found = pd.read_parquet(
                result.bundle.parent / "merchants" / member.merchant / "assignments.parquet"
            )
            table = federation.tables[member.merchant]
            inputs = encode(table, contract).astype(np.float32)
            expected = session.run(None, {"inputs": inputs})[0]
            names = contract.segments.names
            given = found[[f"p_{name}" for name in names]].to_numpy()
            np.testing.assert_allclose(given, expected, atol=1e-5)
            np.testing.assert_allclose(given.sum(axis=1), 1.0, rtol=1e-6)
            ordered = np.sort(given, axis=1)
            np.testing.assert_allclose(found["probability"], ordered[:, -1])
            np.testing.assert_allclose(found["margin"], ordered[:, -1] - ordered[:, -2])
            assert (found["segment_id"] == given.argmax(axis=1)).all()
            assert (found["segment"] == [names[i] for i in found["segment_id"]]).all()
            assert set(found["model_sha256"]) == {bundle.model_sha256}
            assert list(found["customer"]) == list(table.customer_ids)

    def test_they_are_their_owners_only(self, result: SimulationResult) -> None:
        """Nobody else on the machine can read them."""
        files = list(result.bundle.parent.glob("merchants/*/assignments.*"))
        assert len(files) == 2 * MERCHANTS
        assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}

    def test_a_merchant_that_refused_gets_them_too(
        self, run_small: RunSmall, contract: Contract
    ) -> None:
        """The model is published, and its customers are its own."""

        def refuse(federation: Federation) -> Federation:
            federation.members[2].worker._accept_unmasked_sums = False
            return federation

        contract = contract.revised(aggregation={"secure": False})
        result = run_small("refused", contract=contract, change=refuse)
        assert "accept_unmasked_sums" in str(result.merchants[2].refused)
        assert result.merchants[2].epsilon == 0.0
        assert (result.bundle.parent / "merchants/merchant-0002/assignments.csv").is_file()


class TestFailedRun:
    """A run that ends in an error leaves nothing that looks finished."""

    def test_no_bundle_and_no_assignments(self, run_small: RunSmall, tmp_path: Path) -> None:
        """Only contract, members, ledgers, which are spent, and the coordinator's record of it."""
        with pytest.raises(RunError):
            run_small(fault=lambda m: "down" if "evaluate" in m.metadata.message_type else None)
        out = tmp_path / "out"
        own = {path.name for path in (out / "server").rglob("*") if path.is_file()}
        assert own == {"identity.key", "witness.sqlite", "contract.toml", "run.jsonl"}
        (record,) = (out / "server" / "runs").glob("*/run.jsonl")
        kinds = [json.loads(line)["kind"] for line in record.read_text().splitlines()]
        assert kinds[0] == "start"
        assert "end" not in kinds
        shutil.rmtree(out / "server")
        left = {path.name for path in out.rglob("*") if path.is_file()}
        ledgers = {"ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}
        assert left <= {"contract.toml", "members.toml", *ledgers}

    def test_its_folder_can_be_used_again(self, run_small: RunSmall, tmp_path: Path) -> None:
        """With overwrite, as the message says."""
        with pytest.raises(RunError):
            run_small(fault=lambda _message: "down")
        prepare_folder(tmp_path / "out", overwrite=True)
        assert list((tmp_path / "out").iterdir()) == []

    def test_an_error_while_rounds_are_shown_leaves_no_bundle(
        self, dataset: Dataset, contract: Contract, tmp_path: Path
    ) -> None:
        """An interruption ends the run there and then."""

        def interrupt(_record: RoundRecord, _rounds: int) -> None:
            raise KeyboardInterrupt

        prepare_folder(tmp_path / "o", overwrite=False)
        federation = assemble(dataset, contract, tmp_path / "o", 1)
        with pytest.raises(KeyboardInterrupt):
            simulate(federation, tmp_path / "o", interrupt)
        assert not (tmp_path / "o" / "bundle").exists()


class TestFolder:
    """What may be overwritten."""

    def test_a_new_folder_is_made(self, tmp_path: Path) -> None:
        """With its parents."""
        prepare_folder(tmp_path / "a" / "b", overwrite=False)
        assert (tmp_path / "a" / "b").is_dir()

    def test_an_empty_folder_is_taken(self, tmp_path: Path) -> None:
        """There is nothing to lose."""
        prepare_folder(tmp_path, overwrite=False)

    def test_a_folder_with_something_in_it_is_not(self, tmp_path: Path) -> None:
        """The message says what to do."""
        (tmp_path / "thesis.docx").touch()
        with pytest.raises(DataError, match="--overwrite"):
            prepare_folder(tmp_path, overwrite=False)

    def test_an_earlier_simulation_is_overwritten_when_asked(self, run_small: RunSmall) -> None:
        """All of it."""
        out = run_small().bundle.parent
        (out / "report.html").touch()
        prepare_folder(out, overwrite=True)
        assert list(out.iterdir()) == []

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["thesis.docx", "merchants/notes.txt", "merchants/m/own.csv"])
    def test_what_is_not_of_a_simulation_is_never_deleted(
        self, run_small: RunSmall, name: str
    ) -> None:
        """One strange file keeps the whole folder."""
        out = run_small().bundle.parent
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
        with pytest.raises(DataError, match="not overwritten"):
            prepare_folder(out, overwrite=True)
        assert (out / name).read_text() == "mine"
        assert (out / "bundle" / "manifest.json").is_file()

    def test_a_federations_folder_is_never_deleted(
        self, dataset: Dataset, run_small: RunSmall, tmp_path: Path
    ) -> None:
        """Also after `flwr run` has put a bundle into it: it holds customers and real ledgers."""
        write_federation(dataset, tmp_path / "f")
        run_small().bundle.rename(tmp_path / "f" / "bundle")
        with pytest.raises(DataError, match="not overwritten"):
            prepare_folder(tmp_path / "f", overwrite=True)
        assert len(open_federation(tmp_path / "f").members) == MERCHANTS

    def test_a_coordinators_folder_is_never_deleted(
        self, dataset: Dataset, run_small: RunSmall, tmp_path: Path
    ) -> None:
        """Where merchants keep their files themselves it looks much like a simulation's."""
        folder = tmp_path / "f"
        write_federation(dataset, folder)
        run_small().bundle.rename(folder / "bundle")
        shutil.rmtree(folder / "merchants")
        with pytest.raises(DataError, match="not overwritten"):
            prepare_folder(folder, overwrite=True)
        assert (folder / "server" / "identity.key").is_file()

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_a_file_is_no_folder(self, tmp_path: Path, overwrite: bool) -> None:
        """Neither itself nor what is below it."""
        (tmp_path / "file").write_text("mine")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(DataError, match="cannot be used as a folder"):
                prepare_folder(path, overwrite=overwrite)
        assert (tmp_path / "file").read_text() == "mine"

    def test_what_a_link_points_to_is_never_deleted(
        self, run_small: RunSmall, tmp_path: Path
    ) -> None:
        """The link is refused."""
        out = run_small().bundle.parent
        (tmp_path / "link").symlink_to(out)
        with pytest.raises(DataError, match="not overwritten"):
            prepare_folder(tmp_path / "link", overwrite=True)
        assert (out / "bundle").is_dir()
