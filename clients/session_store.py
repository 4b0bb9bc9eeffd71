"""Where a merchant keeps its half of a session between two messages.

In memory for simulations, whose merchants live in one process. In a sealed file for every
other merchant: Flower starts a fresh process for a message. The file has mode 0600, is replaced
as a whole and reaches the disk before the message that depends on it is answered, so that a
crash never brings back a step that was taken.
"""

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from clients.secure_sum import State, state_from_bytes, state_to_bytes
from common.errors import PolicyError, SecureSumError
from common.identity import Identity

_NONCE_BYTES = 12
_LOCK = os.O_RDWR | os.O_CREAT
_NO_SESSION = "field 'session': this merchant has no session under way; set one up anew"


class SessionStore(Protocol):
    """Keeps one session's state."""

    def locked(self) -> AbstractContextManager[None]:
        """Keep everybody else out from a load to the save that follows it."""

    def load(self) -> State:
        """Return the state; raises `SecureSumError` if there is none."""

    def save(self, state: State) -> None:
        """Replace the state."""

    def erase(self) -> None:
        """Forget the state."""


class MemoryStore:
    """Keeps the state in this process."""

    def __init__(self) -> None:
        self._state: State | None = None
        self._lock = threading.Lock()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads out."""
        with self._lock:
            yield

    def load(self) -> State:
        """Return the state; raises `SecureSumError` if there is none."""
        if self._state is None:
            raise SecureSumError(_NO_SESSION)
        return self._state

    def save(self, state: State) -> None:
        """Replace the state."""
        self._state = state

    def erase(self) -> None:
        """Forget the state."""
        self._state = None


class FileStore:
    """Keeps the state in a file, sealed with a key that only this merchant's identity gives.

    Args:
        path: The file.
        identity: Whose key seals it.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self._path = path
        self._cipher = ChaCha20Poly1305(identity.sealing_key(b"session"))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes and threads out: two answers to one step would be two steps.

        Raises:
            PolicyError: The folder cannot be written.
        """
        try:
            handle = os.open(self._path.with_name(f".{self._path.name}.lock"), _LOCK, 0o600)
        except OSError as error:
            raise PolicyError(f"{self._path}: cannot be locked ({error.strerror})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def load(self) -> State:
        """Return the state.

        Raises:
            SecureSumError: There is none, or the file was changed.
        """
        try:
            raw = self._path.read_bytes()
            opened = self._cipher.decrypt(raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], None)
            return state_from_bytes(opened)
        except FileNotFoundError:
            raise SecureSumError(_NO_SESSION) from None
        except (OSError, InvalidTag, ValueError, json.JSONDecodeError, KeyError, TypeError):
            raise SecureSumError(
                "field 'session': this merchant's session file cannot be read; set one up anew"
            ) from None

    def save(self, state: State) -> None:
        """Replace the file; it is on the disk when this returns.

        Raises:
            PolicyError: The file cannot be written.
        """
        nonce = os.urandom(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, state_to_bytes(state), None)
        beside = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(sealed)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
            self._sync_folder()
        except OSError as error:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise PolicyError(f"{self._path}: cannot be written ({error.strerror})") from None

    def erase(self) -> None:
        """Delete the file.

        Raises:
            PolicyError: It cannot be deleted.
        """
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            raise PolicyError(f"{self._path}: cannot be deleted ({error.strerror})") from None

    def _sync_folder(self) -> None:
        folder = os.open(self._path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
