"""Audits of federations whose keys were rotated: honest ones pass, and every trick is told."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from audit.findings import Audit
from audit.verify import verify
from audit.witness import Anchor
from common.chain import Countersignature, is_signed, rekey_proof
from common.identity import Identity
from common.rotation import WITNESS, sign_rotation
from tests.audit.evidence_world import Shop, World, small_contract

Tamper = Callable[[World], None]


def tell(world: World, owner: str, old: Identity, new: Identity) -> None:
    """Write a rotation into everybody's list of members."""
    one = sign_rotation(owner, old, new, int(world.now))
    world.members["rotations"] = [*world.members.get("rotations", []), one.document]
    if owner == WITNESS:
        witness = world.members["witness"]
        previous = [*witness.get("previous", []), witness["key"]]
        world.members["witness"] = {"key": new.public.hex(), "previous": previous}
    else:
        world.members["members"][owner] = new.public.hex()


def rekey(world: World, shop: Shop, *, told: bool = True, **changes: Any) -> Identity:
    """Hand a shop's ledger over; return the old identity."""
    old, new = shop.identity, Identity.generate(shop.name)
    message = rekey_proof(old.public, new.public, len(shop.entries), shop.link)
    fields = {"key": new.public.hex(), "proof": new.sign(message).hex(), **changes}
    world.enter(shop, kind="rekey", **fields)
    shop.identity = new
    if told:
        tell(world, shop.name, old, new)
    return old


def rotate_witness(world: World) -> Identity:
    """Give the coordinator a new key; return the old identity."""
    old, world.server = world.server, Identity.generate("coordinator")
    tell(world, WITNESS, old, world.server)
    return old


@pytest.fixture(scope="session")
def first(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give one finished run with secure sums."""
    world = World.founded(small_contract())
    world.run("run-1", tmp_path_factory.mktemp("rotation"))
    return world


@pytest.fixture(scope="session")
def both(first: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """Give a run before and a run after rotations of two merchants' keys and the witness's."""
    world = first.clone()
    rekey(world, world.shops[0])
    rekey(world, world.shops[0])
    rekey(world, world.shops[2])
    rotate_witness(world)
    world.run("run-2", tmp_path_factory.mktemp("rotation"))
    return world


@pytest.fixture
def world(both: World) -> World:
    """Give a copy of both runs."""
    return both.clone()


def serious(audit: Audit) -> set[str]:
    """Return the codes of findings that are no mere notes."""
    return {finding.code for finding in audit.findings if finding.severity != "note"}


def of_shop(world: World, folder: Path, shop: Shop | None = None) -> set[str]:
    """Return what is found in one merchant's evidence by itself."""
    world.write_shop(shop or world.shops[0], folder / "shop.zip")
    return serious(verify([folder / "shop.zip"]))


def of_all(world: World, folder: Path) -> set[str]:
    """Return what is found in everybody's evidence."""
    return serious(verify([world.write(folder / "evidence")]))


class TestHonest:
    """Keys that were rotated as they should be."""

    def test_everything_is_checked_as_before(self, world: World, tmp_path: Path) -> None:
        """Both runs pass, with all their signatures, and the rotations are told."""
        audit = verify([world.write(tmp_path)])
        assert serious(audit) == set()
        assert audit.passed
        told = [(f.code, f.where) for f in audit.findings]
        assert {code for code, _ in told} == {"key-rotated"}
        at = [e.seq for e in world.shops[0].entries if e.document["kind"] == "rekey"]
        assert {where for _, where in told} == {
            *(f"shop-0, entry {seq}" for seq in at),
            *(f"shop-2, entry {e.seq}" for e in world.shops[2].entries if b"rekey" in e.body),
            "coordinator",
        }
        assert [run.replayed for run in audit.runs] == [True, True]
        assert all(run.matched == run.merchants for run in audit.runs)

    def test_what_was_spent_before_counts(self, world: World, tmp_path: Path) -> None:
        """A merchant with three keys spent what one with a single key did."""
        spending = verify([world.write(tmp_path)]).spending
        assert set(spending[0].by_run) == {"run-1", "run-2"}
        assert spending[0].lifetime == pytest.approx(spending[1].lifetime)

    def test_alone(self, world: World, tmp_path: Path) -> None:
        """One merchant's evidence is enough to check its own."""
        for shop in world.shops:
            assert of_shop(world, tmp_path, shop) == set()

    def test_the_coordinator_alone(self, world: World, tmp_path: Path) -> None:
        """So is the coordinator's: its list has the statements."""
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == set()

    def test_a_list_from_before(self, both: World, tmp_path: Path) -> None:
        """Who pinned the list before a rotation pinned the same members."""
        world = both.clone()
        world.write(tmp_path)
        newest = world.members
        world.members = {**newest, "rotations": newest["rotations"][:1]}
        world.members["witness"] = {"key": newest["witness"]["previous"][0]}
        late = newest["rotations"][2]
        world.members["members"] = {**newest["members"], late["merchant"]: late["old"]}
        second = newest["rotations"][1]
        world.members["members"][second["merchant"]] = second["old"]
        shop = world.shops[1]
        older = replace(shop, seen=[s for s in shop.seen if self.is_by_first(world, s)])
        assert len(older.seen) < len(shop.seen)
        cut = max(json.loads(s.body)["seq"] for s in older.seen)
        older.entries = shop.entries[:cut]
        now, world.now = world.now, older.entries[-1].document["at"] + 1
        world.write_shop(older, tmp_path / "older" / "shop-1.zip")
        world.now = now
        assert "members-differ" not in serious(verify([tmp_path]))

    def is_by_first(self, world: World, one: Countersignature) -> bool:
        """Tell whether the witness's first key signed."""
        key = bytes.fromhex(world.members["witness"]["key"])
        return is_signed(key, Countersignature.signed(one.body), one.signature)

    def test_anchors_of_earlier_keys(self, world: World, tmp_path: Path) -> None:
        """A head that was noted under an earlier key is held against the ledger."""
        world.write(tmp_path)
        shop, opening = world.shops[0], world.shops[0].documents[0]
        key, entry = bytes.fromhex(opening["key"]), shop.entries[4]
        audit = verify([tmp_path], [Anchor(key, 5, entry.link)])
        assert serious(audit) == set()
        assert audit.checks["heads known from earlier"] == 1
        audit = verify([tmp_path], [Anchor(key, 5, bytes(32))])
        assert serious(audit) == {"anchor-missing"}

    def test_evidence_under_the_old_key(self, both: World, first: World, tmp_path: Path) -> None:
        """An earlier evidence is how the newer one begins, whatever key signed it."""
        earlier = first.clone()
        earlier.write_shop(earlier.shops[0], tmp_path / "earlier.zip")
        both.clone().write(tmp_path)
        audit = verify([tmp_path])
        assert serious(audit) == set()
        assert len(audit.spending) == len(both.shops)


def unproven_witness(world: World) -> None:
    """Name an earlier key of the witness that no statement proves."""
    world.members["witness"]["previous"].insert(0, Identity.generate("x").public.hex())


def forgotten_statement(world: World) -> None:
    """Leave a merchant's rotation out of the list."""
    world.members["rotations"] = [
        one for one in world.members["rotations"] if one["merchant"] == WITNESS
    ]


class TestForged:
    """What parties may try who hold some keys, not all."""

    def test_a_new_ledger(self, first: World, tmp_path: Path) -> None:
        """A merchant that changed its key and began anew is found, by its own evidence alone."""
        world = first.clone()
        shop = world.shops[0]
        old, shop.identity = shop.identity, Identity.generate(shop.name)
        tell(world, shop.name, old, shop.identity)
        shop.entries, shop.seen = [], []
        opening = {**first.shops[0].documents[0], "key": shop.identity.public.hex()}
        shop.append(**opening)
        assert of_shop(world, tmp_path) == {"rekey-missing"}
        assert of_all(world, tmp_path) >= {"rekey-missing", "rolled-back"}

    @pytest.mark.parametrize("changes", [{"proof": "00" * 64}, {"proof": ""}, {"key": "00" * 32}])
    def test_a_key_that_did_not_agree(
        self, first: World, tmp_path: Path, changes: dict[str, str]
    ) -> None:
        """Nothing of such a ledger is read."""
        world = first.clone()
        rekey(world, world.shops[0], **changes)
        assert of_shop(world, tmp_path) == {"rekey-invalid"}

    def test_more_in_the_entry(self, first: World, tmp_path: Path) -> None:
        """A field that is not known is not passed over."""
        world = first.clone()
        rekey(world, world.shops[0], why="lost")
        assert of_shop(world, tmp_path) == {"entry-schema"}

    def test_the_old_key_goes_on(self, first: World, tmp_path: Path) -> None:
        """An entry of a key that was given up is named."""
        world = first.clone()
        shop = world.shops[0]
        old = rekey(world, shop)
        new, shop.identity = shop.identity, old
        world.enter(shop, kind="settle", run="run-1")
        shop.identity = new
        assert of_shop(world, tmp_path) == {"entry-signature"}

    def test_evidence_signed_with_the_old_key(self, world: World, tmp_path: Path) -> None:
        """Neither the list nor the ledger knows it as the key of today."""
        shop = world.shops[0]
        shop.identity = Identity.generate(shop.name)
        assert of_shop(world, tmp_path) == {"not-enrolled", "rekey-invalid"}

    def test_an_advert_of_the_old_key(self, first: World, tmp_path: Path) -> None:
        """Somebody who has the old key spoke for the merchant in a session."""
        world = first.clone()
        shop = world.shops[0]
        old = rekey(world, shop)
        new, shop.identity = shop.identity, old
        world.run("run-2", tmp_path)
        entries, shop.entries, shop.identity = shop.entries, [], old
        for entry in entries:
            document = entry.document
            shop.append(**document)
            if document["kind"] == "rekey":
                shop.identity = new
        assert "key-given-up" in of_all(world, tmp_path)

    def test_the_list_lacks_a_statement(self, world: World, tmp_path: Path) -> None:
        """The coordinator's log of the old key is then a stranger's."""
        forgotten_statement(world)
        world.write_server(tmp_path / "server.zip")
        assert "countersignature-invalid" in serious(verify([tmp_path]))

    def test_a_witness_key_that_nothing_proves(self, world: World, tmp_path: Path) -> None:
        """Any key could have countersigned otherwise."""
        unproven_witness(world)
        assert of_shop(world, tmp_path) == {"evidence-incomplete"}

    def test_the_witness_signs_with_its_old_key(self, first: World, tmp_path: Path) -> None:
        """After the new key signed, the old one is worth nothing, at merchant and coordinator."""
        world = first.clone()
        shop = world.shops[0]
        old = rotate_witness(world)
        world.countersign(shop)
        new, world.server = world.server, old
        world.countersign(shop)
        world.server = new
        assert of_shop(world, tmp_path) == {"key-given-up"}
        world.write_server(tmp_path / "shop.zip")
        assert serious(verify([tmp_path])) == {"key-given-up"}

    def test_the_witness_takes_heads_of_an_old_key(self, first: World, tmp_path: Path) -> None:
        """A witness that lets a thief go on with the old key is found by its own log."""
        world = first.clone()
        shop = world.shops[0]
        thief = replace(shop, entries=list(shop.entries), seen=list(shop.seen))
        rekey(world, shop)
        world.enter(shop, kind="settle", run="run-1")
        world.countersign(shop)
        for _ in range(3):
            world.enter(thief, kind="settle", run="run-1")
        world.countersign(thief)
        world.write_server(tmp_path / "server.zip")
        assert serious(verify([tmp_path])) == {"key-given-up"}

    def test_lists_that_go_round_in_circles(self, first: World, tmp_path: Path) -> None:
        """Two lists that each prove the other's key the older one differ; the audit ends."""
        one, other = first.clone(), first.clone()
        shop = one.shops[0]
        a, b = shop.identity, Identity.generate(shop.name)
        tell(one, shop.name, a, b)
        tell(other, shop.name, b, a)
        one.write_shop(one.shops[1], tmp_path / "one.zip")
        other.write_shop(other.shops[2], tmp_path / "other.zip")
        assert serious(verify([tmp_path])) <= {"members-differ"}
