"""Tests of the commands that change an identity key."""

import json
from pathlib import Path

import pytest

from clients.enrolment import enrolment
from clients.merchant import read_merchant
from common.enrolment import fingerprint
from common.errors import IdentityError, RunError, ServiceError
from common.identity import (
    Identity,
    Members,
    read_identity,
    read_members,
    write_identity,
    write_members,
)
from common.service_lock import locked
from hansa.commands.rotation import merchant_identity, operator_identity
from server.registry import Registry


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a folder that is a merchant's and an operator's."""
    (tmp_path / "merchant.toml").write_text(
        '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "none.csv"\n'
        "[policy]\nepsilon = 1.0\ndelta = 1e-5\n"
    )
    (tmp_path / "server").mkdir()
    shop, coordinator = Identity.generate("shop"), Identity.generate("coordinator")
    write_identity(shop, tmp_path / "identity.key")
    write_identity(coordinator, tmp_path / "server" / "identity.key")
    write_members(Members({"shop": shop.public}, coordinator.public), tmp_path / "members.toml")
    return tmp_path


def test_a_merchants_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what was replaced, shows both keys, and whom to tell."""
    before = read_members(folder / "members.toml")
    merchant_identity(folder)
    _, members = enrolment(read_merchant(folder / "merchant.toml"), folder)
    told = capsys.readouterr().out
    for key in members.keys_of("shop"):
        assert fingerprint(key) in told
    assert members.keys_of("shop")[0] == before.keys["shop"]
    assert "was spent before still counts" in told
    assert "members.toml to the operator" in told
    assert (folder / "identity.key").read_text().strip() not in told


def test_the_operators_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It says what merchants need."""
    before = read_members(folder / "members.toml").witness
    operator_identity(folder)
    assert read_members(folder / "members.toml").witnesses[0] == before
    assert "to every merchant, which proves the change" in capsys.readouterr().out


@pytest.mark.parametrize("command", [merchant_identity, operator_identity])
def test_while_processes_run(folder: Path, command: object) -> None:
    """Nobody goes on with the old key in memory."""
    assert callable(command)
    with locked(folder / "run"), pytest.raises(ServiceError, match="they have the old key"):
        command(folder)
    command(folder)


def test_an_operator_that_cannot_be_reached(folder: Path) -> None:
    """An enrolled merchant's key stays where the operator does not hear of the new one."""
    enrolled = {
        "format": 1,
        "url": "https://127.0.0.1:9",
        "ca_pem": "",
        "operator": "00" * 32,
        "contract": "00" * 32,
        "members_version": 1,
        "merchant": "shop",
        "enrolled_at": 1.0,
    }
    (folder / "enrolment.json").write_text(json.dumps(enrolled))
    before = (folder / "identity.key").read_bytes()
    with pytest.raises((RunError, IdentityError)):
        merchant_identity(folder)
    assert (folder / "identity.key").read_bytes() == before
    enrolment(read_merchant(folder / "merchant.toml"), folder)


def test_an_operator_with_a_registry(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The registry's list names the new key, proves it, and has a new version."""
    before = read_identity("coordinator", folder / "server" / "identity.key")
    registry = Registry.create(folder, before.public)
    operator_identity(folder)
    after = read_identity("coordinator", folder / "server" / "identity.key")
    members = read_members(folder / "members.toml")
    assert after.public != before.public
    assert members.witnesses == (before.public, after.public)
    state = registry.state()
    assert (state.operator, state.version) == (after.public, 1)
    assert "hansa merchant members --accept" in capsys.readouterr().out
