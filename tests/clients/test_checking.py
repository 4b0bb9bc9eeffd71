"""Tests of what is checked before a merchant joins, against a real gateway."""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clients import checking
from clients.checking import Finding, Level, findings
from clients.enrolling import enrol, see_offer
from clients.merchant import Merchant, read_merchant
from clients.pinned import NAME
from common.contract import Contract
from common.supervision import state_of
from server.certificates import make_authority
from tests.clients.conftest import build_contract
from tests.enrolment_world import World, gateway, make_world, merchant_folder


@dataclass
class Shop:
    """An enrolled merchant."""

    world: World
    folder: Path
    contract: Contract

    @property
    def merchant(self) -> Merchant:
        """Its file."""
        return read_merchant(self.folder / "merchant.toml")

    def found(self, contract: Contract | None = None) -> list[Finding]:
        """Check it."""
        return findings(self.folder, self.merchant, contract or self.contract)

    def stops(self) -> str:
        """Return what would stop a run."""
        return "\n".join(
            f"{finding.what} {finding.do}"
            for finding in self.found()
            if finding.level is Level.STOP
        )

    def change(self, **changes: Any) -> None:
        """Change what it pinned."""
        path = self.folder / NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    """Give a merchant that just enrolled."""
    contract = build_contract()
    with gateway(make_world(tmp_path / "operator", contract)) as world:
        world.clock.at = time.time()
        folder = merchant_folder(tmp_path / "shop")
        enrol(see_offer(world.token("shop"), folder), folder)
        yield Shop(world, folder, contract)


def test_all_is_well_but_the_superlink(shop: Shop) -> None:
    """Key files, contract, address, certificate, clock, list and disk are fine; each is said."""
    told = {finding.what.split(",")[0]: finding.level for finding in shop.found()}
    stopping = [what for what, level in told.items() if level is Level.STOP]
    assert stopping == ["the operator's SuperLink does not answer (HTTP 503)"]
    assert "your clock agrees with the server's" in told
    assert "your list of members is the operator's" in told
    assert state_of(shop.folder / "run") is None


def test_another_contract(shop: Shop) -> None:
    """A contract that is not the operator's stops every run."""
    other = build_contract(federation={"name": "other"})
    (found,) = [one for one in shop.found(other) if "every run would refuse you" in one.what]
    assert found.level is Level.STOP
    assert "enrol anew" in found.do


def test_another_id(shop: Shop) -> None:
    """The id of the enrolment and of the file must agree."""
    path = shop.folder / "merchant.toml"
    path.write_text(path.read_text().replace('id = "shop"', 'id = "store"'))
    assert "you enrolled as 'shop'" in shop.stops()


def test_a_table_that_others_can_read(shop: Shop) -> None:
    """Is worth a word, and stops nothing."""
    table = shop.merchant.data.path
    assert table is not None
    table.touch()
    for mode, told in ((0o644, True), (0o600, False)):
        table.chmod(mode)
        about = [one for one in shop.found() if "others can read your customers" in one.what]
        assert bool(about) == told
        assert all(one.level is Level.NOTE and one.do == f"chmod 600 {table}" for one in about)


def test_keys(shop: Shop) -> None:
    """A key that others can read, or that is missing."""
    (shop.folder / "identity.key").chmod(0o644)
    (shop.folder / "node.key").unlink()
    told = shop.stops()
    assert "chmod 600" in told
    assert "node.key: is missing" in told


def test_a_seed(shop: Shop) -> None:
    """Guessable noise is for rehearsals."""
    path = shop.folder / "merchant.toml"
    path.write_text(path.read_text() + "\n[simulation]\nseed = 3\n")
    assert "--rehearsal" in shop.stops()


def test_a_foreign_authority(shop: Shop) -> None:
    """A server that another authority signed for is not the operator's."""
    shop.change(ca_pem=make_authority("somebody").pem.decode())
    assert "foreign certificate" in shop.stops()


def test_nobody_answers(shop: Shop) -> None:
    """A port where nobody listens."""
    shop.change(url="https://127.0.0.1:9")
    assert "does a firewall let you out" in shop.stops()


def test_the_clock(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a day off is said, with how to set it."""
    here = checking.time.time
    monkeypatch.setattr(checking.time, "time", lambda: here() + 86_400)
    told = shop.stops()
    assert "your clock is 24 h fast" in told
    assert "set-ntp" in told


def test_a_newer_list(shop: Shop, tmp_path: Path) -> None:
    """A list that was not pinned yet is to be looked at."""
    folder = merchant_folder(tmp_path / "second")
    enrol(see_offer(shop.world.token("second"), folder), folder)
    assert "has version 2, you pinned 1" in shop.stops()


def test_revoked(shop: Shop) -> None:
    """A merchant that was revoked is told so."""
    shop.world.registry.revoke("shop")
    assert "the list of members" in shop.stops()


def test_a_full_disk(shop: Shop) -> None:
    """Without room nothing is released."""
    assert checking._disk(shop.folder, lambda _: (1, 1, 10**6)).level is Level.STOP
    assert checking._disk(shop.folder, lambda _: (1, 1, 10**8)).level is Level.NOTE
    assert checking._disk(shop.folder, lambda _: (1, 1, 10**9)).level is Level.OK


@pytest.mark.skipif(os.geteuid() != 0, reason="as root another finding")
def test_a_user_that_is_not_there(shop: Shop) -> None:
    """The node's own user must exist."""
    path = shop.folder / "merchant.toml"
    path.write_text(path.read_text() + '\n[node]\nuser = "nobody-at-all"\n')
    assert "useradd" in shop.stops()


def test_a_path_that_is_too_long(shop: Shop) -> None:
    """The kernel limits where a socket may be."""
    long = shop.folder.parent / ("x" * 80)
    shop.folder.rename(long)
    found = findings(long, read_merchant(long / "merchant.toml"), shop.contract)
    assert any("shorter path" in finding.what for finding in found)


def test_not_enrolled(shop: Shop) -> None:
    """A damaged enrolment is said, and nothing more is tried."""
    (shop.folder / NAME).write_text("{}")
    (found,) = shop.found()
    assert found.level is Level.STOP
