"""Identity keys and the list of members: where they lie, who may read them, what is refused."""

import os
from pathlib import Path

import pytest

from common.errors import IdentityError
from common.identity import (
    Identity,
    Members,
    read_identity,
    read_members,
    write_identity,
    write_members,
)

KEY = "ab" * 32


@pytest.fixture
def identity() -> Identity:
    """Give an identity."""
    return Identity.generate("shop")


class TestIdentityFile:
    """A private key on the disk."""

    def test_it_comes_back(self, identity: Identity, tmp_path: Path) -> None:
        """The same key, under the id that the merchant gives."""
        write_identity(identity, tmp_path / "key")
        found = read_identity("shop", tmp_path / "key")
        assert found.merchant == "shop"
        assert found.public == identity.public

    @pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
    def test_only_its_owner_reads_it(self, identity: Identity, tmp_path: Path, mask: int) -> None:
        """Mode 0600, whatever the umask."""
        before = os.umask(mask)
        try:
            write_identity(identity, tmp_path / "key")
        finally:
            os.umask(before)
        assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o601, 0o644])
    def test_a_key_that_others_can_read_is_refused(
        self, identity: Identity, tmp_path: Path, mode: int
    ) -> None:
        """The message says what to run."""
        write_identity(identity, tmp_path / "key")
        (tmp_path / "key").chmod(mode)
        with pytest.raises(IdentityError, match="others can read this key; run chmod 600"):
            read_identity("shop", tmp_path / "key")

    def test_it_is_never_overwritten(self, identity: Identity, tmp_path: Path) -> None:
        """A second key does not replace the first, and a link leads nowhere."""
        write_identity(identity, tmp_path / "key")
        before = (tmp_path / "key").read_bytes()
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        for name in ("key", "link"):
            with pytest.raises(IdentityError, match="there is a key already"):
                write_identity(Identity.generate("shop"), tmp_path / name)
        assert (tmp_path / "key").read_bytes() == before
        assert not (tmp_path / "elsewhere").exists()

    def test_it_cannot_be_written_nowhere(self, identity: Identity, tmp_path: Path) -> None:
        """A missing folder is told in one line."""
        with pytest.raises(IdentityError, match="cannot be written"):
            write_identity(identity, tmp_path / "no" / "key")

    def test_a_missing_file_is_told(self, tmp_path: Path) -> None:
        """The message says which setting it is about."""
        with pytest.raises(IdentityError, match=r"there is no identity key.*merchant\.key"):
            read_identity("shop", tmp_path / "key")

    def test_a_folder_is_no_key(self, tmp_path: Path) -> None:
        """Nor anything else that cannot be read."""
        with pytest.raises(IdentityError, match="cannot be read as an identity key"):
            read_identity("shop", tmp_path)

    @pytest.mark.parametrize(
        "content",
        [b"", b"ab" * 31, b"ab" * 33, b"zz" * 32, b"AB" * 32, b"ab" * 32 + b"\nab", b"\xff" * 64],
    )
    def test_something_else_is_no_key(self, tmp_path: Path, content: bytes) -> None:
        """And what stands there is not in the message."""
        (tmp_path / "key").write_bytes(content)
        (tmp_path / "key").chmod(0o600)
        with pytest.raises(IdentityError, match="identity key") as caught:
            read_identity("shop", tmp_path / "key")
        assert not content or content[:8].decode("latin-1") not in str(caught.value)


class TestKeys:
    """What an identity is good for."""

    def test_a_signature_is_checked_against_the_enrolled_key(self, identity: Identity) -> None:
        """Right message, right merchant, right key; nothing else."""
        members = Members({"shop": identity.public, "other": Identity.generate("other").public})
        signature = identity.sign(b"message")
        assert members.verify("shop", b"message", signature)
        assert not members.verify("shop", b"massage", signature)
        assert not members.verify("other", b"message", signature)
        assert not members.verify("stranger", b"message", signature)
        for wrong in (b"", signature[:-1], signature + b"\0", bytes(64)):
            assert not members.verify("shop", b"message", wrong)

    def test_a_key_that_is_no_point_verifies_nothing(self) -> None:
        """An enrolled key of nonsense is no crash."""
        for key in (b"\xff" * 32, bytes(32), b"\x02" + bytes(31)):
            assert not Members({"shop": key}).verify("shop", b"message", b"\x01" * 64)

    def test_files_are_sealed_with_keys_of_their_own(self, identity: Identity) -> None:
        """Another purpose or another identity gives another key; none is the signing key."""
        found = {
            identity.sealing_key(b"session"),
            identity.sealing_key(b"other"),
            Identity.generate("shop").sealing_key(b"session"),
            identity.key.private_bytes_raw(),
        }
        assert len(found) == 4
        assert identity.sealing_key(b"session") == identity.sealing_key(b"session")

    def test_it_does_not_print_its_key(self, identity: Identity) -> None:
        """A logged identity is no leak."""
        assert identity.key.private_bytes_raw().hex() not in repr(identity)


class TestMembersFile:
    """`members.toml`."""

    def test_it_comes_back(self, tmp_path: Path) -> None:
        """With ids that TOML must quote."""
        names = ["a", "B.2", "x_y-z", "9", "a" * 64]
        members = Members({name: Identity.generate(name).public for name in names})
        write_members(members, tmp_path / "members.toml")
        assert read_members(tmp_path / "members.toml") == members

    def test_it_cannot_be_written_nowhere(self, tmp_path: Path) -> None:
        """A missing folder is told in one line."""
        with pytest.raises(IdentityError, match="cannot be written"):
            write_members(Members({}), tmp_path / "no" / "members.toml")

    def test_a_missing_file_is_told(self, tmp_path: Path) -> None:
        """The message says what it is for."""
        with pytest.raises(IdentityError, match="there is no list of members"):
            read_members(tmp_path / "members.toml")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("members", "cannot be read as TOML"),
            ("", "expected one table"),
            ('members = "none"', "expected one table"),
            ("members = []", "expected one table"),
            ("[[members]]", "expected one table"),
            (f'[members]\na = "{KEY}"\n[more]\nb = 1', "expected one table"),
            (f'a = "{KEY}"', "expected one table"),
            (f'[members]\n"a b" = "{KEY}"', "'a b' is no merchant id"),
            (f'[members]\n"" = "{KEY}"', "'' is no merchant id"),
            (f'[members]\n".a" = "{KEY}"', "'.a' is no merchant id"),
            (f'[members]\n"a\\n" = "{KEY}"', "is no merchant id"),
            (f'[members]\n"{"a" * 65}" = "{KEY}"', "is no merchant id"),
            (f'[members]\n"é" = "{KEY}"', "is no merchant id"),
            ("[members]\na = 1", "members.a: expected 64 hexadecimal digits"),
            ('[members]\na = ""', "members.a: expected 64 hexadecimal digits"),
            (f'[members]\na = "{KEY[:-1]}"', "members.a: expected 64 hexadecimal digits"),
            (f'[members]\na = "{KEY.upper()}"', "members.a: expected 64 hexadecimal digits"),
            (f'[members]\na = "{KEY}\\n"', "members.a: expected 64 hexadecimal digits"),
            (f'[members]\na.b = "{KEY}"', "members.a: expected 64 hexadecimal digits"),
            (f'[members]\na = "{KEY}"\na = "{KEY}"', "cannot be read as TOML"),
            (f'[members]\na = "{KEY}"\nb = "{KEY}"', "two members have the same public key"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, text: str, message: str) -> None:
        """File, key, and what was expected."""
        path = tmp_path / "members.toml"
        path.write_text(text, encoding="utf-8")
        with pytest.raises(IdentityError) as caught:
            read_members(path)
        assert message in str(caught.value)
        assert str(caught.value).startswith(f"{path}: ")

    def test_bytes_that_are_no_text_are_told(self, tmp_path: Path) -> None:
        """As is a folder."""
        (tmp_path / "members.toml").write_bytes(b"\xff\xfe")
        for path in (tmp_path / "members.toml", tmp_path):
            with pytest.raises(IdentityError, match="cannot be read as TOML"):
                read_members(path)

    @pytest.mark.parametrize("text", ["members = " + "1" * 5000, "members = " + "[" * 5000])
    def test_what_tomllib_chokes_on_is_told(self, tmp_path: Path, text: str) -> None:
        """Python's own limits are no crash either."""
        (tmp_path / "members.toml").write_text(text)
        with pytest.raises(IdentityError, match="cannot be read as TOML"):
            read_members(tmp_path / "members.toml")
