"""What the registry's tables hold, and what follows from them."""

import json
import sqlite3
from dataclasses import dataclass

from common.enrolment import Enrolling, SignedList
from common.errors import EnrolmentError
from common.rotation import Rotation

_TABLES = ("operator", "tokens", "uses", "history", "rotations", "told")
_TABLES_SQL = """
CREATE TABLE operator (public_key TEXT NOT NULL);
CREATE TABLE tokens (
  secret_sha256 TEXT PRIMARY KEY, merchant TEXT NOT NULL, at REAL NOT NULL,
  expires_at REAL NOT NULL
);
CREATE TABLE uses (
  secret_sha256 TEXT PRIMARY KEY REFERENCES tokens, at REAL NOT NULL, identity TEXT NOT NULL,
  node_key TEXT NOT NULL
);
CREATE TABLE history (
  number INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL,
  kind TEXT NOT NULL CHECK (kind IN ('added', 'rotated', 'rekeyed', 'revoked')),
  merchant TEXT NOT NULL, identity TEXT NOT NULL, node_key TEXT NOT NULL, node TEXT NOT NULL,
  version INTEGER NOT NULL, asked_at INTEGER NOT NULL
);
CREATE TABLE rotations (
  number INTEGER PRIMARY KEY AUTOINCREMENT, document TEXT NOT NULL UNIQUE
);
CREATE TABLE told (
  merchant TEXT NOT NULL, authority TEXT NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (merchant, authority)
);
"""


_SUCCESSORS_SQL = (
    "CREATE TABLE successors (public_key TEXT NOT NULL UNIQUE, version INTEGER NOT NULL);\n"
)


def _append_only(table: str) -> str:
    return "".join(
        f"CREATE TRIGGER {table}_{change} BEFORE {change} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;\n"
        for change in ("UPDATE", "DELETE")
    )


SINCE_VERSION_1 = f"{_SUCCESSORS_SQL}{_append_only('successors')}PRAGMA user_version = 2;\n"
SCHEMA = _TABLES_SQL + "".join(map(_append_only, _TABLES)) + SINCE_VERSION_1


@dataclass(frozen=True)
class Member:
    """A merchant that is enrolled now."""

    merchant: str
    identity: bytes
    node_key: bytes  # PEM
    node: int  # Flower's id
    added: int  # version of the list that named this key first
    asked_at: int  # when the merchant last asked for another node key, by its own clock
    at: float  # of its enrolment


@dataclass(frozen=True)
class Invitation:
    """A token that was not used yet."""

    merchant: str
    expires_at: float


@dataclass(frozen=True)
class State:
    """What holds at one moment."""

    version: int
    members: dict[str, Member]
    revoked: dict[str, int]
    operator: bytes
    rotations: tuple[Rotation, ...] = ()

    def signed_list(self) -> SignedList:
        """Return the list that the operator signs."""
        return SignedList(
            self.version,
            {name: member.identity for name, member in self.members.items()},
            {name: member.added for name, member in self.members.items()},
            self.revoked,
            self.operator,
            self.rotations,
        )


def append(database: sqlite3.Connection, row: tuple[object, ...]) -> None:
    """Add a line to the history: at, kind, merchant, keys, node, version, asked_at."""
    at, kind, merchant, identity, node_key, node, version, asked_at = row
    database.execute(
        "INSERT INTO history (at, kind, merchant, identity, node_key, node, version, asked_at) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (at, kind, merchant, identity, node_key, str(node), version, asked_at),
    )


def append_rotation(database: sqlite3.Connection, rotation: Rotation) -> None:
    """Add a statement of an old and a new key."""
    document = json.dumps(rotation.document, sort_keys=True)
    database.execute("INSERT INTO rotations (document) VALUES (?)", (document,))


def state_of(database: sqlite3.Connection) -> State:
    """Return what follows from the history."""
    members: dict[str, Member] = {}
    revoked: dict[str, int] = {}
    last = 0
    rows = database.execute(
        "SELECT at, kind, merchant, identity, node_key, node, version, asked_at FROM history "
        "ORDER BY number"
    )
    for at, kind, merchant, identity, node_key, node, version, asked_at in rows:
        last = version
        before = members.pop(merchant, None)
        if kind == "revoked":
            revoked[merchant] = version
            continue
        revoked.pop(merchant, None)
        added, since = (before.added, before.at) if before is not None else (version, at)
        if kind == "rekeyed":
            added = version  # who pinned an older list does not know this key
        members[merchant] = Member(
            merchant, bytes.fromhex(identity), node_key.encode(), int(node), added, asked_at, since
        )
    (operator,) = database.execute("SELECT public_key FROM operator").fetchone()
    successor = "SELECT public_key, version FROM successors ORDER BY version DESC LIMIT 1"
    for public_key, version in database.execute(successor):
        operator, last = public_key, max(last, version)
    documents = database.execute("SELECT document FROM rotations ORDER BY number").fetchall()
    rotations = tuple(Rotation.from_document(json.loads(text)) for (text,) in documents)
    return State(last, dict(sorted(members.items())), revoked, bytes.fromhex(operator), rotations)


def check_token(database: sqlite3.Connection, secret: str, merchant: str, now: float) -> None:
    """Raise an `EnrolmentError` unless a token, given by its hash, can be used."""
    found = database.execute(
        "SELECT merchant, expires_at FROM tokens WHERE secret_sha256 = ?", (secret,)
    ).fetchone()
    if found is None:
        raise EnrolmentError("this token is not known here")
    if found[0] != merchant:
        raise EnrolmentError("this token is another merchant's")
    used = "SELECT 1 FROM uses WHERE secret_sha256 = ?"
    if database.execute(used, (secret,)).fetchone():
        raise EnrolmentError("this token was used already; ask the operator for another")
    if found[1] <= now:
        raise EnrolmentError("this token is too old; ask the operator for another")


def is_repeated(database: sqlite3.Connection, state: State, asked: Enrolling) -> bool:
    """Tell whether a member asks again for what it has: the same token and keys."""
    member = state.members.get(asked.merchant)
    used = database.execute(
        "SELECT identity, node_key FROM uses WHERE secret_sha256 = ?", (asked.secret_sha256,)
    ).fetchone()
    keys = (asked.identity.hex(), asked.node.decode("ascii"))
    return (
        member is not None
        and used == keys
        and (member.identity, member.node_key) == (asked.identity, asked.node)
    )


def check_keys(database: sqlite3.Connection, state: State, asked: Enrolling) -> None:
    """Raise an `EnrolmentError` where the id or a key is taken."""
    if asked.merchant in state.members:
        raise EnrolmentError(f"'{asked.merchant}' is enrolled already")
    if asked.identity in {state.operator, *(m.identity for m in state.members.values())}:
        raise EnrolmentError("this identity key is enrolled already, under another id")
    if asked.identity in {one.old for one in state.rotations}:
        raise EnrolmentError("this identity key was given up for another one")
    check_fresh(database, asked.node)


def check_fresh(database: sqlite3.Connection, node_key: bytes) -> None:
    """Raise an `EnrolmentError` where a node's key was ever used."""
    used = "SELECT 1 FROM history WHERE node_key = ?"
    if database.execute(used, (node_key.decode("ascii"),)).fetchone():
        raise EnrolmentError(
            "this node key was used before, and Flower takes no key twice: move node.key away and "
            "run hansa merchant init again"
        )


def check_node(state: State, node: int) -> None:
    """Raise an `EnrolmentError` where the SuperLink gave a member's node id away."""
    if node in {member.node for member in state.members.values()}:
        raise EnrolmentError("the SuperLink gave a node's id twice; nothing was changed")
