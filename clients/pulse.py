"""What a node says of itself: one small file, whose time shows that the node is alive.

The file is written in place, so that a node which runs as another user needs no right to make
files beside the merchant's own. It holds JSON, padded to one size.
"""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from common.errors import ServiceError

_BYTES = 8192
_EVERY_S = 0.5
STALE_S = 10.0  # older than this, the node hangs
_OTHER = "other"


class Pulse:
    """Writes the file.

    Args:
        path: The file.
        types: Message types that are counted apart; a server may invent others.
    """

    def __init__(self, path: Path, types: frozenset[str]) -> None:
        before = read_pulse(path)
        try:
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        except OSError as error:
            raise ServiceError(f"{path}: cannot be written ({error.strerror})") from None
        self._types = types
        self._touched_at = 0.0
        self.record: dict[str, Any] = {
            "pid": os.getpid(),
            "state": "starting",
            "reason": "",
            "since": time.time(),
            "node_id": before.get("node_id", 0),  # what the server called this key last
            "key": before.get("key", ""),
            "messages": {},
            "seconds": {},
        }
        self._write()

    def touch(self) -> None:
        """Show that the node is alive; cheap, called often."""
        now = time.monotonic()
        if now - self._touched_at >= _EVERY_S:
            self._touched_at = now
            os.utime(self._handle)

    def tell(self, state: str, reason: str = "") -> bool:
        """Take a state; tell whether it is news."""
        self.touch()
        if (state, reason) == (self.record["state"], self.record["reason"]):
            return False
        if state != self.record["state"]:
            self.record["since"] = time.time()
        self.record |= {"state": state, "reason": reason}
        self._write()
        return True

    def known_as(self, node_id: int, public: bytes) -> None:
        """Keep what the server called this key."""
        self.record |= {"node_id": node_id, "key": key_name(public)}
        self._write()

    def count(self, kind: str, outcome: str, seconds: float) -> None:
        """Count a message."""
        kind = kind if kind in self._types else _OTHER
        outcomes = self.record["messages"].setdefault(kind, {})
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        self.record["seconds"][kind] = round(self.record["seconds"].get(kind, 0.0) + seconds, 4)
        self._write()

    def close(self) -> None:
        """Close the file; it stays."""
        os.close(self._handle)

    def _write(self) -> None:
        content = json.dumps(self.record).encode()
        if len(content) > _BYTES:  # a reason of absurd length
            content = json.dumps(self.record | {"reason": ""}).encode()
        os.pwrite(self._handle, content.ljust(_BYTES), 0)


def key_name(public: bytes) -> str:
    """Return a short name of a public key."""
    return hashlib.sha256(public).hexdigest()[:16]


def read_pulse(path: Path) -> dict[str, Any]:
    """Return what a node said of itself last; empty where it has said nothing."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def is_alive(path: Path) -> bool:
    """Tell whether a node touched its file a short while ago."""
    try:
        return abs(time.time() - path.stat().st_mtime) < STALE_S
    except OSError:
        return False
