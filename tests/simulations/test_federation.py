"""Merchants of a simulation: assembled in memory, or opened from a folder."""

import shutil
from pathlib import Path

import pytest

from common.contract import contract_toml, read_contract
from common.errors import ContractError, DataError, IdentityError, PolicyError
from common.identity import read_identity, read_members
from simulations.datasets import Dataset, load, write_federation
from simulations.federation import (
    assemble,
    open_federation,
    public_delta,
    tables_of,
    training_customers,
)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    """Generate three merchants."""
    return load("synthetic", preset="smoke", merchants=3)


def make_plain(folder: Path) -> None:
    """Replace a federation's contract by one with plain sums."""
    contract = read_contract(folder / "contract.toml").revised(aggregation={"secure": False})
    (folder / "contract.toml").write_text(contract_toml(contract))


@pytest.fixture
def folder(dataset: Dataset, tmp_path: Path) -> Path:
    """Write the merchants as a federation."""
    write_federation(dataset, tmp_path / "federation")
    return tmp_path / "federation"


def test_every_merchants_cap_is_the_contracts_epsilon(dataset: Dataset, tmp_path: Path) -> None:
    """Ledgers are new and lie in folders of their own; so does the coordinator's key."""
    contract = dataset.contract.revised(privacy={"epsilon": 3.0})
    federation = assemble(dataset, contract, tmp_path, None)
    assert [member.merchant for member in federation.members] == list(dataset.merchants)
    for member in federation.members:
        assert member.worker.ledger.budget.epsilon == 3.0
        assert (tmp_path / "merchants" / member.merchant / "ledger.sqlite").is_file()
    assert federation.server == tmp_path / "server"
    key = read_identity("coordinator", tmp_path / "server" / "identity.key").public
    assert federation.enrolled.witness == key


def test_a_folder_gives_the_same_tables(dataset: Dataset, folder: Path) -> None:
    """Written and read back, customers and split are the same."""
    expected = tables_of(dataset, dataset.contract)
    federation = open_federation(folder)
    for member in federation.members:
        table, found = expected[member.merchant], federation.tables[member.merchant]
        assert list(found.customer_ids) == list(table.customer_ids)
        assert (found.held_out == table.held_out).all()
        assert (found.labels == table.labels).all()
        assert member.worker.customers == len(table.labels)
        assert member.worker.training_customers == training_customers([table])


def test_what_a_simulation_made_waits_for_no_disk(
    dataset: Dataset, folder: Path, tmp_path: Path
) -> None:
    """Merchants of a folder have budgets to lose: with them the coordinator waits as well."""
    assert open_federation(folder).durable
    assert not assemble(dataset, dataset.contract, tmp_path / "a", None).durable


def test_a_seed_in_any_merchants_file_marks_the_federation(folder: Path) -> None:
    """One repeatable merchant is enough."""
    assert open_federation(folder).seed is None
    file = folder / "merchants" / "merchant-0001" / "merchant.toml"
    file.write_text(file.read_text() + "\n[simulation]\nseed = 5\n")
    assert open_federation(folder).seed == 5


@pytest.mark.parametrize("missing", ["contract.toml", "merchants"])
def test_a_folder_without_a_federation_is_refused(folder: Path, missing: str) -> None:
    """The message says what is expected."""
    path = folder / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(DataError, match=r"holds no federation; expected contract\.toml and"):
        open_federation(folder)


@pytest.mark.parametrize("secure", [True, False])
def test_two_merchants_with_one_id_are_refused(folder: Path, secure: bool) -> None:
    """Their assignments would overwrite each other."""
    if not secure:
        make_plain(folder)
    file = folder / "merchants" / "merchant-0001" / "merchant.toml"
    file.write_text(file.read_text().replace("merchant-0001", "merchant-0000"))
    key = folder / "merchants" / "merchant-0000" / "identity.key"
    shutil.copy(key, file.with_name("identity.key"))  # the whole folder was copied
    with pytest.raises(DataError, match="'merchant-0000' is used by another merchant too"):
        open_federation(folder)


def test_a_merchant_that_takes_anothers_id_is_refused(folder: Path) -> None:
    """Its key is not the one that is enrolled under that id."""
    file = folder / "merchants" / "merchant-0001" / "merchant.toml"
    file.write_text(file.read_text().replace("merchant-0001", "merchant-0000"))
    with pytest.raises(IdentityError, match=r"'merchant-0000' is not enrolled with the key in"):
        open_federation(folder)


def test_everybody_is_enrolled(dataset: Dataset, folder: Path, tmp_path: Path) -> None:
    """In memory and in files the list of members holds every merchant's own key."""
    opened = open_federation(folder)
    for federation in (opened, assemble(dataset, dataset.contract, tmp_path / "a", None)):
        assert list(federation.enrolled.keys) == list(dataset.merchants)
        for member in federation.members:
            party = member.worker._secure
            assert party is not None
            assert party.members == federation.enrolled
            assert party.identity.public == federation.enrolled.keys[member.merchant]
    assert opened.enrolled == read_members(folder / "members.toml")


@pytest.mark.parametrize("missing", ["members.toml", "merchants/merchant-0001/identity.key"])
def test_plain_sums_need_keys_and_the_witness_too(folder: Path, missing: str) -> None:
    """Every ledger is signed and countersigned, whatever the sums are."""
    make_plain(folder)
    enrolled = open_federation(folder).enrolled
    assert enrolled == read_members(folder / "members.toml")
    assert enrolled.witness == read_identity("coordinator", folder / "server/identity.key").public
    (folder / missing).unlink()
    with pytest.raises(IdentityError, match=Path(missing).name):
        open_federation(folder)


def test_a_broken_file_of_a_merchant_is_named(folder: Path) -> None:
    """Whatever is wrong, the message says in which file."""
    file = folder / "merchants" / "merchant-0002" / "merchant.toml"
    file.write_text(file.read_text().replace("epsilon = 1.0", "epsilon = 0.0"))
    with pytest.raises(PolicyError, match=r"merchant-0002/merchant\.toml: policy\.epsilon"):
        open_federation(folder)


def test_a_broken_contract_is_named(folder: Path) -> None:
    """Nothing is opened."""
    (folder / "contract.toml").write_text("[federation")
    with pytest.raises(ContractError, match=r"contract\.toml: is not valid TOML"):
        open_federation(folder)


def test_training_customers_are_labelled_and_not_held_out(dataset: Dataset) -> None:
    """About three quarters of all."""
    tables = list(tables_of(dataset, dataset.contract).values())
    count = training_customers(tables)
    assert count == sum(
        1
        for table in tables
        for held, label in zip(table.held_out, table.labels, strict=True)
        if not held and label >= 0
    )
    assert 0.6 < count / dataset.customers < 0.9


@pytest.mark.parametrize(
    ("customers", "delta"),
    [(10_000, 3e-5), (2, 0.01), (0, 0.01), (10**9, 1e-10)],
)
def test_public_delta(customers: int, delta: float) -> None:
    """1 / N^1.1 rounded down to one digit, at most a hundredth."""
    assert public_delta(customers) == delta
