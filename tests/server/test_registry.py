"""Who was invited, enrolled and revoked."""

import multiprocessing
import secrets
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.enrolment import Enrolling, secret_sha256
from common.errors import ArchiveError, EnrolmentError, SuperLinkError
from common.identity import Identity, read_members
from common.rotation import WITNESS, Rotation, sign_rotation
from server.registry import Registry

OPERATOR = b"\xee" * 32
NOW = 1_800_000_000.0


def node_of(key: bytes, _name: str) -> int:
    """Return a node's id: the same for the same key, larger than SQLite's integers."""
    return 2**63 + int.from_bytes(key[:4], "big")


def asked(merchant: str, secret: str, number: int = 1, node: bytes | None = None) -> Enrolling:
    """Return a request with keys that a number stands for."""
    key = node if node is not None else f"{number:04}".encode()
    return Enrolling(merchant, bytes([number]) * 32, key, secret_sha256(secret))


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """Make an empty registry."""
    return Registry.create(tmp_path, OPERATOR)


def enrolled(registry: Registry, merchant: str, number: int) -> str:
    """Enrol a merchant; return the secret that it used."""
    secret = registry.invite(merchant, 1, NOW)
    registry.enrol(asked(merchant, secret, number), node_of, NOW)
    return secret


class TestEnrolling:
    """A token becomes a member."""

    def test_a_member(self, registry: Registry, tmp_path: Path) -> None:
        """Is in the list, with its node, and in `members.toml`."""
        assert (registry.version, registry.nodes(), registry.added_at()) == (0, {}, {})
        enrolled(registry, "a", 1)
        enrolled(registry, "b", 2)
        assert registry.version == 2
        assert registry.added_at() == {"a": 1, "b": 2}
        assert registry.nodes() == {node_of(b"0001", ""): "a", node_of(b"0002", ""): "b"}
        members = read_members(tmp_path / "members.toml")
        assert members.keys == {"a": b"\1" * 32, "b": b"\2" * 32}
        assert members.witness == OPERATOR

    def test_a_token_twice(self, registry: Registry) -> None:
        """Is refused to anybody else, and changes nothing."""
        secret = enrolled(registry, "a", 1)
        with pytest.raises(EnrolmentError, match="was used already"):
            registry.enrol(asked("a", secret, 2), node_of, NOW)
        assert registry.version == 1

    def test_the_same_again(self, registry: Registry) -> None:
        """A merchant whose answer was lost gets it again; nothing is registered twice."""
        secret = enrolled(registry, "a", 1)
        state = registry.enrol(asked("a", secret, 1), _no_node, NOW + 1e9)
        assert (state.version, set(state.members)) == (1, {"a"})

    def test_the_same_again_after_a_revocation(self, registry: Registry) -> None:
        """Is refused: the token is no way back."""
        secret = enrolled(registry, "a", 1)
        registry.revoke("a", NOW)
        with pytest.raises(EnrolmentError, match="was used already"):
            registry.enrol(asked("a", secret, 1), node_of, NOW)

    @pytest.mark.parametrize(
        ("merchant", "later", "words"),
        [("b", 0.0, "another merchant's"), ("a", 3600.0, "too old")],
    )
    def test_a_token_that_does_not_fit(
        self, registry: Registry, merchant: str, later: float, words: str
    ) -> None:
        """Is refused, and stays as good as it was."""
        secret = registry.invite("a", 1, NOW)
        with pytest.raises(EnrolmentError, match=words):
            registry.enrol(asked(merchant, secret), _no_node, NOW + later)
        with pytest.raises(EnrolmentError, match=words):
            registry.check_token(secret_sha256(secret), merchant, NOW + later)
        registry.enrol(asked("a", secret), node_of, NOW + 3599)

    def test_an_unknown_token(self, registry: Registry) -> None:
        """Is refused."""
        with pytest.raises(EnrolmentError, match="not known here"):
            registry.enrol(asked("a", secrets.token_hex(32)), _no_node, NOW)

    def test_an_id_that_is_enrolled(self, registry: Registry) -> None:
        """Is neither invited again nor enrolled by an older token."""
        older = registry.invite("a", 1, NOW)
        enrolled(registry, "a", 1)
        with pytest.raises(EnrolmentError, match="is enrolled already"):
            registry.invite("a", 1, NOW)
        with pytest.raises(EnrolmentError, match="is enrolled already"):
            registry.enrol(asked("a", older, 2), _no_node, NOW)

    def test_an_identity_of_two_merchants(self, registry: Registry) -> None:
        """Is refused; so is the operator's own."""
        enrolled(registry, "a", 1)
        for number in (1, 0xEE):
            secret = registry.invite("b", 1, NOW)
            with pytest.raises(EnrolmentError, match="under another id"):
                registry.enrol(asked("b", secret, number, b"new"), _no_node, NOW)

    def test_a_node_key_of_two_merchants(self, registry: Registry) -> None:
        """Is refused, also after the first was revoked: Flower takes no key twice."""
        enrolled(registry, "a", 1)
        secret = registry.invite("b", 1, NOW)
        for _ in range(2):
            with pytest.raises(EnrolmentError, match="takes no key twice"):
                registry.enrol(asked("b", secret, 2, b"0001"), _no_node, NOW)
            if "a" in registry.added_at():
                registry.revoke("a", NOW)

    def test_a_node_id_that_comes_twice(self, registry: Registry) -> None:
        """Is refused: messages for one merchant would reach another."""
        enrolled(registry, "a", 1)
        secret = registry.invite("b", 1, NOW)
        with pytest.raises(EnrolmentError, match="id twice"):
            registry.enrol(asked("b", secret, 2), lambda _k, _n: node_of(b"0001", ""), NOW)

    def test_a_superlink_that_is_down(self, registry: Registry) -> None:
        """Leaves everything as it was, the token unused."""
        secret = registry.invite("a", 1, NOW)
        with pytest.raises(SuperLinkError):
            registry.enrol(asked("a", secret), _down, NOW)
        assert registry.version == 0
        registry.enrol(asked("a", secret), node_of, NOW)

    def test_only_hashes_are_kept(self, registry: Registry, tmp_path: Path) -> None:
        """No secret is in any file."""
        secret = enrolled(registry, "a", 1)
        for path in tmp_path.iterdir():
            content = path.read_bytes()
            assert secret.encode() not in content
            assert bytes.fromhex(secret) not in content


class TestRevoking:
    """A member that is one no longer."""

    def test_is_off_the_list(self, registry: Registry, tmp_path: Path) -> None:
        """The version rises, and its node is a former one."""
        enrolled(registry, "a", 1)
        enrolled(registry, "b", 2)
        assert registry.revoke("a", NOW).node == node_of(b"0001", "")
        assert (registry.version, registry.added_at()) == (3, {"b": 2})
        assert registry.former_nodes() == {node_of(b"0001", "")}
        assert set(read_members(tmp_path / "members.toml").keys) == {"b"}
        assert registry.state().signed_list().revoked == {"a": 3}

    def test_may_come_back(self, registry: Registry) -> None:
        """With a new token and a new node key; the list says since when."""
        enrolled(registry, "a", 1)
        registry.revoke("a", NOW)
        enrolled(registry, "a", 2)
        assert (registry.added_at(), registry.state().revoked) == ({"a": 3}, {})

    def test_a_stranger(self, registry: Registry) -> None:
        """Cannot be revoked."""
        with pytest.raises(EnrolmentError, match="'x' is not enrolled"):
            registry.revoke("x", NOW)


class TestRotating:
    """Another node key for the same merchant."""

    def test_a_new_key(self, registry: Registry) -> None:
        """The old node is told, the list is the same."""
        enrolled(registry, "a", 1)
        assert registry.rotate("a", b"0005", 100, node_of) == node_of(b"0001", "")
        assert registry.nodes() == {node_of(b"0005", ""): "a"}
        assert (registry.version, registry.added_at()) == (1, {"a": 1})
        assert registry.former_nodes() == {node_of(b"0001", "")}

    def test_asked_again(self, registry: Registry) -> None:
        """Changes nothing."""
        enrolled(registry, "a", 1)
        registry.rotate("a", b"0005", 100, node_of)
        assert registry.rotate("a", b"0005", 100, _no_node) == 0

    def test_an_older_request(self, registry: Registry) -> None:
        """Is refused: somebody replays it."""
        enrolled(registry, "a", 1)
        registry.rotate("a", b"0005", 100, node_of)
        with pytest.raises(EnrolmentError, match="older than one"):
            registry.rotate("a", b"0006", 100, _no_node)

    def test_a_key_that_was_used(self, registry: Registry) -> None:
        """By anybody, ever, is refused."""
        enrolled(registry, "a", 1)
        enrolled(registry, "b", 2)
        registry.rotate("a", b"0005", 100, node_of)
        for key in (b"0002", b"0001"):
            with pytest.raises(EnrolmentError, match="was used before"):
                registry.rotate("a", key, 1000, _no_node)

    def test_a_forgotten_node(self, registry: Registry) -> None:
        """Gets the id that the SuperLink gives it anew."""
        enrolled(registry, "a", 1)
        registry.replace_node("a", 7)
        registry.replace_node("a", 7)
        assert registry.nodes() == {7: "a"}
        assert registry.version == 1


class TestRekeying:
    """Another identity key for the same merchant."""

    @pytest.fixture
    def rotation(self, registry: Registry) -> Rotation:
        """Enrol a merchant, and let it state that it has another key."""
        old, new = (Identity.generate("a") for _ in range(2))
        secret = registry.invite("a", 1, NOW)
        request = Enrolling("a", old.public, b"0001", secret_sha256(secret))
        registry.enrol(request, node_of, NOW)
        return sign_rotation("a", old, new, 1)

    def test_a_new_key(self, registry: Registry, rotation: Rotation, tmp_path: Path) -> None:
        """Is in the list, with the statement, as if added then; the node stays."""
        enrolled(registry, "b", 2)
        nodes = registry.nodes()
        for _ in range(2):
            registry.rekey(rotation)
            assert registry.version == 3
        assert registry.added_at() == {"a": 3, "b": 2}
        assert registry.nodes() == nodes
        members = read_members(tmp_path / "members.toml")
        assert members.keys_of("a") == (rotation.old, rotation.new)
        registry.rotate("a", b"0005", 100, node_of)
        assert registry.added_at()["a"] == 3

    def test_another_merchants(self, registry: Registry, rotation: Rotation) -> None:
        """Nobody's key is replaced by a statement about another one."""
        enrolled(registry, "b", 2)
        for merchant, words in (("b", "has another key"), ("x", "is not enrolled")):
            with pytest.raises(EnrolmentError, match=words):
                registry.rekey(replace(rotation, merchant=merchant))
        assert registry.version == 2

    def test_a_key_that_was_given_up(self, registry: Registry, rotation: Rotation) -> None:
        """Is enrolled no more: the list would contradict itself."""
        registry.rekey(rotation)
        registry.revoke("a", NOW)
        secret = registry.invite("a", 1, NOW)
        for key, node in ((rotation.old, None), (rotation.new, 1)):
            request = Enrolling("a", key, b"0007", secret_sha256(secret))
            if node is None:
                with pytest.raises(EnrolmentError, match="was given up"):
                    registry.enrol(request, _no_node, NOW)
            else:
                registry.enrol(request, node_of, NOW)

    def test_the_operators_own(self, tmp_path: Path) -> None:
        """Earlier keys of the witness stay proven."""
        old, new = (Identity.generate("coordinator") for _ in range(2))
        (tmp_path / "other").mkdir()
        statement = sign_rotation(WITNESS, old, new, 1)
        Registry.create(tmp_path / "other", new.public, [statement])
        members = read_members(tmp_path / "other" / "members.toml")
        assert members.witnesses == (old.public, new.public)


class TestInvitations:
    """Tokens that can still be used."""

    def test_are_listed(self, registry: Registry) -> None:
        """Neither used ones nor old ones."""
        registry.invite("a", 1, NOW)
        enrolled(registry, "b", 2)
        registry.invite("c", 5, NOW)
        assert [found.merchant for found in registry.invitations(NOW)] == ["a", "c"]
        assert [found.merchant for found in registry.invitations(NOW + 7200)] == ["c"]


class TestAuthorities:
    """Who heard of the next certificate authority."""

    def test_untold(self, registry: Registry) -> None:
        """Members that did not, by name."""
        for number, name in enumerate("abc", 1):
            enrolled(registry, name, number)
        registry.tell("b", "one", NOW)
        registry.tell("b", "one", NOW)
        registry.tell("c", "other", NOW)
        assert registry.untold("one") == ["a", "c"]


class TestTheFile:
    """One SQLite file, append-only, for several processes."""

    @pytest.mark.parametrize("table", ["operator", "tokens", "uses", "history", "rotations"])
    @pytest.mark.parametrize("change", ["DELETE FROM {}", "UPDATE {} SET rowid = 99"])
    def test_nothing_is_taken_back(
        self, registry: Registry, tmp_path: Path, table: str, change: str
    ) -> None:
        """The database itself refuses."""
        old, new = (Identity.generate("a") for _ in range(2))
        secret = registry.invite("a", 1, NOW)
        request = Enrolling("a", old.public, b"0001", secret_sha256(secret))
        registry.enrol(request, node_of, NOW)
        registry.rekey(sign_rotation("a", old, new, 1))
        database = sqlite3.connect(tmp_path / "registry.sqlite")
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            database.execute(change.format(table))
        database.close()

    def test_for_the_operator_alone(self, registry: Registry, tmp_path: Path) -> None:
        """Mode 0600."""
        assert registry.version == 0
        assert (tmp_path / "registry.sqlite").stat().st_mode & 0o777 == 0o600

    def test_none(self, tmp_path: Path) -> None:
        """What to do is told."""
        with pytest.raises(ArchiveError, match="hansa server init"):
            Registry(tmp_path)

    def test_never_over_another(self, registry: Registry, tmp_path: Path) -> None:
        """A second one is refused."""
        enrolled(registry, "a", 1)
        with pytest.raises(ArchiveError, match="cannot be made"):
            Registry.create(tmp_path, OPERATOR)
        assert registry.version == 1

    def test_another_version(self, registry: Registry, tmp_path: Path) -> None:
        """Is told."""
        assert registry.version == 0
        database = sqlite3.connect(tmp_path / "registry.sqlite")
        database.execute("PRAGMA user_version = 7")
        database.close()
        with pytest.raises(ArchiveError, match="another version"):
            Registry(tmp_path)

    def test_something_else(self, tmp_path: Path) -> None:
        """Is told."""
        (tmp_path / "registry.sqlite").write_bytes(b"not a database" * 100)
        with pytest.raises(ArchiveError, match="cannot be used"):
            Registry(tmp_path)

    def test_a_list_that_was_lost(self, registry: Registry, tmp_path: Path) -> None:
        """Is written again from the registry."""
        enrolled(registry, "a", 1)
        (tmp_path / "members.toml").write_text("members = 3")
        registry.write_members()
        assert set(read_members(tmp_path / "members.toml").keys) == {"a"}

    def test_a_list_that_could_not_be_written(
        self, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is told, and written when the merchant asks again."""
        secret = registry.invite("a", 1, NOW)

        def full(*_arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr("server.registry.write_atomically", full)
            with pytest.raises(ArchiveError, match=r"members\.toml: cannot be written"):
                registry.enrol(asked("a", secret), node_of, NOW)
        registry.enrol(asked("a", secret), _no_node, NOW)
        assert set(read_members(tmp_path / "members.toml").keys) == {"a"}

    def test_one_token_in_many_processes(self, registry: Registry, tmp_path: Path) -> None:
        """Makes one member, whoever is first."""
        secret = registry.invite("a", 1, NOW)
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            jobs = [(tmp_path, secret, number) for number in range(1, 9)]
            done = pool.starmap(try_to_enrol, jobs)
        assert sum(done) == 1
        assert registry.version == 1

    def test_many_merchants_in_many_processes(self, registry: Registry, tmp_path: Path) -> None:
        """Each gets a version of its own, and the file holds the last."""
        names = [f"m{number}" for number in range(1, 13)]
        jobs = [(tmp_path, registry.invite(n, 1, NOW), k, n) for k, n in enumerate(names, 1)]
        with multiprocessing.get_context("spawn").Pool(4) as pool:
            assert all(pool.starmap(try_to_enrol, jobs))
        assert sorted(registry.added_at().values()) == list(range(1, 13))
        assert set(read_members(tmp_path / "members.toml").keys) == set(names)

    def test_a_process_killed_in_mid_change(self, registry: Registry, tmp_path: Path) -> None:
        """Leaves the token unused and the lock free."""
        secret = registry.invite("a", 1, NOW)
        code = (
            "import os, signal, sys; from pathlib import Path;"
            "from server.registry import Registry;"
            "from common.enrolment import Enrolling, secret_sha256;"
            "Registry(Path(sys.argv[1])).enrol(Enrolling('a', b'1' * 32, b'k', "
            "secret_sha256(sys.argv[2])), lambda *_: os.kill(os.getpid(), signal.SIGKILL), 1.8e9)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path), secret], check=False)
        assert done.returncode == -9
        assert registry.version == 0
        assert registry.enrol(asked("a", secret), node_of, NOW).version == 1


def try_to_enrol(folder: Path, secret: str, number: int, merchant: str = "a") -> bool:
    """Enrol in a process of its own; tell whether it worked."""
    try:
        Registry(folder).enrol(asked(merchant, secret, number), node_of, NOW)
    except EnrolmentError:
        return False
    return True


def _no_node(_key: bytes, _name: str) -> int:
    raise AssertionError("no node may be registered")


def _down(_key: bytes, _name: str) -> int:
    raise SuperLinkError("the SuperLink does not answer")


class RegistryMachine(RuleBasedStateMachine):
    """The registry against a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self.registry = Registry.create(Path(self._folder.name), OPERATOR)
        self.members: dict[str, int] = {}
        self.revoked: dict[str, int] = {}
        self.version = 0
        self.keys = 0

    names = st.sampled_from(["a", "b", "c", "d"])

    @rule(name=names)
    def enrol(self, name: str) -> None:
        """A new merchant is added, one that is there is refused."""
        if name in self.members:
            with pytest.raises(EnrolmentError):
                self.registry.invite(name, 1, NOW)
            return
        self.keys += 1
        secret = self.registry.invite(name, 1, NOW)
        identity = self.keys.to_bytes(32, "big")
        request = Enrolling(name, identity, f"{self.keys:06}".encode(), secret_sha256(secret))
        self.registry.enrol(request, lambda _k, _n: self.keys, NOW)
        self.version += 1
        self.members[name] = self.version
        self.revoked.pop(name, None)

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def revoke(self, data: st.DataObject) -> None:
        """A member goes."""
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.registry.revoke(name, NOW)
        self.version += 1
        del self.members[name]
        self.revoked[name] = self.version

    @precondition(lambda self: self.members)
    @rule(data=st.data())
    def rotate(self, data: st.DataObject) -> None:
        """A member changes its node; the list stays."""
        name = data.draw(st.sampled_from(sorted(self.members)))
        self.keys += 1
        self.registry.rotate(name, f"{self.keys:06}".encode(), self.keys, lambda _k, _n: self.keys)

    @invariant()
    def agrees(self) -> None:
        """Version, members and revocations are the model's."""
        listed = self.registry.state().signed_list()
        assert (listed.version, listed.added, listed.revoked) == (
            self.version,
            self.members,
            self.revoked,
        )
        assert set(self.registry.nodes().values()) == set(self.members)
        assert set(read_members(Path(self._folder.name) / "members.toml").keys) == set(self.members)

    def teardown(self) -> None:
        """Remove the files."""
        self._folder.cleanup()


TestMachine = RegistryMachine.TestCase
TestMachine.settings = hypothesis_settings(max_examples=15, stateful_step_count=12, deadline=None)


class TestOperator:
    """The operator's own key changes."""

    def test_a_new_key(self, tmp_path: Path) -> None:
        """Once, with a new version, after which others are counted on."""
        old, new = Identity.generate("coordinator"), Identity.generate("coordinator")
        registry = Registry.create(tmp_path, old.public)
        enrolled(registry, "a", 1)
        rotation = sign_rotation(WITNESS, old, new, 1)
        for _ in range(2):
            registry.rekey_operator(rotation)
            state = registry.state()
            assert (state.version, state.operator) == (2, new.public)
        assert read_members(tmp_path / "members.toml").witnesses == (old.public, new.public)
        enrolled(registry, "b", 2)
        assert registry.state().version == 3
        assert registry.added_at() == {"a": 1, "b": 3}

    def test_of_another_key(self, tmp_path: Path) -> None:
        """A statement of a key that is not the operator's changes nothing."""
        registry = Registry.create(tmp_path, OPERATOR)
        one, other = Identity.generate("coordinator"), Identity.generate("coordinator")
        with pytest.raises(EnrolmentError, match="another key of the operator"):
            registry.rekey_operator(sign_rotation(WITNESS, one, other, 1))
        assert registry.state().operator == OPERATOR

    def test_of_an_earlier_version(self, tmp_path: Path) -> None:
        """A registry without the table gets it when it is opened, and keeps what it holds."""
        old, new = Identity.generate("coordinator"), Identity.generate("coordinator")
        enrolled(Registry.create(tmp_path, old.public), "a", 1)
        with sqlite3.connect(tmp_path / "registry.sqlite") as database:
            database.executescript("DROP TABLE successors; PRAGMA user_version = 1;")
        database.close()
        registry = Registry(tmp_path)
        registry.rekey_operator(sign_rotation(WITNESS, old, new, 1))
        assert registry.state().version == 2
        assert set(registry.state().members) == {"a"}
