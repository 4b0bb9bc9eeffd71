"""The catalogue, ready contracts, choosing a data set, and writing it as a federation."""

import stat
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clients.features import encode
from clients.merchant import read_merchant
from clients.table import is_held_out, read_table
from common.contract import read_contract
from common.errors import ContractError, DataError
from common.identity import read_identity, read_members
from common.network import parameters_sha256
from common.start import starting_parameters
from simulations.catalogue import CatalogueEntry
from simulations.datasets import (
    Dataset,
    catalogue,
    load,
    ready_contract,
    ready_contracts,
    ready_start,
    write_federation,
)
from simulations.federation import open_federation


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate three merchants."""
    return load("synthetic", preset="smoke", merchants=3)


def test_every_label_of_the_catalogue_has_a_ready_contract() -> None:
    """Names in the catalogue and files in the package are the same."""
    expected = set()
    for entry in catalogue():
        parts = entry.partitions if entry.name == "complete-journey" else [""]
        for part in parts:
            prefix = f"{entry.name}-{part}" if part else entry.name
            expected |= {f"{prefix}-{label}" for label in entry.labels}
    assert set(ready_contracts()) == expected


@pytest.mark.parametrize("name", ready_contracts())
def test_ready_contracts_are_complete(name: str) -> None:
    """Each has epsilon 1, segments with actions, cuts and the defaults for training."""
    contract = ready_contract(name)
    names = contract.segments.names
    assert contract.privacy.epsilon == 1.0
    assert len(contract.segments.actions) == len(names)
    assert len(contract.segments.cuts) == len(names) - 1
    assert contract.segments.previous_column == f"{contract.segments.column}_previous"
    assert contract.windows is not None
    assert "training" not in contract.model_fields_set
    assert contract.model.family == ("linear" if "journey" in name else "mlp")


def test_what_the_package_brings_to_start_from() -> None:
    """Only for generated sets: what real customers show chooses no default."""
    warm = {name for name in ready_contracts() if ready_start(name) is not None}
    assert warm == {"synthetic-value4", "synthetic-active28"}


@pytest.mark.parametrize("label", ["value4", "active28"])
def test_a_warm_data_set(label: str) -> None:
    """Brings parameters that its contract names, and the rate that suits them."""
    how = {"preset": "smoke", "merchants": 2, "label": label}
    cold, found = load("synthetic", **how), load("synthetic", **how, warm=True)
    theta = starting_parameters(found.contract, found.start)
    assert parameters_sha256(theta) == found.contract.model.start
    assert (cold.start, cold.contract.model.start) == (None, None)
    assert found.contract.training.step_size < cold.contract.training.step_size


def test_a_warm_federation_reads_back(tmp_path: Path) -> None:
    """The parameters lie beside the contract, and nowhere if there are none."""
    found = load("synthetic", preset="smoke", merchants=2, warm=True)
    write_federation(found, tmp_path / "warm")
    federation = open_federation(tmp_path / "warm")
    assert federation.start == found.start == (tmp_path / "warm" / "contract.start").read_bytes()
    write_federation(replace(found, contract=found.contract.revised(model={})), tmp_path / "cold")
    assert open_federation(tmp_path / "cold").start is None


def test_an_exchanged_start_is_refused(tmp_path: Path) -> None:
    """Before a merchant is opened."""
    found = load("synthetic", preset="smoke", merchants=2, warm=True)
    write_federation(found, tmp_path / "f")
    (tmp_path / "f" / "contract.start").write_bytes(bytes(len(found.start or b"")))
    with pytest.raises(ContractError, match="it was changed"):
        open_federation(tmp_path / "f")


@pytest.mark.parametrize("entry", catalogue(), ids=lambda entry: entry.name)
def test_the_default_delta_is_below_one_in_the_public_number_of_rows(entry: CatalogueEntry) -> None:
    """Delta is about 1 / N^1.1."""
    for name in ready_contracts():
        for part, rows in entry.rows.items():
            if name.startswith(entry.name) and (part in name or part in ("random", "default")):
                assert ready_contract(name).privacy.delta == pytest.approx(rows**-1.1, rel=0.06)


def test_an_unknown_contract_is_refused() -> None:
    """The message lists what there is."""
    with pytest.raises(DataError, match="synthetic-value4"):
        ready_contract("value4")


def test_provenance_never_claims_real_customers() -> None:
    """The two sets that stem from Complete Journey say that its provenance is disputed."""
    for entry in catalogue():
        assert "real customers" not in entry.provenance + entry.description
        assert ("provenance disputed" in entry.provenance) == (entry.name != "cdnow")


def test_the_contract_fits_the_generated_set(dataset: Dataset) -> None:
    """As many merchants, and delta for the public number of customers asked for."""
    assert list(dataset.merchants) == ["merchant-0000", "merchant-0001", "merchant-0002"]
    assert dataset.customers == 150
    assert dataset.contract.federation.min_merchants == 3
    assert dataset.contract.privacy.delta == pytest.approx(150**-1.1, rel=0.05)


def test_tables_have_the_columns_of_the_contract(dataset: Dataset) -> None:
    """Ids, features in the contract's order, label and previous label."""
    expected = ["customer", "person", *(feature.name for feature in dataset.contract.features)]
    for table in dataset.merchants.values():
        assert list(table.columns) == [*expected, "value4", "value4_previous"]
        assert table["value4"].dtype == table["value4_previous"].dtype == "int64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "journey"}, "unknown data set 'journey'; expected one of: complete-journey"),
        ({"name": "synthetic", "label": "value3"}, "unknown label of synthetic 'value3'"),
        ({"name": "synthetic", "partition": "store"}, "unknown partition of synthetic"),
        ({"name": "synthetic", "preset": "huge"}, "unknown preset of synthetic"),
        ({"name": "synthetic", "preset": "xl"}, r"simulations\.synthetic\.stream"),
        ({"name": "synthetic", "seed": -1}, "expected seed >= 0"),
        ({"name": "synthetic", "merchants": 0}, "expected .*merchants"),
        ({"name": "synthetic", "merchants": 10**6}, "expected 1 to 100000 merchants"),
        ({"name": "cdnow", "preset": "small"}, "has no presets"),
        ({"name": "complete-journey", "merchants": 5}, "fixed number of merchants"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    """Each message names the option and what is possible."""
    with pytest.raises(DataError, match=message):
        load(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("secure", [True, False])
def test_a_written_federation_reads_back(dataset: Dataset, tmp_path: Path, secure: bool) -> None:
    """Contract, members, merchant files and tables are what was written."""
    contract = dataset.contract.revised(aggregation={"secure": secure})
    dataset = replace(dataset, contract=contract)
    folder = tmp_path / "a" / "federation"
    write_federation(dataset, folder)
    members = read_members(folder / "members.toml")
    assert set(members.keys) == set(dataset.merchants)
    assert read_contract(folder / "contract.toml").sha256 == dataset.contract.sha256
    assert {path.name for path in (folder / "merchants").iterdir()} == set(dataset.merchants)
    for name, table in dataset.merchants.items():
        own = folder / "merchants" / name
        merchant = read_merchant(own / "merchant.toml")
        assert merchant.merchant.id == name
        assert merchant.policy.epsilon == dataset.contract.privacy.epsilon
        assert merchant.policy.accept_unmasked_sums == (not secure)
        assert read_identity(name, merchant.merchant.key).public == members.keys[name]
        assert merchant.merchant.key == own / "identity.key"
        for secret in (merchant.merchant.key, own / "customers.parquet"):
            assert stat.S_IMODE(secret.stat().st_mode) == 0o600
        assert merchant.simulation.seed is None
        pd.testing.assert_frame_equal(pd.read_parquet(own / "customers.parquet"), table)


def test_a_written_merchant_becomes_bounded_features(dataset: Dataset, tmp_path: Path) -> None:
    """A merchant's own code reads the files; persons decide who is held out."""
    write_federation(dataset, tmp_path / "f")
    contract = read_contract(tmp_path / "f" / "contract.toml")
    path = tmp_path / "f" / "merchants" / "merchant-0000" / "merchant.toml"
    table = read_table(read_merchant(path), contract)
    features = encode(table, contract)
    written = dataset.merchants["merchant-0000"]
    assert features.shape == (len(written), contract.inputs)
    assert np.abs(features).max() <= 1
    assert list(table.labels) == list(written["value4"])
    assert list(table.held_out) == list(is_held_out(list(written["person"]), contract.training))


def test_caps_and_seed_can_be_chosen(dataset: Dataset, tmp_path: Path) -> None:
    """They end in every merchant's own file."""
    write_federation(dataset, tmp_path / "f", epsilon=2, delta=1e-4, seed=5)
    text = (tmp_path / "f" / "merchants" / "merchant-0001" / "merchant.toml").read_text()
    document = tomllib.loads(text)
    assert document["policy"]["epsilon"] == 2.0
    assert document["policy"]["delta"] == 1e-4
    assert document["simulation"] == {"seed": 5}


def test_a_folder_in_use_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """Files that are there are left as they are."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        write_federation(dataset, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_place_that_cannot_be_written_is_told(dataset: Dataset, tmp_path: Path) -> None:
    """A file in the way is an error of one sentence."""
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match="cannot be written"):
        write_federation(dataset, tmp_path / "file" / "f")


def test_an_empty_folder_is_filled(dataset: Dataset, tmp_path: Path) -> None:
    """An empty folder may be there already."""
    (tmp_path / "f").mkdir()
    write_federation(dataset, tmp_path / "f")
    assert (tmp_path / "f" / "contract.toml").is_file()


def test_a_failure_leaves_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second merchant cannot be written there is no folder at all."""
    written = []
    to_parquet = pd.DataFrame.to_parquet

    def full_disk(self: pd.DataFrame, path: Path, index: bool) -> None:
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        to_parquet(self, path, index=index)

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        write_federation(dataset, tmp_path / "f")
    assert written
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C cleans up too."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_federation(dataset, tmp_path / "f")
    assert list(tmp_path.iterdir()) == []
