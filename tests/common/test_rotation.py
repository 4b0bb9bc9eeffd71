"""Tests of rotations: statements of two keys, and lists of members that follow them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import IdentityError
from common.identity import Identity, Members, read_members, write_members
from common.masks import joined
from common.rotation import WITNESS, Rotation, check_rotations, lineage, rotated, sign_rotation

A, B, C, D, OTHER, COORDINATOR, SECOND = map(Identity.generate, "abcdoxy")
MEMBERS = Members({"shop": A.public, "other": OTHER.public}, COORDINATOR.public)
AT = 1_800_000_000


def statement(old: Identity = A, new: Identity = B, merchant: str = "shop") -> Rotation:
    """Return a statement as its owner makes it."""
    return sign_rotation(merchant, old, new, AT)


class TestStatement:
    """Rotation."""

    def test_both_keys_sign_the_same(self) -> None:
        """Label, id, both keys and the time, each behind its length."""
        one = statement()
        parts = (b"shop", A.public, B.public, b"1800000000")
        assert one.signed() == joined(b"hansa rotation", *parts)
        assert one.by_old == A.sign(one.signed())
        assert one.by_new == B.sign(one.signed())

    def test_it_comes_back(self) -> None:
        """By way of JSON."""
        one = statement()
        assert Rotation.from_document(json.loads(json.dumps(one.document))) == one

    def test_one_key_for_itself(self) -> None:
        """A key does not take over from itself."""
        with pytest.raises(IdentityError, match="both keys are the same"):
            statement(A, A)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"merchant": "other"}, "its old key"),
            ({"old": C.public}, "its old key"),
            ({"new": C.public}, "its old key"),
            ({"at": AT + 1}, "its old key"),
            ({"by_old": bytes(64)}, "its old key"),
            ({"by_new": bytes(64)}, "its new key"),
            ({"by_old": statement().by_new, "by_new": statement().by_old}, "its old key"),
        ],
    )
    def test_every_field_is_signed_by_both(self, changes: dict[str, Any], message: str) -> None:
        """Whatever is changed, it is no statement any more, for nobody who checks."""
        forged = replace(statement(), **changes)
        for use in (
            forged.check,
            lambda: Rotation.from_document(forged.document),
            lambda: rotated(MEMBERS, forged),
        ):
            with pytest.raises(IdentityError, match=message):
                use()

    def test_nobody_forces_a_key_upon_another(self) -> None:
        """The old key alone cannot name a key whose owner does not agree, and the other way."""
        one = replace(statement(), new=C.public)
        for forged in (
            replace(one, by_old=A.sign(one.signed()), by_new=A.sign(one.signed())),
            replace(one, by_old=C.sign(one.signed()), by_new=C.sign(one.signed())),
        ):
            with pytest.raises(IdentityError):
                rotated(MEMBERS, forged)

    @pytest.mark.parametrize(
        "changes",
        [
            *({"at": at} for at in (-1, 2**53, 1.5, True, None, "1", [1])),
            *({"merchant": name} for name in (None, 5, ["shop"])),
            *({"old": key} for key in (None, 5, "", "zz" * 32, A.public.hex().upper(), "00" * 31)),
            *({"by_new": text} for text in (None, "", "0" * 127, " " * 128, "é" * 128)),
            {"more": 1},
        ],
    )
    def test_odd_documents(self, changes: dict[str, Any]) -> None:
        """What is no statement is refused in words."""
        with pytest.raises(IdentityError):
            Rotation.from_document({**statement().document, **changes})

    @pytest.mark.parametrize("gone", ["merchant", "at", "old", "new", "by_old", "by_new"])
    def test_missing_fields(self, gone: str) -> None:
        """Each is needed."""
        document = statement().document
        del document[gone]
        with pytest.raises(IdentityError, match="expected a rotation"):
            Rotation.from_document(document)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=70),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner),
        )
    )
    def test_anything_else(self, document: Any) -> None:
        """A stranger's JSON is refused, whatever it is."""
        with pytest.raises(IdentityError):
            Rotation.from_document(document)


class TestMembers:
    """Rotated lists of members."""

    def test_a_merchants_key(self) -> None:
        """The new key is the enrolled one, and the list tells how it came about."""
        first, second = statement(), statement(B, C)
        found = rotated(rotated(MEMBERS, first), second)
        assert found.keys == {"shop": C.public, "other": OTHER.public}
        assert found.witness == COORDINATOR.public
        assert found.rotations == (first, second)
        assert found.keys_of("shop") == (A.public, B.public, C.public)
        assert found.keys_of("other") == (OTHER.public,)
        assert found.keys_of("stranger") == ()
        assert found.verify("shop", b"m", C.sign(b"m"))
        assert not found.verify("shop", b"m", A.sign(b"m"))
        assert MEMBERS.rotations == ()

    def test_the_witness(self) -> None:
        """Its key of today changes, the one before is remembered."""
        found = rotated(MEMBERS, statement(COORDINATOR, SECOND, WITNESS))
        assert found.witness == SECOND.public
        assert found.witnesses == (COORDINATOR.public, SECOND.public)
        assert found.keys == MEMBERS.keys

    def test_once_more(self) -> None:
        """A statement that comes twice changes nothing."""
        found = rotated(MEMBERS, statement())
        assert rotated(found, statement()) is found
        later = rotated(found, statement(B, C))
        assert rotated(later, statement()) is later

    @pytest.mark.parametrize(
        ("one", "message"),
        [
            (statement(C, D), "another key than its old"),
            (statement(OTHER, D), "another key than its old"),
            (statement(A, D, "stranger"), "another key than its old"),
            (statement(A, D, WITNESS), "another key than its old"),
            (statement(COORDINATOR, D), "another key than its old"),
            (statement(A, OTHER), "was used before"),
            (statement(A, COORDINATOR), "was used before"),
            (statement(COORDINATOR, A, WITNESS), "was used before"),
        ],
    )
    def test_what_the_list_contradicts(self, one: Rotation, message: str) -> None:
        """Not the owner's key of today, or a key that somebody has."""
        with pytest.raises(IdentityError, match=message):
            rotated(MEMBERS, one)

    def test_a_key_that_was_given_up(self) -> None:
        """It neither comes back nor hands over a second time."""
        found = rotated(MEMBERS, statement())
        for one, message in (
            (statement(B, A), "was used before"),
            (statement(A, C), "another key than its old"),
            (statement(OTHER, A, "other"), "was used before"),
        ):
            with pytest.raises(IdentityError, match=message):
                rotated(found, one)

    def test_statements_that_go_round(self) -> None:
        """Two owners of both keys can sign a circle; nobody runs in it."""
        circle = (statement(A, B), statement(B, A))
        assert lineage(A.public, "shop", circle) == (B.public, A.public)
        with pytest.raises(IdentityError, match="in use again"):
            check_rotations(circle, [A.public])
        with pytest.raises(IdentityError, match="twice"):
            check_rotations((statement(A, B), statement(A, C)), [])


class TestFile:
    """`members.toml` after rotations."""

    def test_it_comes_back(self, tmp_path: Path) -> None:
        """Keys, witness, keys before, and the statements."""
        members = MEMBERS
        for one in (
            statement(),
            statement(COORDINATOR, SECOND, WITNESS),
            statement(B, C),
            statement(SECOND, D, WITNESS),
        ):
            members = rotated(members, one)
        write_members(members, tmp_path / "members.toml")
        assert read_members(tmp_path / "members.toml") == members
        text = (tmp_path / "members.toml").read_text()
        assert f'previous = [\n    "{COORDINATOR.public.hex()}",' in text

    def test_without_rotations_nothing_is_new(self, tmp_path: Path) -> None:
        """A list that never changed a key is written as it always was."""
        write_members(MEMBERS, tmp_path / "members.toml")
        assert (tmp_path / "members.toml").read_text() == (
            f'[members]\nother = "{OTHER.public.hex()}"\nshop = "{A.public.hex()}"\n\n'
            f'[witness]\nkey = "{COORDINATOR.public.hex()}"\n'
        )

    def check(self, members: Members, path: Path, change: tuple[str, str], message: str) -> None:
        """Check that a changed file is refused."""
        write_members(members, path)
        text = path.read_text()
        assert change[0] in text
        path.write_text(text.replace(*change))
        with pytest.raises(IdentityError) as caught:
            read_members(path)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")

    def test_a_key_before_that_nothing_proves(self, tmp_path: Path) -> None:
        """Countersignatures of any key would be good otherwise."""
        path, key = tmp_path / "members.toml", COORDINATOR.public.hex()
        made_up = (f'key = "{key}"', f'key = "{key}"\nprevious = ["{C.public.hex()}"]')
        self.check(MEMBERS, path, made_up, "do not prove these keys")
        later = rotated(MEMBERS, statement(COORDINATOR, SECOND, WITNESS))
        another = (f'previous = [\n    "{key}"', f'previous = [\n    "{C.public.hex()}"')
        self.check(later, path, another, "do not prove these keys")
        self.check(later, path, (f'    "{key}",\n', ""), "do not prove these keys")

    def test_a_statement_that_was_changed(self, tmp_path: Path) -> None:
        """Every one is checked when it is read."""
        members = rotated(MEMBERS, statement())
        path = tmp_path / "members.toml"
        self.check(members, path, (f"at = {AT}", f"at = {AT + 1}"), "not signed with its old key")
        self.check(members, path, (f"at = {AT}\n", ""), "expected a rotation")

    def test_a_key_that_was_given_up_is_enrolled(self, tmp_path: Path) -> None:
        """The old key would be good again."""
        members = rotated(MEMBERS, statement())
        change = (f'shop = "{B.public.hex()}"', f'shop = "{A.public.hex()}"')
        self.check(members, tmp_path / "members.toml", change, "in use again")

    @pytest.mark.parametrize("odd", ["rotations = 5", "[rotations]\na = 1", 'rotations = ["x"]'])
    def test_odd_tables(self, tmp_path: Path, odd: str) -> None:
        """What is no list of statements is told."""
        path = tmp_path / "members.toml"
        text = f'[members]\nshop = "{A.public.hex()}"\n'
        path.write_text(f"{odd}\n{text}" if odd.startswith("r") else text + odd)
        with pytest.raises(IdentityError, match="rotation"):
            read_members(path)
