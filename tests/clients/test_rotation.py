"""Tests of a merchant that changes its key: files, ledger, and what breaks off in between."""

import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from audit.verify import verify
from clients.enrolment import enrolment, ledger_of, spent_by
from clients.evidence import open_books, write_books
from clients.merchant import read_merchant
from clients.rotation import PENDING, Tell, rotate_identity
from common.errors import EnrolmentError, IdentityError, LedgerError, RunError
from common.identity import (
    Identity,
    Members,
    members_toml,
    read_identity,
    read_members,
    write_identity,
    write_members,
)
from common.ledger import whole_run
from common.rotation import WITNESS, Rotation, sign_rotation
from server.evidence import federation_evidence
from server.rotation import KEY, list_in, rotate_operator, take_over
from server.witness import Witness
from tests.ledgers import MODEL, charge, occasion

POLICY = "[policy]\nepsilon = 1.0\ndelta = 1e-5\n"


class World:
    """A merchant and an operator, each with its own folder and list."""

    def __init__(self, folder: Path) -> None:
        self.shop, self.operator = folder / "shop", folder / "operator"
        self.shop.mkdir()
        (self.operator / "server" / "runs").mkdir(parents=True)
        (self.shop / "merchant.toml").write_text(
            '[merchant]\nid = "shop"\n[data]\nkind = "customers"\npath = "none.csv"\n' + POLICY
        )
        shop, coordinator = Identity.generate("shop"), Identity.generate("coordinator")
        write_identity(shop, self.shop / "identity.key")
        write_identity(coordinator, self.operator / KEY)
        members = Members({"shop": shop.public}, coordinator.public)
        for place in (self.shop, self.operator):
            write_members(members, place / "members.toml")

    @property
    def witness(self) -> Witness:
        """Return the operator's witness, as a process that starts has it."""
        identity = read_identity("coordinator", self.operator / KEY)
        return Witness(self.operator / "server" / "witness.sqlite", identity)

    def tell(self, rotation: Rotation) -> None:
        """Tell the operator."""
        listed = self.operator / "members.toml"
        take_over(rotation, read_members(listed), self.witness, list_in(listed))

    def rotate(self, tell: Tell | None = None) -> Rotation:
        """Change the merchant's key."""
        return rotate_identity(self.shop, tell or self.tell)

    def spend(self, run: str, count: int = 2) -> None:
        """Reserve and release, with the keys of today."""
        merchant = read_merchant(self.shop / "merchant.toml")
        identity, members = enrolment(merchant, self.shop)
        ledger, witness = ledger_of(merchant, identity, members), self.witness
        key = identity.public

        def seen(head: object) -> None:
            assert witness.countersign({"shop": (key, head)}) == {}  # type: ignore[dict-item]

        cost = [charge(20.0, count)]
        seen(ledger.reserve(whole_run(run, "c" * 64), cost, ("x", 1), witness.latest(key)))
        for number in range(count):
            what = occasion(number, run)
            seen(ledger.release(what, charge(20.0), MODEL, "", witness.latest(key)))
        ledger.accept(witness.latest(key))
        ledger.settle(run)
        ledger.close()

    @property
    def spent(self) -> float:
        """Return what the ledger adds up to."""
        return spent_by(read_merchant(self.shop / "merchant.toml")).spent()


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Give a merchant that spent something."""
    world = World(tmp_path)
    world.spend("first")
    return world


class TestRotation:
    """rotate_identity."""

    def test_files(self, world: World) -> None:
        """The new key is in place, private; the old one is kept; nothing half done lies about."""
        old = (world.shop / "identity.key").read_text()
        (world.shop / "session.sealed").write_bytes(b"sealed with the old key")
        rotation = world.rotate()
        assert read_identity("shop", world.shop / "identity.key").public == rotation.new
        assert (world.shop / "identity.key.1").read_text() == old
        names = {path.name for path in world.shop.iterdir() if not path.name.startswith("ledger.")}
        assert names == {"merchant.toml", "members.toml", "identity.key", "identity.key.1"}
        for name in ("identity.key", "identity.key.1"):
            assert stat.S_IMODE((world.shop / name).stat().st_mode) == 0o600
        for place in (world.shop, world.operator):
            members = read_members(place / "members.toml")
            assert members.keys_of("shop") == (rotation.old, rotation.new)

    def test_the_ledger_goes_on(self, world: World) -> None:
        """What was spent is still spent, and more can be."""
        before = world.spent
        assert before > 0
        world.rotate()
        assert world.spent == before
        world.spend("second")
        assert world.spent > before
        world.rotate()
        world.spend("third")
        assert (world.shop / "identity.key.2").exists()

    def test_before_the_first_run(self, tmp_path: Path) -> None:
        """There is a ledger by then, which tells of the rotation."""
        world = World(tmp_path)
        world.rotate()
        world.spend("first")
        (merchant,) = [read_merchant(world.shop / "merchant.toml")]
        identity, members = enrolment(merchant, world.shop)
        ledger = ledger_of(merchant, identity, members)
        assert [entry.document["kind"] for entry in ledger.entries()[:2]] == ["open", "rekey"]

    def test_evidence(self, world: World, tmp_path: Path) -> None:
        """Merchant's and operator's evidence hold together over rotations of both."""
        world.rotate()
        world.spend("second")
        rotate_operator(world.operator)
        (world.shop / "members.toml").write_text((world.operator / "members.toml").read_text())
        world.spend("third")
        world.rotate()
        world.spend("fourth")
        books, identity = open_books(world.shop / "merchant.toml")
        write_books(books, identity, tmp_path / "evidence" / "shop.zip")
        federation_evidence(world.operator, tmp_path / "evidence" / "server.zip")
        audit = verify([tmp_path / "evidence"])
        expected = {"contract-missing", "run-unknown-to-server"}  # there was no real run
        assert {f.code for f in audit.findings if f.severity != "note"} == expected
        assert [f.code for f in audit.findings].count("key-rotated") == 3
        assert set(audit.spending[0].by_run) == {"first", "second", "third", "fourth"}
        assert audit.checks["heads in the witness's log"] == 12


class _Broken(Exception):
    """Power is cut."""


class TestBreakingOff:
    """What breaks off is finished by starting it again."""

    def cut(self, monkeypatch: pytest.MonkeyPatch, world: World, name: str) -> None:
        """Rotate, and cut the power before a step."""

        def broken(*_: object, **__: object) -> None:
            raise _Broken

        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(_Broken):
                world.rotate()

    @pytest.mark.parametrize(
        "name",
        [
            "clients.rotation.following_identity",
            "clients.rotation.begin_rotation",
            "clients.rotation.ledger_of",
            "server.witness.Witness.rotate",
            f"{__name__}.list_in",
            "common.ledger.Ledger.rekey",
            "clients.rotation.replace_identity",
            "clients.rotation._finish",
            "clients.rotation.members_toml",
        ],
    )
    def test_before_a_step(self, world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """One new key, one rotation, and the budget as it was."""
        before, key = world.spent, read_identity("shop", world.shop / "identity.key").public
        self.cut(monkeypatch, world, name)
        rotation = world.rotate()
        assert rotation.old == key
        assert not (world.shop / PENDING).exists()
        assert read_members(world.operator / "members.toml").rotations == (rotation,)
        assert world.witness.rotations() == (rotation,)
        assert world.spent == before
        world.spend("second")

    def test_between_keeping_and_replacing(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The old key is kept once."""
        replace: Callable[[Path, Path], Path] = Path.replace

        def broken(path: Path, target: Path) -> Path:
            if path.name.endswith(".next"):
                raise _Broken
            return replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", broken)
            with pytest.raises(_Broken):
                world.rotate()
        world.rotate()
        assert (world.shop / "identity.key.1").exists()
        assert not (world.shop / "identity.key.2").exists()

    def test_meanwhile_nothing_is_released(
        self, world: World, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With the old key still in place the merchant takes part in nothing."""
        self.cut(monkeypatch, world, "clients.rotation.replace_identity")
        with pytest.raises(LedgerError, match="finished by starting it again"):
            world.spend("second")


class TestRefusals:
    """Rotations that are not begun, or not finished."""

    def test_the_operator_refuses(self, world: World) -> None:
        """The ledger and the key stay as they were."""

        def refuse(_: Rotation) -> None:
            raise EnrolmentError("no")

        key = (world.shop / "identity.key").read_bytes()
        with pytest.raises(EnrolmentError):
            world.rotate(refuse)
        assert (world.shop / "identity.key").read_bytes() == key
        world.spend("second")

    def test_without_a_list_of_its_own(self, world: World) -> None:
        """A list that several merchants share is changed by nobody alone."""
        shared = world.shop.parent.parent / "members.toml"
        (world.shop / "members.toml").rename(shared)
        try:
            with pytest.raises(IdentityError, match="has a list of its own"):
                world.rotate()
        finally:
            shared.unlink()

    def test_another_key_in_the_list(self, world: World) -> None:
        """Nothing is begun with a key that the list does not name."""
        members = read_members(world.shop / "members.toml")
        other = Members({"shop": Identity.generate("shop").public}, members.witness)
        (world.shop / "members.toml").write_text(members_toml(other))
        with pytest.raises(IdentityError, match="names another key"):
            world.rotate()
        assert not (world.shop / PENDING).exists()

    @pytest.mark.parametrize("name", ["identity.key.next", "identity.key"])
    def test_a_key_was_exchanged(
        self, world: World, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        """A statement is of two keys; with another one it is not finished."""
        TestBreakingOff().cut(monkeypatch, world, "server.witness.Witness.rotate")
        (world.shop / name).unlink()
        write_identity(Identity.generate("shop"), world.shop / name)
        with pytest.raises(IdentityError, match=r"move identity\.rotation\.json"):
            world.rotate()

    @pytest.mark.parametrize("text", ["", "{}", "[1]", "\\xff"])
    def test_a_statement_that_was_changed(self, world: World, text: str) -> None:
        """The file names what is wrong with it."""
        (world.shop / PENDING).write_text(text)
        with pytest.raises(IdentityError, match=PENDING):
            world.rotate()


class TestOperator:
    """rotate_operator and take_over."""

    def test_the_old_list_refuses_the_new_witness(self, world: World) -> None:
        """A merchant follows when it has the list that proves the change."""
        rotation = rotate_operator(world.operator)
        assert read_identity("coordinator", world.operator / KEY).public == rotation.new
        assert (world.operator / f"{KEY}.1").exists()
        assert not (world.operator / "server" / "identity.rotation.json").exists()
        with pytest.raises(Exception, match="pinned witness"):
            world.spend("second")
        (world.shop / "members.toml").write_text((world.operator / "members.toml").read_text())
        world.spend("third")

    @pytest.mark.parametrize(
        "name",
        [
            "server.rotation.begin_rotation",
            "server.witness.Witness.rotate",
            "server.rotation.list_in",
            "server.rotation._sign_contract",
            "server.rotation.replace_identity",
        ],
    )
    def test_breaking_off(self, world: World, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        """It is finished by starting it again."""

        def broken(*_: object, **__: object) -> None:
            raise _Broken

        with monkeypatch.context() as patch:
            patch.setattr(name, broken)
            with pytest.raises(_Broken):
                rotate_operator(world.operator)
        rotation = rotate_operator(world.operator)
        members = read_members(world.operator / "members.toml")
        assert members.witnesses == (rotation.old, rotation.new)
        assert world.witness.rotations() == (rotation,)

    def test_a_stranger_rotates_nothing(self, world: World) -> None:
        """Whoever has two keys of his own makes no entry at the witness."""
        one, other = Identity.generate("shop"), Identity.generate("shop")
        for merchant, message in (
            ("shop", "names another key"),
            ("stranger", "names another key"),
            (WITNESS, "the operator's own key"),
        ):
            with pytest.raises(IdentityError, match=message):
                world.tell(sign_rotation(merchant, one, other, 1))
        assert world.witness.rotations() == ()

    def test_members_pinned_another_operator(self, world: World) -> None:
        """Nothing is begun where the list names another witness."""
        members = read_members(world.operator / "members.toml")
        other = Members(members.keys, Identity.generate("x").public)
        write_members(other, world.operator / "members.toml")
        with pytest.raises((IdentityError, RunError), match="names another key"):
            rotate_operator(world.operator)
        assert not (world.operator / f"{KEY}.1").exists()
