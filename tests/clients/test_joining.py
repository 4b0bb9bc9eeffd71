"""Tests of opening a merchant: file, contract, table, ledger."""

from pathlib import Path

import pytest

from clients.joining import open_worker
from clients.session_store import FileStore, MemoryStore
from clients.worker import os_noise
from common.budget import Budget
from common.contract import Contract, contract_toml
from common.errors import ContractError, DataError, IdentityError, PolicyError
from common.identity import (
    Identity,
    Members,
    read_identity,
    read_members,
    write_identity,
    write_members,
)

ROWS = "customer_id,spend,age,visits,member,plan,segment\n1,10,30,2,1,basic,low\n2,9,,1,0,,high\n"


@pytest.fixture
def merchant(contract: Contract, tmp_path: Path) -> Path:
    """Give the `merchant.toml` of a merchant in a federation's folder, ready for secure sums."""
    folder = tmp_path / "merchants" / "shop"
    folder.mkdir(parents=True)
    (tmp_path / "contract.toml").write_text(contract_toml(contract))
    (folder / "table.csv").write_text(ROWS)
    (folder / "merchant.toml").write_text(
        '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "table.csv"\n'
        "[policy]\nepsilon = 2.0\ndelta = 1e-6\n"
    )
    identity = Identity.generate("shop")
    write_identity(identity, folder / "identity.key")
    witness = Identity.generate("coordinator").public
    write_members(Members({"shop": identity.public}, witness), tmp_path / "members.toml")
    return folder / "merchant.toml"


def test_opens_everything(merchant: Path, contract: Contract) -> None:
    """Contract, customers, ledger and cap are those of the files."""
    opened = open_worker(merchant)
    assert opened.worker.contract.sha256 == contract.sha256
    assert opened.worker.ledger.path == merchant.parent / "ledger.sqlite"
    assert opened.worker.ledger.budget == Budget(2.0, 1e-6)
    assert len(opened.table.labels) == 2


def test_noise_is_the_operating_systems(merchant: Path) -> None:
    """Without a word about seeds the noise cannot be repeated."""
    opened = open_worker(merchant)
    assert opened.seed is None
    assert opened.worker._noise_for is os_noise


def test_seed(merchant: Path) -> None:
    """A seed in the merchant's own file makes the noise repeatable."""
    merchant.write_text(merchant.read_text() + "[simulation]\nseed = 3\n")
    opened = open_worker(merchant)
    assert opened.seed == 3
    one, other = (
        opened.worker._noise_for("update", 1, 0).discrete_gaussian(3, 1e9) for _ in range(2)
    )
    assert one.tolist() == other.tolist()


@pytest.mark.parametrize(
    ("start", "path"),
    [
        ("merchants/shop", "merchant.toml"),
        ("merchants/shop", "./merchant.toml"),
        ("merchants", "shop/merchant.toml"),
        (".", "merchants/shop/merchant.toml"),
    ],
)
def test_relative_paths(
    merchant: Path, monkeypatch: pytest.MonkeyPatch, start: str, path: str
) -> None:
    """The shared contract is found wherever the command is started."""
    monkeypatch.chdir(merchant.parents[2] / start)
    assert open_worker(Path(path)).worker.merchant == "shop"


def test_own_contract_wins(merchant: Path, contract: Contract) -> None:
    """The contract in the merchant's own folder is the pinned one."""
    own = contract.revised(training={"rounds": 7})
    (merchant.parent / "contract.toml").write_text(contract_toml(own))
    assert open_worker(merchant).worker.contract.sha256 == own.sha256


def make_plain(merchant: Path, contract: Contract) -> None:
    """Replace the federation's contract by one without secure sums."""
    plain = contract.revised(aggregation={"secure": False})
    (merchant.parents[2] / "contract.toml").write_text(contract_toml(plain))


def test_plain_sums_have_no_sessions(merchant: Path, contract: Contract) -> None:
    """A contract without secure sums needs the key for the ledger only."""
    make_plain(merchant, contract)
    worker = open_worker(merchant).worker
    assert worker._secure is None
    key = read_identity("shop", merchant.parent / "identity.key").public.hex()
    assert worker.ledger.entries()[0].document["key"] == key


@pytest.mark.parametrize("secure", [True, False])
def test_the_caps_are_those_of_the_policy(merchant: Path, contract: Contract, secure: bool) -> None:
    """All of them reach the ledger."""
    if not secure:
        make_plain(merchant, contract)
    merchant.write_text(
        merchant.read_text() + "epsilon_towards_server = 3.0\nrefresh_days = 90.0\n"
        "[policy.purposes]\nprofile = 0.5\ncensus = 0.25\n"
    )
    expected = Budget(2.0, 1e-6, 3.0, 90.0, (("census", 0.25), ("profile", 0.5)))
    assert open_worker(merchant).worker.ledger.budget == expected


@pytest.mark.parametrize("secure", [True, False])
def test_a_witness_must_be_pinned(merchant: Path, contract: Contract, secure: bool) -> None:
    """Without one nothing could ever be released; no ledger is begun."""
    if not secure:
        make_plain(merchant, contract)
    path = merchant.parents[2] / "members.toml"
    write_members(Members(read_members(path).keys), path)
    with pytest.raises(IdentityError, match=r"members\.toml: has no \[witness\] key"):
        open_worker(merchant)
    assert not (merchant.parent / "ledger.sqlite").exists()


@pytest.mark.parametrize("secure", [True, False])
@pytest.mark.parametrize("missing", ["merchants/shop/identity.key", "members.toml"])
def test_key_and_members_are_needed(
    merchant: Path, contract: Contract, missing: str, secure: bool
) -> None:
    """The file that is missing is named, and no ledger is begun."""
    if not secure:
        make_plain(merchant, contract)
    path = merchant.parents[2] / missing
    path.unlink()
    with pytest.raises(IdentityError, match=path.name):
        open_worker(merchant)
    assert not (merchant.parent / "ledger.sqlite").exists()


@pytest.mark.parametrize("enrolled", ["shop", "another"])
def test_a_key_that_is_not_the_enrolled_one(merchant: Path, enrolled: str) -> None:
    """Neither another key under the merchant's id nor another id will do."""
    members = Members({enrolled: Identity.generate(enrolled).public})
    write_members(members, merchant.parents[2] / "members.toml")
    with pytest.raises(IdentityError, match="'shop' is not enrolled with the key in"):
        open_worker(merchant)


def test_own_members_win(merchant: Path) -> None:
    """The list in the merchant's own folder is the pinned one."""
    pinned = merchant.parent / "members.toml"
    (merchant.parents[2] / "members.toml").rename(pinned)
    stranger = Members({"stranger": Identity.generate("stranger").public})
    write_members(stranger, merchant.parents[2] / "members.toml")
    party = open_worker(merchant).worker._secure
    assert party is not None
    assert list(party.members.keys) == ["shop"]


@pytest.mark.parametrize(
    ("survivors", "own", "expected"), [(2, 2, 2), (2, 3, 3), (2, 7, 7), (4, 2, 4)]
)
def test_smallest_sum_is_the_stricter_of_two(
    merchant: Path, contract: Contract, survivors: int, own: int, expected: int
) -> None:
    """Contract and policy may both ask for more, and neither for fewer."""
    revised = contract.revised(
        federation={"min_merchants": 9}, aggregation={"min_survivors": survivors}
    )
    (merchant.parents[2] / "contract.toml").write_text(contract_toml(revised))
    merchant.write_text(merchant.read_text() + f"min_cohort = {own}\n")
    party = open_worker(merchant).worker._secure
    assert party is not None
    assert party.minimum == expected


@pytest.mark.parametrize(("in_memory", "kind"), [(True, MemoryStore), (False, FileStore)])
def test_where_the_session_is_kept(merchant: Path, in_memory: bool, kind: type) -> None:
    """In a sealed file, or for simulations in this process."""
    party = open_worker(merchant, in_memory=in_memory).worker._secure
    assert party is not None
    assert type(party.store) is kind


def test_no_contract(merchant: Path) -> None:
    """Without a contract nothing is opened."""
    (merchant.parents[2] / "contract.toml").unlink()
    with pytest.raises(ContractError, match="no such contract file"):
        open_worker(merchant)


def test_bad_table(merchant: Path) -> None:
    """A table that breaks the contract opens nothing, not even a ledger."""
    (merchant.parent / "table.csv").write_text(ROWS.replace("basic", "gold"))
    with pytest.raises(DataError):
        open_worker(merchant)
    assert not (merchant.parent / "ledger.sqlite").exists()


def test_no_file(tmp_path: Path) -> None:
    """A missing file is named."""
    with pytest.raises(PolicyError, match="no such merchant file"):
        open_worker(tmp_path / "merchant.toml")
