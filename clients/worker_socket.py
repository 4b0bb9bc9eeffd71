"""The worker's socket: nobody but one user ever reaches it, and no stale file is in the way."""

import os
import pwd
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc

from common.errors import PolicyError, ServiceError
from common.worker_wire import SOCKET_PATH_BYTES, address_of


def check_socket_path(path: Path) -> None:
    """Check that the kernel takes a path for a socket.

    Raises:
        PolicyError: It is too long.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_PATH_BYTES:
        raise PolicyError(
            f"{path}: this path has {length} bytes, a socket's may have {SOCKET_PATH_BYTES}; move "
            "the merchant's folder to a place with a shorter path"
        )


@contextmanager
def bound(server: grpc.Server, path: Path, user: str | None) -> Iterator[None]:
    """Have a server listen on a socket of mode 0600; the caller holds the folder's lock.

    Args:
        server: Not started yet.
        path: Of the socket; the folder is there.
        user: Whose it is; None for the user of this process.

    Raises:
        PolicyError: The path is too long, or the user is unknown.
        ServiceError: Something else lies there, or others could put something there.
    """
    check_socket_path(path)
    _check_folder(path.parent)
    _remove_stale(path)
    before = os.umask(0o177)  # the socket is never reachable by others, not for a moment
    try:
        try:
            server.add_insecure_port(address_of(str(path)))
        except RuntimeError:
            raise ServiceError(f"{path}: cannot listen on this socket") from None
    finally:
        os.umask(before)
    try:
        if user is not None:
            os.chown(path, user_id(user), -1)
        yield
    finally:
        path.unlink(missing_ok=True)


def user_id(user: str) -> int:
    """Return a user's number; raises `PolicyError` where there is no such user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise PolicyError(f"node.user: this machine has no user '{user}'") from None


def _check_folder(folder: Path) -> None:
    found = folder.stat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ServiceError(
            f"{folder}: belongs to somebody else, or others may write into it; run "
            f"chmod go-w on it, as the user that owns the merchant's folder"
        )


def _remove_stale(path: Path) -> None:
    """Remove the socket of a worker that was killed, and nothing else."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ServiceError(f"{path}: something lies there that is no socket; take it away")
    path.unlink()
