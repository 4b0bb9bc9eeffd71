"""Who was invited, who is enrolled, who was revoked: `<folder>/registry.sqlite`.

Tokens, their uses and the history of members are append-only; what holds now follows from the
history. Several processes may use it: every change is one transaction that begins with the write
lock. After each change `members.toml` is written anew, which the coordinator reads.
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from common.enrolment import Enrolling, secret_sha256
from common.errors import ArchiveError, EnrolmentError
from common.files import write_atomically
from common.identity import members_toml
from common.rotation import Rotation
from server.registry_rows import (
    SCHEMA,
    SINCE_VERSION_1,
    Invitation,
    Member,
    State,
    append,
    append_rotation,
    check_fresh,
    check_keys,
    check_node,
    check_token,
    is_repeated,
    state_of,
)

NAME = "registry.sqlite"
HOUR_S = 3600.0
_WAIT_S = 30.0  # for another process's transaction
_SCHEMA_VERSION = 2

Register = Callable[[bytes, str], int]  # a node's public key and the merchant -> the node's id


class Registry:
    """The registry of a federation, made by `create`.

    Args:
        folder: Of the federation.

    Raises:
        ArchiveError: There is none, or it cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / NAME
        if not self._path.is_file():
            raise ArchiveError(f"{self._path}: there is none; make it with hansa server init")
        with self._opened() as database:
            (version,) = database.execute("PRAGMA user_version").fetchone()
            if version == 1:
                database.executescript(f"BEGIN IMMEDIATE;{SINCE_VERSION_1}COMMIT;")
                version = _SCHEMA_VERSION
        if version != _SCHEMA_VERSION:
            raise ArchiveError(f"{self._path}: was written by another version of Hansa")

    @classmethod
    def create(
        cls, folder: Path, operator: bytes, rotations: Iterable[Rotation] = ()
    ) -> "Registry":
        """Make an empty registry, and the empty list of members.

        Args:
            folder: Of the federation.
            operator: Its public key.
            rotations: How that key came after earlier ones.

        Raises:
            ArchiveError: There is one already, or it cannot be written.
        """
        path = folder / NAME
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        except OSError as error:
            raise ArchiveError(f"{path}: cannot be made ({error.strerror})") from None
        try:
            with sqlite3.connect(path) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.executescript(SCHEMA)
                database.execute("INSERT INTO operator VALUES (?)", (operator.hex(),))
                for rotation in rotations:
                    append_rotation(database, rotation)
                database.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            database.close()
        except sqlite3.Error as error:
            path.unlink()
            raise ArchiveError(f"{path}: cannot be written ({error})") from None
        registry = cls(folder)
        registry.write_members()
        return registry

    def state(self) -> State:
        """Return who is enrolled now."""
        with self._opened() as database:
            database.execute("BEGIN")  # all tables at one moment
            return state_of(database)

    @property
    def version(self) -> int:
        """The version of the list of members; it rises by one with each change."""
        return self.state().version

    def added_at(self) -> dict[str, int]:
        """Return the version at which each member was added."""
        return {name: member.added for name, member in self.state().members.items()}

    def nodes(self) -> dict[int, str]:
        """Return the merchant of each node that may take part."""
        return {member.node: name for name, member in self.state().members.items()}

    def former_nodes(self) -> set[int]:
        """Return nodes of merchants that were revoked, or that replaced their key."""
        with self._opened() as database:
            ever = {int(node) for (node,) in database.execute("SELECT node FROM history")}
            return ever - {member.node for member in state_of(database).members.values()}

    def invitations(self, now: float) -> list[Invitation]:
        """Return the tokens that can still be used, the newest last."""
        with self._opened() as database:
            rows = database.execute(
                "SELECT merchant, expires_at FROM tokens WHERE expires_at > ? AND secret_sha256 "
                "NOT IN (SELECT secret_sha256 FROM uses) ORDER BY at",
                (now,),
            ).fetchall()
        return [Invitation(*row) for row in rows]

    def invite(self, merchant: str, hours: float, now: float) -> str:
        """Return the secret of a new token; only its hash is kept.

        Raises:
            EnrolmentError: The merchant is enrolled already.
        """
        secret = secrets.token_hex(32)
        with self._changing() as database:
            if merchant in state_of(database).members:
                raise EnrolmentError(
                    f"'{merchant}' is enrolled already; for other keys, revoke it first"
                )
            database.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?)",
                (secret_sha256(secret), merchant, now, now + hours * HOUR_S),
            )
        return secret

    def check_token(self, secret: str, merchant: str, now: float) -> None:
        """Raise an `EnrolmentError` unless a token (its hash) could be used now."""
        with self._opened() as database:
            check_token(database, secret, merchant, now)

    def enrol(self, asked: Enrolling, register: Register, now: float | None = None) -> State:
        """Use a token: register the node, add the merchant to the list.

        The same merchant with the same keys and token gets the same again: its first answer may
        have been lost.

        Args:
            asked: What the merchant sent; its proof was checked.
            register: Lets the node in; if it raises, nothing is changed.
            now: Seconds since 1970.

        Raises:
            EnrolmentError: The token or a key cannot be used.
        """
        at = time.time() if now is None else now
        with self._changing() as database:
            state = state_of(database)
            if not is_repeated(database, state, asked):
                check_token(database, asked.secret_sha256, asked.merchant, at)
                check_keys(database, state, asked)
                node = register(asked.node, asked.merchant)
                check_node(state, node)
                keys = (asked.identity.hex(), asked.node.decode("ascii"))
                use = (asked.secret_sha256, at, *keys)
                database.execute("INSERT INTO uses VALUES (?, ?, ?, ?)", use)
                append(database, (at, "added", asked.merchant, *keys, node, state.version + 1, 0))
        self.write_members()
        return self.state()

    def rotate(self, merchant: str, node_key: bytes, asked_at: int, register: Register) -> int:
        """Replace a member's node; return the id of the old one, which is to be let in no longer.

        Raises:
            EnrolmentError: It is no member, the key was used before, or the request is old.
        """
        with self._changing() as database:
            state = state_of(database)
            member = _member(state, merchant)
            if member.node_key == node_key:
                return 0  # asked again, because the answer was lost
            if asked_at <= member.asked_at:
                raise EnrolmentError("this request is older than one that was answered")
            check_fresh(database, node_key)
            node = register(node_key, merchant)
            check_node(state, node)
            row = (merchant, member.identity.hex(), node_key.decode("ascii"), node, state.version)
            append(database, (time.time(), "rotated", *row, asked_at))
        return member.node

    def replace_node(self, merchant: str, node: int) -> None:
        """Note that the SuperLink, which had forgotten a node, now knows it by another id."""
        with self._changing() as database:
            state = state_of(database)
            member = _member(state, merchant)
            if member.node == node:
                return
            check_node(state, node)
            row = (merchant, member.identity.hex(), member.node_key.decode("ascii"), node)
            append(database, (time.time(), "rotated", *row, state.version, member.asked_at))

    def rekey(self, rotation: Rotation) -> None:
        """Take a member's new identity key for its old one; once, later calls change nothing.

        Raises:
            EnrolmentError: It is no member, or its key is another one.
        """
        with self._changing() as database:
            state = state_of(database)
            if rotation not in state.rotations:
                member = _member(state, rotation.merchant)
                if member.identity != rotation.old:
                    raise EnrolmentError(f"'{rotation.merchant}' has another key than that old one")
                keys = (rotation.new.hex(), member.node_key.decode("ascii"))
                last = (member.node, state.version + 1, member.asked_at)
                append_rotation(database, rotation)
                append(database, (time.time(), "rekeyed", rotation.merchant, *keys, *last))
        self.write_members()

    def rekey_operator(self, rotation: Rotation) -> None:
        """Take the operator's new identity key for its old one; once, later calls change nothing.

        The list of members gets a new version, which names the new key as the witness.

        Raises:
            EnrolmentError: The operator's key is another one than the old.
        """
        with self._changing() as database:
            state = state_of(database)
            if rotation not in state.rotations:
                if state.operator != rotation.old:
                    raise EnrolmentError("the registry has another key of the operator")
                append_rotation(database, rotation)
                row = (rotation.new.hex(), state.version + 1)
                database.execute("INSERT INTO successors VALUES (?, ?)", row)
        self.write_members()

    def revoke(self, merchant: str, now: float | None = None) -> Member:
        """Take a merchant off the list; return what it was.

        Raises:
            EnrolmentError: It is no member.
        """
        at = time.time() if now is None else now
        with self._changing() as database:
            state = state_of(database)
            member = _member(state, merchant)
            keys = (member.identity.hex(), member.node_key.decode("ascii"), member.node)
            append(database, (at, "revoked", merchant, *keys, state.version + 1, 0))
        self.write_members()
        return member

    def tell(self, merchant: str, authority: str, now: float) -> None:
        """Note that a merchant was told of the certificate authority that follows (SHA-256)."""
        with self._changing() as database:
            database.execute(
                "INSERT OR IGNORE INTO told VALUES (?, ?, ?)", (merchant, authority, now)
            )

    def untold(self, authority: str) -> list[str]:
        """Return the members that did not hear of a certificate authority yet."""
        with self._opened() as database:
            rows = database.execute("SELECT merchant FROM told WHERE authority = ?", (authority,))
            told = {merchant for (merchant,) in rows}
            return sorted(set(state_of(database).members) - told)

    def write_members(self) -> None:
        """Write `members.toml` as the registry has it.

        Raises:
            ArchiveError: It cannot be written.
        """
        path = self._folder / "members.toml"
        with self._changing() as database:  # so that an older list never replaces a newer one
            text = members_toml(state_of(database).signed_list().pinned())
            try:
                if not path.is_file() or path.read_text(encoding="utf-8") != text:
                    write_atomically(path, text.encode())
            except (OSError, UnicodeDecodeError) as error:
                raise ArchiveError(f"{path}: cannot be written ({error})") from None

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self._path, timeout=_WAIT_S, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = FULL")
                yield database
            finally:
                database.close()
        except sqlite3.Error as error:
            raise ArchiveError(f"{self._path}: cannot be used ({error})") from None

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        with self._opened() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _member(state: State, merchant: str) -> Member:
    if merchant not in state.members:
        raise EnrolmentError(f"'{merchant[:64]}' is not enrolled")
    return state.members[merchant]
